"""Symbols as tokens: what a prompt and an answer become, by hand, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import text_message
from bestiary.shared.core.protocols import Tokenizer
from bestiary.shared.language.processor import TextProcessor
from bestiary.shared.language.symbol_tokenizer import SymbolTokenizer
from bestiary.shared.language.tokenizers import load_tokenizer

SYMBOLS = "0123456789+="
PAD, EOS = 12, 13


def test_it_is_a_tokenizer_by_name():
    tokenizer = load_tokenizer(f"symbols:{SYMBOLS}")
    assert isinstance(tokenizer, SymbolTokenizer)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.key == "symbols:0123456789+="
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.stop_ids, tokenizer.vocab_size) == (PAD, EOS, (EOS,), 14)
    with pytest.raises(ConfigError, match="there is: byte, symbols:…, words:…, smollm2"):
        load_tokenizer("symbol")


def test_an_addition_by_hand():
    tokenizer = SymbolTokenizer(SYMBOLS)
    turns = [text_message("user", "37+58="), text_message("assistant", "095")]
    ids, own = tokenizer.chat(turns)
    assert ids == [3, 7, 10, 5, 8, 11, 0, 9, 5, EOS]
    assert own == [False] * 6 + [True] * 4
    assert tokenizer.chat(turns[:1], add_generation_prompt=True) == ([3, 7, 10, 5, 8, 11], [False] * 6)
    assert tokenizer.decode(ids) == "37+58=095"


def test_prompt_and_training_row_agree():
    processor = TextProcessor(SymbolTokenizer(SYMBOLS))
    example = {"id": "a", "messages": [text_message("user", "37+58=")], "answer": "095"}
    prompt, row = processor([example], "prompt"), processor([example], "train")
    assert row["input_ids"][0, :6].tolist() == prompt["input_ids"][0].tolist()
    assert row["labels"][0].tolist() == [-100] * 6 + [0, 9, 5, EOS]


@given(st.text(SYMBOLS))
def test_round_trip(text):
    tokenizer = SymbolTokenizer(SYMBOLS)
    ids = tokenizer.encode(text)
    assert tokenizer.decode([PAD, *ids, EOS]) == text
    assert len(ids) == len(text)


def test_an_id_without_a_token_is_seen():
    """A model whose embedding has spare rows may draw one: it must not pass for an answer without it."""
    tokenizer = SymbolTokenizer(SYMBOLS)
    assert tokenizer.decode([0, 9, 5, 14]) == "095\ufffd"
    assert tokenizer.decode([0, 16, 9, 5]) == "0\ufffd95"


def test_specials():
    tokenizer = SymbolTokenizer("<pad>b")
    assert tokenizer.encode("<pad>") == [0, 1, 2, 3, 4]  # never read from text
    assert tokenizer.add_tokens(["<image>", "<pad>", "<audio>"]) == [8, tokenizer.pad_id, 9]
    assert tokenizer.add_tokens(["<audio>"]) == [9]
    assert tokenizer.added_tokens == ["<image>", "<audio>"]
    assert tokenizer.vocab_size == 10
    assert tokenizer.decode([2, 8, 5, 9]) == "ab"


def test_it_refuses():
    tokenizer = SymbolTokenizer(SYMBOLS)
    with pytest.raises(BadDataError, match=r"the character '-' of '37-58=' is not among .*'0123456789\+='"):
        tokenizer.encode("37-58=")
    with pytest.raises(BadDataError, match="unknown role 'robot'"):
        tokenizer.chat([text_message("robot", "1")])
    with pytest.raises(BadDataError, match="text alone, and a message has audio"):
        tokenizer.chat([{"role": "user", "content": [{"type": "audio", "value": 0}]}])
    with pytest.raises(ConfigError, match="names '0', '1' more than once"):
        load_tokenizer("symbols:01210")
    with pytest.raises(ConfigError, match="needs symbols"):
        load_tokenizer("symbols:")
