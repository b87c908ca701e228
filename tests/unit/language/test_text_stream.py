"""Text piece by piece: for every kind of tokenizer, the pieces are the whole text, and none breaks a character."""

import random

import pytest

from bestiary.shared.language.byte_tokenizer import ByteTokenizer
from bestiary.shared.language.text_stream import StopFilter, TextStream, overlap
from bestiary.shared.language.tokenizers import load_tokenizer
from bestiary.shared.testing.tiny_checkpoint import write_tiny_tokenizer

TEXT = "Hello there,  the user's answer\n\n is: 日本語 né 😀👩‍🚀! \t yes  no\n" * 3


@pytest.fixture(scope="module", params=["byte", "folder", "mistral"])
def tokenizer(request, tmp_path_factory):
    if request.param == "folder":
        folder = tmp_path_factory.mktemp("tokenizer")
        write_tiny_tokenizer(folder)
        return load_tokenizer(str(folder))
    if request.param == "mistral":
        request.getfixturevalue("need_asset")("mistral_common")
        pytest.importorskip("sentencepiece")
    return load_tokenizer(request.param)


def pieces_of(tokenizer, ids):
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    return [*pieces, stream.flush()]


def test_the_pieces_are_the_text(tokenizer):
    ids = tokenizer.encode(TEXT)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == TEXT
    assert not any("\ufffd" in p for p in pieces)
    assert sum(map(bool, pieces)) > len(ids) / 3


@pytest.mark.parametrize("seed", range(5))
def test_tokens_at_random(tokenizer, seed):
    """Broken characters, special tokens, ids beyond the vocabulary: the text is still that of all tokens at once."""
    draw = random.Random(seed)
    ids = [draw.randrange(min(tokenizer.vocab_size, 300) + 8) for _ in range(200)]
    text = tokenizer.decode(ids)
    got = "".join(pieces_of(tokenizer, ids))
    # How many marks a run of broken bytes becomes may depend on where one looks from; nothing else may.
    assert got.replace("\ufffd", "") == text.replace("\ufffd", "")
    if isinstance(tokenizer, ByteTokenizer):
        assert got == text


def test_only_the_last_tokens_are_decoded():
    class Counting(ByteTokenizer):
        longest = 0

        def decode(self, ids):
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    tokenizer = Counting()
    assert "".join(pieces_of(tokenizer, [*(b"ab\xff" * 1000)])) == "ab\ufffd" * 1000
    assert tokenizer.longest < 50


def test_overlap_by_hand():
    assert [overlap(t, "abab") for t in ("xab", "aba", "x", "abab", "")] == [2, 3, 0, 2, 0]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stop_strings_wherever_the_text_is_cut(size):
    text, stop = "a b\n\nUser: x\nUse\nUser", ("\nUser:", "zz")
    found = StopFilter(stop)
    shown = "".join(found.push(text[i : i + size]) for i in range(0, len(text), size) if not found.found)
    assert (shown, found.found) == ("a b\n", True)
    free = StopFilter(("\nUser!",))
    assert "".join(free.push(text[i : i + size]) for i in range(0, len(text), size)) + free.flush() == text
    assert not free.found
