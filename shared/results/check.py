"""Whether tables, measurements and READMEs agree: what `tools/reproduce.py check` does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.results import details, join, measured, render, trace
from bestiary.shared.results.tables import Table, find_tables, read_table


def measured_path(root: Path, project: str) -> Path:
    """A project's measured.csv."""
    return root / "projects" / project / "results" / "measured.csv"


def rendered(root: Path, table: Table) -> str:
    """The Markdown of a table, from its file and the project's measurements."""
    return render.to_markdown(table, *joined(root, table))


def joined(
    root: Path, table: Table, rows: Sequence[str] | None = None
) -> tuple[list[join.Cell], list[details.Comparison]]:
    """A table's cells and the comparisons of its rows, from the project's measurements."""
    path = measured_path(root, table.project)
    kept = details.read(details.details_path(path)) if table.details else []
    return join.join(table, measured.read(path), rows), details.compare(table, kept, rows)


def check(root: Path, write: bool = False) -> tuple[list[str], list[Path], int]:
    """Check that tables are well formed, measurements fit them and are as they were written, and READMEs show both.

    Args:
        root: the repository.
        write: bring the READMEs up to date, except with numbers that were changed after they were measured.

    Returns:
        (what is wrong, one message each; the files that were written; how many tables there are).

    Raises:
        TableError: if a table file is malformed. BadDataError: if a file of measurements cannot be read.
    """
    tables = {table.ref: table for table in map(read_table, find_tables(root / "projects"))}
    wrong: list[str] = []
    changed: set[str] = set()
    for path in sorted((root / "projects").glob("*/results/measured.csv")):
        project, lines = path.parent.parent.name, measured.read(path)
        known = {table.id for table in tables.values() if table.project == project}
        wrong += [f"{path}: there is no table {name!r}" for name in sorted({m.table for m in lines} - known)]
        for table in tables.values():
            if table.project == project:
                wrong += [f"{path}: nothing in the table fits {name}" for name in join.orphans(table, lines)]
                wrong += [f"{path}: {text}" for text in join.outdated(table, lines)]
                if table.details:
                    kept = details.read(details.details_path(path))
                    wrong += [f"{path}: {text}" for text in details.disagreements(table, lines, kept)]
        for file in (path, details.details_path(path)):
            if found := trace.problems(file):
                wrong += found
                changed.add(project)
    for path in sorted((root / "projects").glob("*/results/*.sha256")):
        if not path.with_suffix(".csv").exists() and path.read_text(encoding="utf-8").strip():
            wrong.append(f"{path.with_suffix('.csv')}: is gone; take it back from git")
    written = []
    for path in documents(root):
        text = new = path.read_text(encoding="utf-8")
        for ref, body in render.blocks(text).items():
            if ref not in tables:
                wrong.append(f"{path}: shows a table {ref!r} that does not exist")
                continue
            now = rendered(root, tables[ref])
            if body == now:
                continue
            if write and tables[ref].project not in changed:
                new = render.with_block(new, ref, now)
                continue
            wrong.append(
                f"{path}: the table {ref} is out of date: {difference(body, now)}\n"
                "  python tools/reproduce.py check --write brings it up to date"
            )
        if new != text:
            path.write_text(new, encoding="utf-8")
            written.append(path)
    return wrong, written, len(tables)


def documents(root: Path) -> list[Path]:
    """The Markdown files that may hold rendered tables."""
    found = [root / "README.md", *(root / "docs").rglob("*.md"), *(root / "projects").glob("*/README.md")]
    return [path for path in found if path.is_file()]


def difference(shown: str, now: str) -> str:
    """The first cell in which two rendered tables differ, in words."""
    old, new = shown.splitlines(), now.splitlines()
    heads = _cells(new[0]) if new else []
    for i, line in enumerate(new):
        was = old[i] if i < len(old) else ""
        if was == line:
            continue
        ours, theirs = _cells(line), _cells(was)
        if not line.startswith("|") or len(ours) != len(theirs):
            return f"line {i + 1} reads {was!r} instead of {line!r}"
        column = next((c for c, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if column is None:  # spaces alone
            return f"line {i + 1} reads {was!r} instead of {line!r}"
        name = heads[column] if column < len(heads) and heads[column] else "label"
        return f"row {ours[0]!r}, {name}: shows {theirs[column]!r} instead of {ours[column]!r}"
    return f"has {len(old)} lines instead of {len(new)}"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def adopt(root: Path, project: str) -> list[str]:
    """Give the lines of a project's measured.csv that have none a trace; see :func:`trace.adopt`.

    Raises:
        BadDataError: if the project has no measurements, or lines of it were changed or removed.
    """
    path = measured_path(root, project)
    if not path.is_file():
        raise BadDataError(f"{path}: there is no such file")
    measured.read(path)  # a broken line is not adopted
    kept = details.details_path(path)
    details.read(kept)
    return trace.adopt(path) + (trace.adopt(kept) if kept.is_file() else [])
