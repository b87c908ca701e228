"""A file of one JSON object a line that is only ever added to, and is whole after any interruption."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import BadDataError


class Rows(Mapping[str, dict[str, Any]]):
    """Rows by their ``id``. Each is on the disk before :meth:`add` returns; half a line at the end is cut off.

    Args:
        path: the file; made when the first row is added.

    Raises:
        BadDataError: for a line that is no row, or an id that comes twice.
    """

    def __init__(self, path: Path):
        self.path = path
        self._rows: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                again = row["id"] in self._rows
            except (ValueError, KeyError, TypeError) as error:
                raise BadDataError(f"{path}: line {number} is no row: {error!r}") from error
            if again:
                raise BadDataError(f"{path}: line {number} has the id {row['id']!r} of a line before")
            self._rows[row["id"]] = row

    def add(self, row: dict[str, Any]) -> None:
        """Append a row whose id is new."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        if row["id"] in self._rows:
            raise ValueError(f"{row['id']!r} is there already")
        # Without a buffer, which would write what is left of a line when the file is closed after an error.
        with self.path.open("ab", buffering=0) as handle:
            size = handle.tell()
            try:
                if handle.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(handle.fileno())
            except OSError:  # a full disk: what follows must not stand behind half a line
                os.truncate(self.path, size)
                raise
        self._rows[row["id"]] = row

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
