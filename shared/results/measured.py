"""`projects/<project>/results/measured.csv`: what was measured here. Lines are added, never changed.

Each line that is added leaves its mark in measured.sha256 beside it (`trace.py`).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.results.locked import append_lines, read_text


@dataclass(frozen=True)
class Measurement:
    """One line of measured.csv: one metric of one row of one table, over its seeds.

    Attributes:
        table: the table's id, without the project.
        row: the row's id.
        metric: the metric's key.
        value: mean over the seeds.
        n_seeds: how many runs stand behind it.
        std: sample standard deviation (n - 1), or None with a single run.
        seeds: the seeds, separated by spaces.
        commit: git commit of the code.
        dirty: whether tracked code differed from that commit.
        config_hash: hash of the resolved config; of all seeds' configs, without the seed.
        overrides: the Hydra overrides, as one would type them.
        data_revision: version or hash of the data.
        torch: torch's version.
        device: what it ran on.
        wall_s: seconds, mean over the seeds.
        peak_gb: peak memory in GB, the largest over the seeds, or None.
        date: ISO 8601, UTC.
        scope: ``full``, or ``reduced: what``.
    """

    table: str
    row: str
    metric: str
    value: float
    n_seeds: int
    std: float | None
    seeds: str
    commit: str
    dirty: bool
    config_hash: str
    overrides: str
    data_revision: str
    torch: str
    device: str
    wall_s: float | None
    peak_gb: float | None
    date: str
    scope: str

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise BadDataError(f"{self.table}/{self.row} {self.metric} is {self.value}: not a measurement")
        if self.scope != "full" and not self.scope.startswith("reduced: "):
            raise BadDataError(f"scope must be 'full' or 'reduced: what', not {self.scope!r}")
        if self.n_seeds < 1:
            raise BadDataError(f"{self.table}/{self.row} {self.metric} rests on {self.n_seeds} runs")

    @property
    def reduced(self) -> bool:
        """Whether it was a smaller run than the table's."""
        return self.scope != "full"


COLUMNS = tuple(f.name for f in fields(Measurement))
_OPTIONAL = ("std", "wall_s", "peak_gb")


def append(path: Path, measurements: Sequence[Measurement]) -> None:
    """Add lines at the end, all of them or none, under a lock on the file: safe for concurrent processes.

    Raises:
        BadDataError: if the file there has other columns or a broken line; nothing is written then.
    """
    if not measurements:
        return

    def lines(text: str) -> list[list[str]]:
        _parse(text, path)
        return [[_cell(getattr(measurement, name)) for name in COLUMNS] for measurement in measurements]

    append_lines(path, COLUMNS, lines)


def read(path: Path) -> list[Measurement]:
    """All measurements in the order they were added; none if there is no file.

    Raises:
        BadDataError: naming the file and line that cannot be used.
    """
    return _parse(read_text(path), path)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def _parse(text: str, path: Path) -> list[Measurement]:
    if not text:
        return []
    reader = csv.reader(io.StringIO(text))
    header = next(reader, [])
    if tuple(header) != COLUMNS:
        odd = sorted(set(header) ^ set(COLUMNS))
        raise BadDataError(f"{path}: the columns are not those of measured.csv ({', '.join(odd) or 'other order'})")
    found = []
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(COLUMNS):
            raise BadDataError(f"{path}:{reader.line_num}: {len(cells)} cells instead of {len(COLUMNS)}; mend the line")
        try:
            found.append(_measurement(dict(zip(COLUMNS, cells, strict=True))))
        except (ValueError, BadDataError) as error:
            raise BadDataError(f"{path}:{reader.line_num}: {error}; mend the line") from error
    return found


def _measurement(cells: dict[str, str]) -> Measurement:
    if cells["dirty"] not in ("true", "false"):
        raise ValueError(f"dirty is {cells['dirty']!r}, neither true nor false")
    optional = {name: float(cells[name]) if cells[name] else None for name in _OPTIONAL}
    known = {"value": float(cells["value"]), "n_seeds": int(cells["n_seeds"]), "dirty": cells["dirty"] == "true"}
    return Measurement(**{**cells, **optional, **known})  # type: ignore[arg-type]
