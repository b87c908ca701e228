"""Reading the files of a benchmark: records of json, jsonl, csv and parquet, their fields, and the audio files."""

from __future__ import annotations

import ast
import contextlib
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bestiary.shared.audio.files import SUFFIXES
from bestiary.shared.core.build import nearest
from bestiary.shared.core.errors import BadDataError, ConfigError, require

Row = dict[str, Any]


def first_file(root: Path, names: Sequence[str]) -> Path | None:
    """The first of some files (names or glob patterns, seen from ``root``) that is there, or None."""
    for name in names:
        found = sorted(path for path in root.glob(name) if path.is_file())
        if found:
            return found[0]
    return None


def read_records(path: Path) -> list[Row]:
    """Records of a json file (a list, or a map whose keys become ``id``), a jsonl, csv or parquet file.

    Raises:
        BadDataError: if the file is not what its ending says, or holds no records.
    """
    try:
        rows = list(_READERS[path.suffix.lower()](path))
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # pyarrow's errors are the first two
        raise BadDataError(f"{path} cannot be read as {path.suffix.lower()[1:]}: {error}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise BadDataError(f"{path} holds no list of records, each a map of fields")
    return rows


def _json(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return _lines(text)  # objects on lines of their own, whatever the ending says
    if isinstance(data, Mapping) and data and all(isinstance(value, Mapping) for value in data.values()):
        return [{"id": key, **value} for key, value in data.items()]
    return data if isinstance(data, list) else []


def _jsonl(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    return _json(path) if text.lstrip().startswith("[") else _lines(text)


def _lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at characters that JSON may hold
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}: {error.msg} at character {error.pos + 1}") from error
    return rows


def _csv(path: Path) -> list[Any]:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        return list(csv.DictReader(handle))


def _parquet(path: Path) -> list[Any]:
    return require("pyarrow.parquet", "rl").read_table(path).to_pylist()


_READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def fields(rows: Sequence[Row], names: Mapping[str, Sequence[str]], needed: Sequence[str], where: Path) -> list[Row]:
    """The rows under our own names; what no row has is left out, and None where this row has none.

    Args:
        rows: as they stand in the file.
        names: our name of a field to the names it may have in the file, the likeliest first.
        needed: our names of the fields that some row must have.
        where: the file, for messages.

    Raises:
        BadDataError: that names every field which is not there, and what is.
    """
    there = dict.fromkeys(key for row in rows for key in row)
    known = {ours: next((name for name in theirs if name in there), None) for ours, theirs in names.items()}
    lost = [f"{ours} (looked for {', '.join(names[ours])})" for ours in needed if known[ours] is None]
    if lost:
        raise BadDataError(f"{where} has no field for {'; '.join(lost)}. Its fields are: {', '.join(map(str, there))}")
    return [{ours: row.get(name) for ours, name in known.items() if name is not None} for row in rows]


def among(rows: Sequence[Row], name: str, wanted: str | None, where: Path) -> list[tuple[int, Row]]:
    """The rows whose field is ``wanted``, letter case aside, with their numbers from 1; all of them for None.

    Raises:
        ConfigError: if there is none; it names the values that there are.
    """
    values = [str(row.get(name) or "") for row in rows]
    numbered = list(enumerate(rows, 1))
    if wanted is None:
        return numbered
    found = [pair for pair, own in zip(numbered, values, strict=True) if own.casefold() == wanted.casefold()]
    if not found:
        there = sorted(set(values))
        close = nearest(wanted, there) or ";"
        raise ConfigError(f"{where} has no row whose {name} is {wanted!r}{close} there are {', '.join(there)}")
    return found


def as_list(value: Any) -> list[str]:
    """A list of texts, from one or from its text in JSON or Python; a single value becomes a list of one."""
    if isinstance(value, str) and value.strip().startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value.strip())
    if value is None or value == "":
        return []
    return [str(v) for v in (value if isinstance(value, list | tuple) else [value])]


class AudioFolder:
    """Audio files below a folder, found by the paths and names that a benchmark gives them.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path):
        self.root = root
        self._stems: dict[str, Path] | None = None

    def find(self, name: str) -> Path | None:
        """The file of a path seen from the folder, from one of its parents' leading parts left out, or of a bare name.

        ``./test-mini-audios/x.wav`` is looked for as it stands, then without its first folders one after another, then
        as any audio file below whose name without its ending is ``x``. Paths that lead out of the folder find nothing.
        """
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts:
            return None
        for start in range(len(parts)):
            path = self.root.joinpath(*parts[start:])
            if path.is_file():
                return path
        return self._by_stem().get(stem(parts[-1])) if parts else None

    def starting(self, begin: str) -> Path | None:
        """The first file whose name begins so."""
        return next((path for name, path in self._by_stem().items() if name.startswith(begin)), None)

    def _by_stem(self) -> dict[str, Path]:
        if self._stems is None:
            self._stems = {}
            for path in sorted(self._files()):
                self._stems.setdefault(stem(path.name), path)
        return self._stems

    def _files(self) -> Iterator[Path]:
        return (path for path in self.root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def stem(name: str) -> str:
    """A file's name without the ending of an audio file; other dots stay (``1.2min.mp3`` is ``1.2min``)."""
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name
