"""A joined table as text: for the terminal, for Markdown, and between the markers of a README."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict

from bestiary.shared.core.errors import UserError
from bestiary.shared.results.details import Comparison
from bestiary.shared.results.join import NOTHING_PUBLISHED, Cell
from bestiary.shared.results.paired import Difference, OverSeeds
from bestiary.shared.results.tables import Table

HEADINGS = ("row", "metric", "published", "measured", "difference", "verdict")


def lines_of(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """One line of six texts a cell; the row's label stands on its first line only."""
    lines, last = [], None
    for cell in cells:
        label = "" if cell.row.id == last else cell.row.label
        last = cell.row.id
        difference = "-" if cell.difference is None else _signed(cell)
        unit = "" if cell.metric.unit in ("fraction", "") else f" [{cell.metric.unit}]"
        lines.append(
            (
                label,
                cell.metric.key + unit,
                cell.metric.format(cell.published),
                _measured(cell),
                difference,
                cell.verdict,
            )
        )
    return lines


def _signed(cell: Cell) -> str:
    text = cell.metric.format(cell.difference)
    if not text.strip("-0.,"):  # a difference that rounds to nothing has no sign
        return text.lstrip("-")
    return text if text.startswith("-") else f"+{text}"


def _measured(cell: Cell) -> str:
    m = cell.measured
    if m is None:
        return "-"
    spread = "" if m.std is None else f" ± {cell.metric.format(m.std)}"
    word = "reduced, " if m.reduced else ""  # never beside a published number without it
    return f"{cell.metric.format(m.value)}{spread} ({word}n={m.n_seeds})"


def compared(comparisons: Sequence[Comparison], decimals: int = 3) -> list[tuple[str, ...]]:
    """A heading and one line a comparison."""
    parts = list(dict.fromkeys(name for c in comparisons for name in c.parts))
    head: tuple[str, ...] = (
        "row",
        "against",
        "difference",
        "95 % interval",
        "s over seeds",
        "better / worse",
        "verdict",
        *parts,
    )
    lines: list[tuple[str, ...]] = [head]
    for c in comparisons:
        d = c.difference
        lines.append(
            (
                c.row.label,
                c.against.label,
                f"{d.mean:+.{decimals}f} ({'reduced, ' if c.reduced else ''}n={d.seeds})",
                f"{d.low:+.{decimals}f} to {d.high:+.{decimals}f}",
                "-" if d.seeds < 2 else f"{d.seed_std:.{decimals}f}",
                f"{d.better} / {d.worse}",
                _verdict(c.difference),
                *(_part(c.parts[name], decimals) if name in c.parts else "-" for name in parts),
            )
        )
    return lines


def _part(part: OverSeeds, decimals: int) -> str:
    reach = f" ± {part.reach:.{decimals}f}" if math.isfinite(part.reach) else ""
    return f"{part.mean:+.{decimals}f}{reach}"


def _verdict(d: Difference) -> str:
    if d.seeds < 3:
        return f"too few seeds ({d.seeds})"
    if not d.within_noise:
        return "outside noise"
    if d.seeds_needed is not None and d.seeds_needed > d.seeds:
        return f"within noise; {d.seeds_needed if d.seeds_needed < 100 else 'over 99'} seeds to tell"
    return "within noise; structures disagree" if d.low <= 0 <= d.high else "within noise"


def note(comparisons: Sequence[Comparison]) -> str:
    """How to read comparisons."""
    n = len(comparisons)
    chance = f"{n} comparison{'s' if n != 1 else ''}, so expect {n / 20:.2g} such verdicts by chance"
    return (
        "Differences are means over seeds and structures; the interval is a paired bootstrap over both. Outside noise: "
        f"neither it nor Student's 95 % interval over the seeds holds 0 ({chance}). ± is half of Student's interval."
    )


def to_terminal(table: Table, cells: Sequence[Cell], comparisons: Sequence[Comparison] = ()) -> str:
    """Aligned columns under the table's title, protocol and paper; comparisons of rows below them."""
    out = [*header(table), "", *aligned([HEADINGS, *lines_of(cells)], right=(2, 3, 4))]
    if comparisons:
        out += ["", *aligned(compared(comparisons), right=(2, 3, 4)), note(comparisons)]
    return "\n".join(out)


