"""Words as tokens: nothing is lost, tags are one token, and what is no word is spelt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.language.tokenizers import load_tokenizer
from bestiary.shared.language.word_tokenizer import WordTokenizer

WORDS = ["<think>", "</think>", "violin", "key", ",", ".", "2", "sharps"]


def test_known_words_and_tags_are_one_token_each():
    tokenizer = WordTokenizer(WORDS)
    ids = tokenizer.encode("<think>violin, key 2 sharps</think>")
    assert len(ids) == 7
    assert tokenizer.decode(ids) == "<think>violin, key 2 sharps</think>"
    # A word is another token behind a space.
    assert tokenizer.encode("key") != tokenizer.encode(" key")


def test_unknown_words_are_spelt():
    tokenizer = WordTokenizer(WORDS)
    assert tokenizer.encode("violins") == list(b"violins")
    assert tokenizer.encode("é") == list("é".encode())


@given(st.text())
def test_nothing_is_lost(text):
    tokenizer = WordTokenizer(WORDS)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.sampled_from([*WORDS, " ", "\n", "x", "3"]), max_size=20))
def test_nothing_is_lost_of_what_it_knows(parts):
    tokenizer = WordTokenizer(WORDS)
    text = "".join(parts)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_special_token_is_added_above_and_left_out_of_text():
    tokenizer = WordTokenizer(WORDS)
    size = tokenizer.vocab_size
    (new,) = tokenizer.add_tokens(["<sound>"])
    assert new == size
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.decode([new, *tokenizer.encode("key")]) == "key"
    assert tokenizer.add_tokens(["<sound>", "<pad>"]) == [new, tokenizer.pad_id]


def test_the_key_names_the_words():
    assert WordTokenizer(WORDS).key != WordTokenizer(WORDS[:-1]).key


@pytest.mark.parametrize("words", [["two words"], ["a", "a"], [" a"], [""]])
def test_what_is_no_list_of_words_is_refused(words):
    with pytest.raises(ConfigError, match="words of a tokenizer"):
        WordTokenizer(words)


def test_a_list_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="music"):
        load_tokenizer("words:nothing")
