"""Tables of published values as data: `projects/<project>/tables/<id>.yaml`, read and checked.

A table says what the paper printed, under which protocol, and how each row is run here. Null means that the paper
does not give it; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bestiary.shared.core.errors import UserError
from bestiary.shared.results.schema import Checker, nearest, read_yaml

SCHEMA = 1
TIERS = ("smoke", "small", "full")
Tier = Literal["smoke", "small", "full"]


class TableError(UserError):
    """A table file that does not follow the schema. The message names the file and the place in it."""

    exit_code = 3


@dataclass(frozen=True)
class Metric:
    """One column of a table.

    Attributes:
        key: the metric's name in the table and in measured.csv, for example ``dice/CSF``.
        unit: ``fraction``, ``%``, ``mm``, ``parameters`` …
        higher_is_better: direction.
        decimals: digits after the point when it is printed.
        tolerance: largest absolute difference from the published value that counts as a match.
        basis: what the tolerance rests on: the paper's spread, our seeds' spread, or rounding.
        reads: the key under which a run's result.json holds it, where that differs from ``key``.
    """

    key: str
    unit: str
    higher_is_better: bool
    decimals: int
    tolerance: float
    basis: str
    reads: str

    def format(self, value: float | None) -> str:
        """The value as it is printed; a dash for none."""
        return "-" if value is None else f"{value:,.{self.decimals}f}"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        id: its name on the command line.
        label: the method as printed.
        ours: whether it is the paper's own method (or this repository's), not a row quoted from others.
        overrides: Hydra overrides that train it, or None.
        function: ``module:callable`` that measures it without training, or None.
        args: keyword arguments for the function.
        published: value per metric; None where the paper gives none.
        source: where the published values come from.
        needs: what it takes: gpus, vram_gb, ram_gb (GB of main memory of one run, by which runs are started side by
            side), hours, data, weights.
        tier: ``smoke``, ``small`` or ``full``.
        scope: ``full``, or ``reduced: what``.
        note: anything a reader should know.
        blocked: why it cannot be run here, or empty.
        against: id of the row that this one is compared with, structure by structure and seed by seed (see ``details``
            of the table), or empty.
        lacks: keys of metrics that this row cannot have.
        after: id of an earlier row whose run of the same seed this one starts from (``init_from``), or empty. Rows that
            differ in their last stage alone share the ones before it, and are compared from the same weights.
    """

    id: str
    label: str
    ours: bool
    overrides: tuple[str, ...] | None
    function: str | None
    args: Mapping[str, Any]
    published: Mapping[str, float | None]
    source: str
    needs: Mapping[str, Any]
    tier: Tier
    scope: str
    note: str
    blocked: str
    after: str = ""
    against: str = ""
    lacks: tuple[str, ...] = ()

    @property
    def runnable(self) -> bool:
        """Whether this repository can run it."""
        return not self.blocked and (self.overrides is not None or self.function is not None)


@dataclass(frozen=True)
class Table:
    """A whole table file; ``ref`` is ``<project>/<id>``. ``details`` is the prefix of the metrics kept for each run."""

    project: str
    id: str
    path: Path
    title: str
    paper: Mapping[str, Any]
    protocol: Mapping[str, Any]
    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...] = field(default=())
    details: str = ""

    @property
    def ref(self) -> str:
        """Its name on the command line."""
        return f"{self.project}/{self.id}"

    @property
    def row_ids(self) -> set[str]:
        """The names of its rows."""
        return {row.id for row in self.rows}

    def row(self, name: str) -> Row:
        """The row of this name.

        Raises:
            UserError: if there is none; the message names the nearest.
        """
        for row in self.rows:
            if row.id == name:
                return row
        raise UserError(f"{self.ref} has no row {name!r}{nearest(name, [r.id for r in self.rows])}")


