"""Files of results under a lock: read whole, and added to, all lines or none, watched over by a trace."""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from bestiary.shared.results import trace

Lines = Sequence[Sequence[str]]


def append_lines(path: Path, columns: Sequence[str], choose: Callable[[str], Lines]) -> None:
    """Add lines of cells at the end of a CSV file, and their marks to its trace; safe for concurrent processes.

    Args:
        path: the file; it is made, with its heading, where it is not there.
        columns: the heading.
        choose: from the file's text to the lines to add. It raises where that text cannot be used; nothing is written
            then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # No buffer: what it still held after a full disk would be written when the file is closed.
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also by a kill
        before = read_all(file)
        text = before.decode("utf-8")
        lines = choose(text)
        if not lines:
            return
        buffer = io.StringIO()
        if text and not text.endswith("\n"):
            buffer.write("\n")  # someone's editor left the last line open
        csv.writer(buffer, lineterminator="\n").writerows([*([] if text else [columns]), *lines])
        try:
            trace.write_all(file, buffer.getvalue().encode("utf-8"))
            os.fsync(file)
            trace.extend(path, lines)
        except OSError:  # a full disk: take the torn lines back
            os.ftruncate(file, len(before))
            raise
    finally:
        os.close(file)


def read_text(path: Path) -> str:
    """The whole text, with no line half written; empty where there is no file."""
    if not path.exists():
        return ""
    with path.open(encoding="utf-8", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        return file.read()


def read_all(file: int) -> bytes:
    """The bytes of an open file from its start."""
    os.lseek(file, 0, os.SEEK_SET)
    parts = []
    while part := os.read(file, 1 << 20):
        parts.append(part)
    return b"".join(parts)
