"""The join of what was published and what was measured here."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bestiary.shared.results.measured import Measurement
from bestiary.shared.results.tables import Metric, Row, Table

MATCH, ABOVE, BELOW, NOT_RUN, REDUCED = "match", "above", "below", "not run", "reduced"
NOTHING_PUBLISHED = "no published value"


@dataclass(frozen=True)
class Cell:
    """One metric of one row: published, measured, and what to say about them.

    Attributes:
        row: the row.
        metric: the metric.
        published: the printed value, or None.
        measured: the measurement that counts, or None.
        difference: measured minus published; None where they cannot be compared (a reduced run never is).
        verdict: ``match``, ``above``, ``below``, ``not run``, ``reduced: what``, ``blocked: why``, or
            ``no published value``.
    """

    row: Row
    metric: Metric
    published: float | None
    measured: Measurement | None
    difference: float | None
    verdict: str

    @property
    def outside(self) -> bool:
        """Whether a full run disagrees with the published value."""
        return self.verdict in (ABOVE, BELOW)


def join(table: Table, measurements: Iterable[Measurement], rows: Sequence[str] | None = None) -> list[Cell]:
    """Every metric of every row (or of those named), in the table's order.

    The last full measurement counts; where there is none, the last reduced one.
    """
    latest: dict[tuple[str, str], Measurement] = {}
    for measurement in measurements:
        if measurement.table != table.id:
            continue
        key = (measurement.row, measurement.metric)
        if key in latest and measurement.reduced and not latest[key].reduced:
            continue
        latest[key] = measurement
    return [
        _cell(row, metric, latest.get((row.id, metric.key)))
        for row in table.rows
        if rows is None or row.id in rows
        for metric in table.metrics
        if metric.key not in row.lacks
    ]


def _cell(row: Row, metric: Metric, measured: Measurement | None) -> Cell:
    published = row.published.get(metric.key)
    if measured is None:
        return Cell(row, metric, published, None, None, NOT_RUN if row.runnable else f"blocked: {why_blocked(row)}")
    if measured.reduced:
        return Cell(row, metric, published, measured, None, measured.scope)
    if published is None:
        return Cell(row, metric, None, measured, None, NOTHING_PUBLISHED)
    difference = measured.value - published
    # A hair of slack: 0.917 - 0.912 is 0.005000000000000004.
    within = abs(difference) <= metric.tolerance + 1e-9 * max(1.0, abs(published))
    return Cell(row, metric, published, measured, difference, MATCH if within else ABOVE if difference > 0 else BELOW)


def why_blocked(row: Row) -> str:
    """Why a row cannot be run here."""
    return row.blocked or ("quoted from others" if not row.ours else row.note or "no command")


def orphans(table: Table, measurements: Iterable[Measurement]) -> list[str]:
    """Measurements of this table that no longer fit a row or metric of it."""
    rows = {row.id for row in table.rows}
    metrics = {metric.key for metric in table.metrics}
    return [
        f"{m.table}/{m.row} {m.metric}"
        for m in measurements
        if m.table == table.id and (m.row not in rows or m.metric not in metrics)
    ]


def outdated(table: Table, measurements: Iterable[Measurement]) -> list[str]:
    """Rows whose number that counts was measured with other overrides than the table says today, one message each."""
    found = {}
    for cell in join(table, measurements):
        m, row = cell.measured, cell.row
        if m is not None and not m.reduced and row.overrides is not None and m.overrides != shlex.join(row.overrides):
            found[row.id] = f"{table.ref} {row.id} was measured with {m.overrides!r}; measure it again"
    return list(found.values())