_TOP = {"schema", "title", "paper", "protocol", "metrics", "rows", "details"}
_PAPER = {"title", "arxiv", "version", "table", "page", "retrieved", "note"}
_PROTOCOL = {
    "dataset", "revision", "split", "classes", "spacing", "patch", "tta", "post_processing", "metric", "version",
    "harness", "prompt", "few_shot", "sampling", "max_len", "k", "note",
}  # fmt: skip
_METRIC = {"key", "unit", "higher_is_better", "decimals", "tolerance", "reads"}
_NEEDS = {"gpus", "vram_gb", "ram_gb", "hours", "data", "weights"}
_ROW = {
    "id", "label", "ours", "overrides", "function", "args", "published", "source", "needs", "tier", "scope", "note",
    "blocked", "after", "against", "lacks",
}  # fmt: skip


def read_table(path: Path | str, project: str | None = None) -> Table:
    """Read and check a table file.

    Args:
        path: ``projects/<project>/tables/<id>.yaml``.
        project: its project; taken from the path if not given.

    Raises:
        TableError: if the file is not YAML or does not follow the schema.
    """
    path = Path(path)
    data = read_yaml(path, TableError)
    check = Checker(path, TableError)
    top = check.mapping(data, "the file", _TOP, required={"schema", "paper", "protocol", "metrics", "rows"})
    if top["schema"] != SCHEMA:
        check.fail("schema", f"is {top['schema']!r}, this version reads {SCHEMA}")
    paper = check.mapping(top["paper"], "paper", _PAPER, required={"title", "arxiv", "version", "table"})
    protocol = check.mapping(top["protocol"], "protocol", _PROTOCOL, required={"dataset", "split", "metric", "version"})
    metrics = tuple(_metric(check, value, f"metrics[{i}]") for i, value in enumerate(check.entries(top, "metrics")))
    check.unique([m.key for m in metrics], "metrics")
    keys = [m.key for m in metrics]
    rows = tuple(_row(check, value, f"rows[{i}]", keys) for i, value in enumerate(check.entries(top, "rows")))
    check.unique([r.id for r in rows], "rows")
    for i, row in enumerate(rows):
        if row.after and not any(other.id == row.after and other.overrides is not None for other in rows[:i]):
            check.fail(f"rows[{row.id}].after", f"must be an earlier row that is trained, not {row.after!r}")
        if row.against and (row.against == row.id or row.against not in {other.id for other in rows}):
            check.fail(f"rows[{row.id}].against", f"must be another row, not {row.against!r}")
    details = check.text(top, "details", "the file", default="")
    if any(row.against for row in rows) and not details:
        check.fail("details", "is missing: rows with `against` are compared by what it keeps, for example test/dice/")
    title = check.text(top, "title", "the file", default=str(paper["title"]))
    return Table(project or path.parent.parent.name, path.stem, path, title, paper, protocol, metrics, rows, details)


def _metric(check: Checker, value: Any, where: str) -> Metric:
    required = {"key", "unit", "higher_is_better", "decimals", "tolerance"}
    data = check.mapping(value, where, _METRIC, required)
    tolerance = check.mapping(data["tolerance"], f"{where}.tolerance", {"abs", "basis"}, {"abs", "basis"})
    if not isinstance(data["higher_is_better"], bool):
        check.fail(f"{where}.higher_is_better", "must be true or false")
    if not isinstance(data["decimals"], int) or not 0 <= data["decimals"] <= 9:
        check.fail(f"{where}.decimals", f"must be a whole number from 0 to 9, not {data['decimals']!r}")
    margin = check.number(tolerance["abs"], f"{where}.tolerance.abs")
    if margin < 0:
        check.fail(f"{where}.tolerance.abs", "must not be negative")
    key = check.text(data, "key", where)
    return Metric(
        key=key,
        unit=check.text(data, "unit", where),
        higher_is_better=data["higher_is_better"],
        decimals=data["decimals"],
        tolerance=margin,
        basis=check.text(tolerance, "basis", f"{where}.tolerance"),
        reads=check.text(data, "reads", where, default=key),
    )


