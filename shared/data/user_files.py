"""Files that a user names in a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bestiary.shared.core.errors import BadDataError, MissingDataError

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


def first_faults(faults: Sequence[str], count: int | None = None) -> str:
    """Faults as the lines of a report: the first :data:`SHOWN`, and how many more there are.

    Args:
        faults: at least the first ones. count: of all, where not all are given.
    """
    lines = [f"  {fault}" for fault in faults[:SHOWN]]
    more = (len(faults) if count is None else count) - len(lines)
    return "\n".join([*lines, f"  and {more} more"] if more > 0 else lines)
