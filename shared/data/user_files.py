"""Files that a user names in a config."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bestiary.shared.core.errors import BadDataError, MissingDataError, require

SHOWN = 20
"""Faults that a report lists."""


def regular_file(path: Path, key: str, what: str) -> Path:
    """The path, if it is a file with something in it.

    Args:
        path: the path. key: where it was set, for the message. what: what it should be.

    Raises:
        MissingDataError: if there is nothing. BadDataError: if it is a folder, or empty.
    """
    if path.is_dir():
        raise BadDataError(f"{path} is a folder: set {key} to {what}")
    if not path.is_file():
        raise MissingDataError(f"{path}: there is no such file. Set {key} to {what}.")
    if path.stat().st_size == 0:
        raise BadDataError(f"{path} is empty: it should be {what}")
    return path


class Header(NamedTuple):
    """What the header of an audio file says: frames, and samples a second."""

    frames: int
    rate: int


class NoHeader(NamedTuple):
    """Why there is none: ``missing audio`` or ``unreadable audio``, and what exactly, with the file's name."""

    kind: str
    text: str


def audio_headers(paths: Iterable[Path]) -> dict[Path, Header | NoHeader]:
    """The header of each audio file, several read at a time."""
    soundfile: Any = require("soundfile", "audio")

    def look(path: Path) -> Header | NoHeader:
        try:
            if not path.is_file():
                return NoHeader("missing audio", f"{path}: there is no such file")
            info = soundfile.info(str(path))
        except (soundfile.SoundFileError, RuntimeError, OSError) as error:  # OSError: a name that no file can have
            why = " ".join(str(getattr(error, "strerror", None) or error).split())
            return NoHeader("unreadable audio", f"{str(path)[:300]} cannot be read as audio: {why[:300]}")
        return Header(info.frames, info.samplerate)

    different = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(different, pool.map(look, different), strict=True))


def first_faults(faults: Sequence[str], count: int | None = None) -> str:
    """Faults as the lines of a report: the first :data:`SHOWN`, and how many more there are.

    Args:
        faults: at least the first ones. count: of all, where not all are given.
    """
    lines = [f"  {fault}" for fault in faults[:SHOWN]]
    more = (len(faults) if count is None else count) - len(lines)
    return "\n".join([*lines, f"  and {more} more"] if more > 0 else lines)
