"""Tokenised documents on disk, memory-mapped, and the stream of fixed windows that is cut from them.

A corpus is tokenised once for each (revision of the corpus, key of the tokenizer), into a folder of its own under
``$BESTIARY_DATA/tokens``: ``tokens.npy`` holds all documents end to end, ``starts.npy`` where each begins. The folder
is written aside and renamed, so it is whole or absent.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.protocols import Tokenizer
from bestiary.shared.data.assets import data_root, locked

RECORD = "about.json"
"""Name of the file that says of what the tokens are; written last."""


@dataclass(frozen=True)
class TokenFile:
    """The documents of one corpus in one tokenizer's tokens.

    Attributes:
        tokens: (N,) uint16 or uint32, memory-mapped: the documents end to end, without special tokens.
        starts: (documents + 1,) int64: document i is ``tokens[starts[i] : starts[i + 1]]``.
    """

    tokens: np.ndarray
    starts: np.ndarray


def token_file(revision: str, tokenizer: Tokenizer, texts: Iterable[str]) -> TokenFile:
    """The tokens of a corpus, made now unless they are there.

    Processes that want the same tokens at the same time wait for the one that makes them.

    Args:
        revision: of the corpus; other texts must have another one.
        tokenizer: its ``key`` says what the tokens are valid for.
        texts: the documents in a fixed order; read only if the tokens must be made.

    Raises:
        BadDataError: if they cannot be written.
    """
    about = {"revision": revision, "tokenizer": tokenizer.key}
    folder = data_root() / "tokens" / _file_name(revision) / _file_name(tokenizer.key)
    try:
        found = _open(folder, about)
        if found is None:
            with locked(f"tokens-{_file_name(revision)}-{_file_name(tokenizer.key)}"):
                found = _open(folder, about) or _make(folder, about, tokenizer, texts)
    except OSError as error:
        raise BadDataError(
            f"{folder}: the tokens of {revision} cannot be kept there ({error.strerror or error}): make room, or set "
            "BESTIARY_DATA to a folder that can be written"
        ) from error
    return found


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name)


def _open(folder: Path, about: dict[str, str]) -> TokenFile | None:
    """What is there, or None if it is not whole or of something else."""
    try:
        record = json.loads((folder / RECORD).read_text())
        tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        starts = np.load(folder / "starts.npy", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    whole = len(starts) > 0 and len(tokens) == starts[-1]
    return TokenFile(tokens, starts) if whole and record == about else None


def _make(folder: Path, about: dict[str, str], tokenizer: Tokenizer, texts: Iterable[str]) -> TokenFile:
    print(f"tokenising {about['revision']} with {about['tokenizer']}, once", flush=True)
    aside = folder.with_name(f"{folder.name}.partial")
    for old in (aside, folder):
        shutil.rmtree(old, ignore_errors=True)
    aside.mkdir(parents=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    starts = [0]
    # The header of a .npy file tells its length, which only the end knows: the numbers go to a file of their own first.
    with open(aside / "numbers", "wb") as numbers:
        for text in texts:
            ids = np.array(tokenizer.encode(text), dtype)
            ids.tofile(numbers)
            starts.append(starts[-1] + len(ids))
    with open(aside / "tokens.npy", "wb") as out, open(aside / "numbers", "rb") as numbers:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (starts[-1],)}
        np.lib.format.write_array_header_1_0(out, header)
        shutil.copyfileobj(numbers, out)
    (aside / "numbers").unlink()
    np.save(aside / "starts.npy", np.array(starts, np.int64))
    (aside / RECORD).write_text(json.dumps(about))
    aside.rename(folder)
    made = _open(folder, about)
    if made is None:
        raise OSError(f"{folder} is not what was written")
    print(f"  {len(starts) - 1:,} documents, {starts[-1]:,} tokens, {folder}", flush=True)
    return made


class Round(NamedTuple):
    """One time through all documents.

    Attributes:
        order: (documents,) their numbers in the order of this round.
        ends: (documents,) where each ends in the stream, end-of-text tokens counted.
    """

    order: np.ndarray
    ends: np.ndarray


class Packing:
    """A stream of documents in one order after another, cut into windows of equal length.

    Every document begins with the end-of-text token: ``eos d0 eos d1 eos d2 …``. So it ends the text before it, which
    that text's last token predicts, and it opens its own, whose first token is predicted from it, as when a model is
    scored or begins to write. A window counts its documents from 0, the end-of-text token with the one it opens.

    Args:
        file: the documents.
        eos_id: the end-of-text token.
        window: tokens of a window.

    Attributes:
        windows: windows of one round through all documents; up to ``window - 1`` tokens at its end are left out, others
            each round since the order differs.

    Raises:
        ConfigError: if a window is longer than all documents together.
    """

    def __init__(self, file: TokenFile, eos_id: int, window: int):
        if window < 2:
            raise ConfigError(f"a window has at least 2 tokens, not {window}")
        self.file, self.eos_id, self.window = file, eos_id, window
        self.lengths = np.diff(file.starts) + 1
        self.windows = int(self.lengths.sum()) // window
        if not self.windows:
            raise ConfigError(
                f"window {window} is longer than all training documents together ({int(self.lengths.sum())} tokens)"
            )

    def round(self, order: np.ndarray) -> Round:
        """The round that takes the documents in this order (documents,)."""
        return Round(order, np.cumsum(self.lengths[order]))

    def read(self, index: int, of: Round) -> tuple[np.ndarray, np.ndarray]:
        """One window of a round.

        Args:
            index: which one, below ``windows``.
            of: the round.

        Returns:
            tokens (window,) int64, and documents (window,) int32: which document of the window each token belongs to.
        """
        tokens, documents = np.empty(self.window, np.int64), np.empty(self.window, np.int32)
        begin = index * self.window
        place = int(np.searchsorted(of.ends, begin, side="right"))
        filled = number = 0
        while filled < self.window:
            document = int(of.order[place])
            into = begin + filled - int(of.ends[place] - self.lengths[document])
            start, stop = (int(at) for at in self.file.starts[document : document + 2])
            if into == 0:
                piece = np.concatenate([[self.eos_id], self.file.tokens[start : min(stop, start + self.window)]])
            else:
                piece = self.file.tokens[start + into - 1 : min(stop, start + into - 1 + self.window)]
            piece = piece[: self.window - filled]
            tokens[filled : filled + len(piece)] = piece
            documents[filled : filled + len(piece)] = number
            filled, place, number = filled + len(piece), place + 1, number + 1
        return tokens, documents