def aligned(lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of cells as text in columns, the first with a rule below it; the columns in ``right`` end together."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    body = [
        "  ".join(
            text.rjust(w) if i in right else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [body[0], "  ".join("-" * width for width in widths), *body[1:]]


def to_json(table: Table, cells: Sequence[Cell], comparisons: Sequence[Comparison] = ()) -> str:
    """The joined table for programs: one entry a cell, null where there is nothing; and one a comparison."""
    kept = ("value", "std", "n_seeds", "seeds", "commit", "dirty", "config_hash", "data_revision", "device", "date")
    found = [
        {
            "row": cell.row.id,
            "label": cell.row.label,
            "tier": cell.row.tier,
            "needs": dict(cell.row.needs),
            "metric": cell.metric.key,
            "unit": cell.metric.unit,
            "higher_is_better": cell.metric.higher_is_better,
            "tolerance": cell.metric.tolerance,
            "published": cell.published,
            "source": cell.row.source or None,
            "measured": None
            if cell.measured is None
            else {name: getattr(cell.measured, name) for name in kept} | {"scope": cell.measured.scope},
            "difference": cell.difference,
            "verdict": cell.verdict,
        }
        for cell in cells
    ]
    head = {"table": table.ref, "title": table.title, "paper": dict(table.paper), "protocol": dict(table.protocol)}
    pairs = [
        {
            "row": c.row.id,
            "against": c.against.id,
            **{key: _finite(value) for key, value in asdict(c.difference).items()},
            "within_noise": c.difference.within_noise,
            "parts": {name: {"mean": part.mean, "reach": _finite(part.reach)} for name, part in c.parts.items()},
            "seeds": list(c.seeds),
            "reduced": c.reduced,
        }
        for c in comparisons
    ]
    return json.dumps({**head, "cells": found, "comparisons": pairs}, indent=2, ensure_ascii=False, default=str)


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else None


def header(table: Table) -> list[str]:
    """Title, paper and protocol in three lines."""
    paper = table.paper
    arxiv = f"arXiv {paper['arxiv']}{paper['version'] or ''}" if paper["arxiv"] else "no paper"
    return [
        f"{table.ref}: {table.title}",
        f"  paper     {paper['title']}, {arxiv}, {paper['table']}",
        f"  protocol  {_protocol(table)}",
    ]


def _protocol(table: Table) -> str:
    protocol = table.protocol
    split = f"split: {protocol['split']}; " if protocol["split"] else ""
    return f"{protocol['dataset']}; {split}{protocol['metric']} (version {protocol['version']})"


def to_markdown(table: Table, cells: Sequence[Cell], comparisons: Sequence[Comparison] = ()) -> str:
    """A Markdown table, one line a row and one column a metric; comparisons of rows and the protocol below it."""
    keys = list(dict.fromkeys(cell.metric.key for cell in cells))
    units = {cell.metric.key: cell.metric.unit for cell in cells}
    names = [key if units[key] in ("fraction", "") else f"{key} [{units[key]}]" for key in keys]
    out = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(keys)]
    rows: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.row.id, {})[cell.metric.key] = cell
    for by_metric in rows.values():
        label = next(iter(by_metric.values())).row.label
        texts = [label, *(_markdown_cell(by_metric[key]) if key in by_metric else "" for key in keys)]
        out.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
    if comparisons:
        head, *lines = compared(comparisons)
        out += ["", "| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
        out += ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines]
        out += ["", note(comparisons)]
    out += ["", f"Protocol: {_protocol(table)}."]
    sources = dict.fromkeys(cell.row.source for cell in cells if cell.row.source)
    out += [f"Published: {source}" for source in sources]
    return "\n".join(out)


def _markdown_cell(cell: Cell) -> str:
    """What was measured, what was published, and the verdict; nothing that is not there."""
    published = "" if cell.published is None else f"published {cell.metric.format(cell.published)}"
    if cell.measured is None:
        return ", ".join(text for text in (cell.verdict, published) if text)
    verdict = "" if cell.verdict == NOTHING_PUBLISHED else cell.verdict
    beside = ", ".join(text for text in (published, verdict) if text)
    return _measured(cell) + (f"; {beside}" if beside else "")


_BLOCK = re.compile(r"(<!-- table (?P<ref>[\w./-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)


def blocks(text: str) -> dict[str, str]:
    """The tables a Markdown file holds, by reference.

    A block reads ``<!-- table <project>/<id> -->`` … ``<!-- /table -->``.
    """
    return {match["ref"]: match["body"].strip() for match in _BLOCK.finditer(text)}


def with_block(text: str, ref: str, rendered: str) -> str:
    """The Markdown text with this table's block replaced.

    Raises:
        UserError: if the text has no such block.
    """
    if ref not in blocks(text):
        raise UserError(f"no block '<!-- table {ref} -->' in this text")
    return _BLOCK.sub(lambda m: f"{m[1]}{rendered}\n{m[4]}" if m["ref"] == ref else m[0], text)
