"""An independent trace of measured.csv, by which `reproduce.py check` sees lines that were changed later.

Beside each measured.csv stands measured.sha256: one line a measurement, in the same order, with the start of the
sha256 of its cells and its name. It guards against accidents and edits by hand (a slip in an editor, a merge that went
wrong, a number that was "corrected"), not against whoever changes both files.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bestiary.shared.core.errors import BadDataError

_LENGTH = 16
"""Hex digits that are kept: 64 bits are plenty against accidents."""


@dataclass(frozen=True)
class Mark:
    """What the trace says of one line of measured.csv.

    Attributes:
        digest: start of the sha256 of its cells.
        name: ``table/row metric``.
    """

    digest: str
    name: str

    def __str__(self) -> str:
        return f"{self.digest} {self.name}"


def mark(cells: Sequence[str]) -> Mark:
    """The mark of one line, from its cells as text."""
    digest = hashlib.sha256("\x1f".join(cells).encode()).hexdigest()[:_LENGTH]
    return Mark(digest, " ".join(f"{cells[0]}/{cells[1]} {cells[2]}".split()))


def trace_path(measured: Path) -> Path:
    """Where the trace of this measured.csv stands."""
    return measured.with_suffix(".sha256")


def extend(measured: Path, lines: Sequence[Sequence[str]]) -> None:
    """Add the marks of new lines, all or none. The caller holds the lock on measured.csv."""
    path = trace_path(measured)
    data = "".join(f"{mark(cells)}\n" for cells in lines).encode("utf-8")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(file).st_size
        try:
            write_all(file, data)
            os.fsync(file)
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def write_all(file: int, data: bytes) -> None:
    """Write all bytes to an open file, or raise OSError. No buffer: what that held would be written on closing."""
    while data:
        data = data[os.write(file, data) :]


def problems(measured: Path) -> list[str]:
    """What does not agree between measured.csv and its trace, one message each; none if all is as it was written.

    Raises:
        BadDataError: if the trace itself cannot be read.
    """
    with _locked(measured, fcntl.LOCK_SH) as text:
        lines, marks = _lines(text), _marks(trace_path(measured))
    missing, found = list((Counter(marks) - Counter(line for _, line in lines)).elements()), []
    left = Counter(marks)
    for number, line in lines:
        if left[line]:
            left[line] -= 1
            continue
        was = next((m for m in missing if m.name == line.name), None)
        if was is not None:
            missing.remove(was)
            found.append(f"{measured}:{number}: {line.name} was changed after it was measured; take it back from git")
        else:
            found.append(
                f"{measured}:{number}: {line.name} has no trace in {trace_path(measured).name}: "
                "only tools/reproduce.py run adds lines"
            )
    found += [f"{measured}: a line of {m.name} is gone; take it back from git" for m in missing]
    if not found and marks != [line for _, line in lines]:
        number, line = next((n, line) for (n, line), m in zip(lines, marks, strict=True) if line != m)
        found.append(f"{measured}:{number}: {line.name} stands elsewhere than where it was written")
    return found


def adopt(measured: Path) -> list[str]:
    """Write a trace for the lines that have none, and bring it into the file's order.

    For the lines that were written before traces were kept, and for two branches that were merged. A line that was
    changed or removed is never adopted.

    Returns:
        The names of the lines that had no trace.

    Raises:
        BadDataError: if a line of the trace is no longer in measured.csv; nothing is written then.
    """
    path = trace_path(measured)
    with _locked(measured, fcntl.LOCK_EX) as text:
        lines, marks = [line for _, line in _lines(text)], _marks(path)
        if not Counter(marks) - Counter(lines):
            if lines != marks:
                aside = path.with_name(f".{path.name}.{os.getpid()}")
                aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
                os.replace(aside, path)
            return [line.name for line in (Counter(lines) - Counter(marks)).elements()]
    raise BadDataError("\n".join(["lines were changed or removed; nothing is adopted:", *problems(measured)]))


@contextmanager
def _locked(measured: Path, how: int) -> Iterator[str]:
    """The text of measured.csv, under its lock, so that a line and its mark are seen together."""
    if not measured.exists():
        yield ""
        return
    with measured.open(encoding="utf-8", newline="") as file:
        fcntl.flock(file, how)
        yield file.read()


def _lines(text: str) -> list[tuple[int, Mark]]:
    """Line number and mark of every measurement."""
    reader = csv.reader(io.StringIO(text, newline=""))
    next(reader, None)
    return [(reader.line_num, mark(cells)) for cells in reader if len(cells) >= 3]


def _marks(path: Path) -> list[Mark]:
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        digest, _, name = line.partition(" ")
        if len(digest) != _LENGTH or not name:
            raise BadDataError(f"{path}:{number}: not a line of a trace; take the file back from git")
        found.append(Mark(digest, name))
    return found
