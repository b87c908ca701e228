"""Token files and the windows cut from them, against hand-worked cases."""

import json
import multiprocessing
import time

import numpy as np
import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.data.token_files import RECORD, Packing, TokenFile, token_file
from bestiary.shared.language.byte_tokenizer import ByteTokenizer

EOS = 99


class Counting(ByteTokenizer):
    """Says how often it was asked; slow on demand."""

    def __init__(self, key="byte", vocab_size=262, pause=0.0):
        super().__init__()
        self.key, self._size, self._pause, self.calls = key, vocab_size, pause, 0

    @property
    def vocab_size(self):
        return self._size

    def encode(self, text):
        self.calls += 1
        time.sleep(self._pause)
        return super().encode(text)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path))
    return tmp_path


def never():
    yield from ()
    raise AssertionError("the texts were read again")


# ------------------------------------------------------------------ the file


def test_documents_stand_end_to_end():
    made = token_file("corpus-1", Counting(), ["ab", "", "xyz"])
    assert made.tokens.tolist() == [97, 98, 120, 121, 122]
    assert made.starts.tolist() == [0, 2, 2, 5]
    assert made.tokens.dtype == np.uint16
    assert isinstance(made.tokens, np.memmap)


def test_a_large_vocabulary_takes_four_bytes():
    assert token_file("c", Counting(vocab_size=2**16), ["a"]).tokens.dtype == np.uint16
    assert token_file("d", Counting(vocab_size=2**16 + 1), ["a"]).tokens.dtype == np.uint32


def test_it_is_made_once_for_each_revision_and_tokenizer(home):
    tokenizer = Counting()
    token_file("c-1", tokenizer, ["ab", "c"])
    assert tokenizer.calls == 2
    again = token_file("c-1", tokenizer, never())
    assert again.tokens.tolist() == [97, 98, 99]
    # Another revision, or another tokenizer, is another file; the first stays.
    assert token_file("c-2", tokenizer, ["zz"]).tokens.tolist() == [122, 122]
    assert token_file("c-1", Counting(key="other"), ["y"]).tokens.tolist() == [121]
    assert token_file("c-1", tokenizer, never()).tokens.tolist() == [97, 98, 99]
    assert len(list(home.glob("tokens/*/*/tokens.npy"))) == 3


def test_names_that_fall_together_on_disk_are_not_mixed_up(home):
    assert token_file("c/1", Counting(), ["a"]).tokens.tolist() == [97]
    assert token_file("c_1", Counting(), ["b"]).tokens.tolist() == [98]
    assert len(list(home.glob("tokens/*"))) == 1


@pytest.mark.parametrize("name", ["tokens.npy", "starts.npy", RECORD])
@pytest.mark.parametrize("what", ["cut", "gone", "empty"])
def test_a_broken_file_is_made_again(home, name, what):
    token_file("c", Counting(), ["hello", "you"])
    (file,) = home.glob(f"tokens/*/*/{name}")
    if what == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-3] if what == "cut" else b"")
    tokenizer = Counting()
    assert token_file("c", tokenizer, ["hello", "you"]).tokens.tolist() == list(b"helloyou")
    assert tokenizer.calls == 2


def test_an_interrupted_one_leaves_nothing_behind(home):
    def texts():
        yield "abc"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        token_file("c", Counting(), texts())
    assert not list(home.glob("tokens/*/byte"))
    assert token_file("c", Counting(), ["abc", "d"]).tokens.tolist() == list(b"abcd")
    assert json.loads(next(home.glob(f"tokens/*/*/{RECORD}")).read_text()) == {"revision": "c", "tokenizer": "byte"}


def _make(queue, barrier):
    tokenizer = Counting(pause=0.05)
    barrier.wait(20)
    queue.put((token_file("c", tokenizer, ["ab"] * 5).tokens.tolist(), tokenizer.calls))


def test_two_processes_at_once_make_it_once():
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(2)
    workers = [context.Process(target=_make, args=(queue, barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=20) for _ in workers]
    for worker in workers:
        worker.join()
    assert [tokens for tokens, _ in results] == [list(b"ab" * 5)] * 2
    assert sorted(calls for _, calls in results) == [0, 5]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path / "file"))
    with pytest.raises(BadDataError, match="set BESTIARY_DATA to a folder"):
        token_file("c", Counting(), ["a"])


# ------------------------------------------------------------------ windows


def packing(documents, window):
    tokens = np.array([t for d in documents for t in d], np.uint16)
    return Packing(TokenFile(tokens, np.cumsum([0, *map(len, documents)])), EOS, window)


def test_windows_by_hand():
    """Documents [1 2 3], [4], [5 6], in the order 2, 0, 1: the stream is eos 5 6 eos 1 2 3 eos 4."""
    packed = packing([[1, 2, 3], [4], [5, 6]], 4)
    assert packed.windows == 2  # nine tokens; the last is left out
    order = packed.round(np.array([2, 0, 1]))
    rows = [[part.tolist() for part in packed.read(i, order)] for i in range(2)]
    assert rows == [
        [[EOS, 5, 6, EOS], [0, 0, 0, 1]],
        [[1, 2, 3, EOS], [0, 0, 0, 1]],  # begins within document 0, whose opening token was in the row before
    ]


@pytest.mark.parametrize("window", [2, 3, 5, 8, 13, 64])
def test_the_windows_of_a_round_are_the_stream(window):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 90, n).tolist() for n in (1, 7, 2, 20, 1, 1, 30, 3)]
    packed = packing(documents, window)
    order = rng.permutation(len(documents))
    stream = [(t, d) for d in order for t in (EOS, *documents[d])]
    rows = [packed.read(i, packed.round(order)) for i in range(packed.windows)]
    for index, (tokens, numbers) in enumerate(rows):
        expected = stream[index * window : (index + 1) * window]
        assert tokens.tolist() == [t for t, _ in expected]
        seen = list(dict.fromkeys(d for _, d in expected))
        assert numbers.tolist() == [seen.index(d) for _, d in expected]
    assert len(stream) - packed.windows * window < window


def test_a_window_longer_than_everything():
    with pytest.raises(ConfigError, match=r"window 11 is longer than all training documents together \(10 tokens\)"):
        packing([[1] * 4, [2] * 4], 11)
    assert packing([[1] * 4, [2] * 4], 10).windows == 1
    with pytest.raises(ConfigError, match="at least 2"):
        packing([[1] * 4], 1)