def _row(check: Checker, value: Any, where: str, keys: list[str]) -> Row:
    data = check.mapping(value, where, _ROW, required={"id", "label", "ours", "overrides", "published", "tier"})
    name = check.text(data, "id", where)
    where = f"rows[{name}]"
    if not isinstance(data["ours"], bool):
        check.fail(f"{where}.ours", "must be true or false")
    overrides = data["overrides"]
    if overrides is not None and not (isinstance(overrides, list) and all(isinstance(o, str) for o in overrides)):
        check.fail(f"{where}.overrides", "must be null or a list of Hydra overrides, each a text")
    function = data.get("function")
    if function is not None and (not isinstance(function, str) or function.count(":") != 1):
        check.fail(f"{where}.function", f"must read 'module:callable', not {function!r}")
    if function is not None and overrides is not None:
        check.fail(where, "has both overrides and a function; it is measured by one of them")
    published = check.mapping(data["published"] or {}, f"{where}.published", set(keys))
    numbers = {
        key: None if published.get(key) is None else check.number(published[key], f"{where}.published.{key}")
        for key in keys
    }
    source = check.text(data, "source", where, default="")
    if any(v is not None for v in numbers.values()) and not source:
        check.fail(f"{where}.source", "is missing: every published value names where it was printed")
    if data["tier"] not in TIERS:
        check.fail(f"{where}.tier", f"must be one of {', '.join(TIERS)}, not {data['tier']!r}")
    needs = check.mapping(data.get("needs") or {}, f"{where}.needs", _NEEDS)
    if "ram_gb" in needs and check.number(needs["ram_gb"], f"{where}.needs.ram_gb") <= 0:
        check.fail(f"{where}.needs.ram_gb", "must be above 0")
    scope = check.text(data, "scope", where, default="full")
    if scope != "full" and not scope.startswith("reduced: "):
        check.fail(f"{where}.scope", f"must be 'full' or 'reduced: what', not {scope!r}")
    return Row(
        id=name,
        label=check.text(data, "label", where),
        ours=data["ours"],
        overrides=None if overrides is None else tuple(overrides),
        function=function,
        args=check.mapping(data.get("args") or {}, f"{where}.args", None),
        published=numbers,
        source=source,
        needs=needs,
        tier=data["tier"],
        scope=scope,
        note=check.text(data, "note", where, default=""),
        blocked=check.text(data, "blocked", where, default=""),
        after=check.text(data, "after", where, default=""),
        against=check.text(data, "against", where, default=""),
        lacks=_known(check, data.get("lacks") or [], f"{where}.lacks", keys),
    )


def _known(check: Checker, names: Any, where: str, keys: list[str]) -> tuple[str, ...]:
    if not isinstance(names, list) or any(name not in keys for name in names):
        check.fail(where, f"must be a list of this table's metrics, not {names!r}")
    return tuple(names)


def find_tables(projects: Path, pattern: str | None = None) -> list[Path]:
    """Paths of the table files, sorted; ``pattern`` is ``<project>`` or ``<project>/<id>``, wildcards allowed."""
    project, _, name = (pattern or "*").partition("/")
    return sorted(projects.glob(f"{project}/tables/{name or '*'}.yaml"))


def load_table(projects: Path, ref: str) -> Table:
    """The table ``<project>/<id>``.

    Raises:
        UserError: if there is no such table; the message names the nearest.
        TableError: if it is malformed.
    """
    project, _, name = ref.partition("/")
    path = projects / project / "tables" / f"{name}.yaml"
    if not name or not path.is_file():
        known = [f"{p.parent.parent.name}/{p.stem}" for p in find_tables(projects)]
        raise UserError(f"no table {ref!r}{nearest(ref, known)}\nlist them with: python tools/reproduce.py list")
    return read_table(path, project)
