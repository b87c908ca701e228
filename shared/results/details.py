"""`projects/<project>/results/details.csv`: what a table's means are made of, one line a run: Dice of every structure.

A table that says ``details: <prefix>`` keeps, for each run, the metrics that begin so. Rows that say ``against: <row>``
are then compared structure by structure and seed by seed (`paired.py`), also where the runs themselves are long gone.
Lines are added, never changed; `trace.py` watches over them as over measured.csv.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.results.locked import append_lines, read_text
from bestiary.shared.results.measured import Measurement
from bestiary.shared.results.paired import Difference, OverSeeds, over_seeds, paired_bootstrap
from bestiary.shared.results.tables import Row, Table

COLUMNS = ("table", "row", "metric", "seed", "scope", "commit", "date", "values")
_SUMMARY = re.compile(r"mean|quarter_\d+")
"""Entries that are means over the others."""


@dataclass(frozen=True)
class Detail:
    """One run's values.

    Attributes:
        table: the table's id.
        row: the row's id.
        metric: the prefix, for example ``test/dice/``.
        seed: of the run.
        scope: ``full``, or ``reduced: what``.
        commit: git commit of the code; several where a run went on at another.
        date: ISO 8601, UTC, of the measurement.
        values: what follows the prefix, to the value; NaN where it is undefined.
    """

    table: str
    row: str
    metric: str
    seed: int
    scope: str
    commit: str
    date: str
    values: Mapping[str, float]


def details_path(measured: Path) -> Path:
    """Where the details beside this measured.csv stand."""
    return measured.with_name("details.csv")


def append(path: Path, details: Sequence[Detail]) -> None:
    """Add lines at the end, all of them or none, under a lock; one that is there but for its date is not added again.

    Raises:
        BadDataError: if the file there is broken; nothing is written then.
    """
    if not details:
        return

    def lines(text: str) -> list[list[str]]:
        here = {_identity(_cells(detail)) for detail in _parse(text, path)}
        return [cells for cells in map(_cells, details) if _identity(cells) not in here]

    append_lines(path, COLUMNS, lines)


def _identity(cells: Sequence[str]) -> tuple[str, ...]:
    return tuple(cell for name, cell in zip(COLUMNS, cells, strict=True) if name != "date")


def read(path: Path) -> list[Detail]:
    """All lines in the order they were added; none if there is no file.

    Raises:
        BadDataError: naming the file and line that cannot be used.
    """
    return _parse(read_text(path), path)


def _cells(detail: Detail) -> list[str]:
    values = {name: None if math.isnan(value) else round(value, 6) for name, value in detail.values.items()}
    found = {**detail.__dict__, "values": json.dumps(values, separators=(",", ":"))}
    return [str(found[name]) for name in COLUMNS]


def _parse(text: str, path: Path) -> list[Detail]:
    if not text:
        return []
    reader = csv.reader(io.StringIO(text))
    if tuple(next(reader, [])) != COLUMNS:
        raise BadDataError(f"{path}: the columns are not {', '.join(COLUMNS)}")
    found = []
    for cells in reader:
        try:
            line = dict(zip(COLUMNS, cells, strict=True))
            values = {k: math.nan if v is None else float(v) for k, v in json.loads(line["values"]).items()}
            found.append(Detail(**{**line, "seed": int(line["seed"]), "values": values}))  # type: ignore[arg-type]
        except (ValueError, AttributeError, TypeError) as error:
            raise BadDataError(f"{path}:{reader.line_num}: {error}; take the file back from git") from error
    return found


@dataclass(frozen=True)
class Comparison:
    """A row against another one.

    Attributes:
        row: the row.
        against: the other.
        difference: row minus other over all structures.
        parts: the difference of each summary (``quarter_1`` …) that both have.
        seeds: the seeds that both have.
        reduced: whether any of the runs was smaller than the table's.
    """

    row: Row
    against: Row
    difference: Difference
    parts: Mapping[str, OverSeeds]
    seeds: tuple[int, ...]
    reduced: bool


def compare(table: Table, details: Iterable[Detail], rows: Sequence[str] | None = None) -> list[Comparison]:
    """Every row that names another in ``against``, where both have runs with the same seeds.

    The newest full line of a row and seed counts; reduced ones are compared where there are no full ones.

    Args:
        table: the table.
        details: lines of details.csv.
        rows: only these rows.
    """
    latest = newest(table, details)
    found = []
    for row in table.rows:
        if not row.against or (rows is not None and row.id not in rows):
            continue
        other = table.row(row.against)
        seeds = sorted(s for name, s in latest if name == row.id and (other.id, s) in latest)
        pairs = [(latest[row.id, s], latest[other.id, s]) for s in seeds]
        full = [pair for pair in pairs if all(d.scope == "full" for d in pair)]
        pairs = full or pairs  # a smaller run is not mixed with full ones
        if not pairs:
            continue
        shared = [name for name in pairs[0][0].values if all(name in d.values for pair in pairs for d in pair)]
        single = [name for name in shared if not _SUMMARY.fullmatch(name)]
        one, two = ([[d.values[name] for name in single] for d in side] for side in zip(*pairs, strict=True))
        parts = {
            name: over_seeds([a.values[name] - b.values[name] for a, b in pairs])
            for name in shared
            if _SUMMARY.fullmatch(name) and name != "mean"
        }
        reduced = any(d.scope != "full" for pair in pairs for d in pair)
        seeds = tuple(a.seed for a, _ in pairs)
        found.append(Comparison(row, other, paired_bootstrap(one, two), parts, seeds, reduced))
    return found


def newest(table: Table, details: Iterable[Detail]) -> dict[tuple[str, int], Detail]:
    """By row and seed the last full line, or where there is none the last reduced one."""
    found: dict[tuple[str, int], Detail] = {}
    for detail in details:
        if (detail.table, detail.metric) != (table.id, table.details):
            continue
        known = found.get((detail.row, detail.seed))
        if known is None or known.scope != "full" or detail.scope == "full":
            found[detail.row, detail.seed] = detail
    return found


def disagreements(table: Table, measurements: Iterable[Measurement], details: Iterable[Detail]) -> list[str]:
    """Rows whose mean in measured.csv is not that of their details, one message each; and details of no row."""
    latest, wrong = newest(table, details), []
    wrong += [f"{table.ref}: details of a row {r!r} that is not there" for r, _ in latest if r not in table.row_ids]
    key = next((m.key for m in table.metrics if m.reads == f"{table.details}mean"), None)
    counts: dict[str, Measurement] = {}
    for m in measurements:
        if m.table == table.id and m.metric == key and not (m.row in counts and m.reduced > counts[m.row].reduced):
            counts[m.row] = m
    for m in counts.values():
        if not m.seeds:  # measured by a function
            continue
        runs = [latest.get((m.row, int(seed))) for seed in m.seeds.split()]
        if any(run is None or "mean" not in run.values for run in runs):
            wrong.append(f"{table.ref} {m.row}: a seed of measured.csv has no line in details.csv; measure it again")
            continue
        mean = sum(run.values["mean"] for run in runs if run) / len(runs)
        if abs(mean - m.value) > 1e-5:
            wrong.append(
                f"{table.ref} {m.row}: measured.csv says {m.value:.5f}, its details {mean:.5f}; measure it again"
            )
    return wrong
