"""A joined table as text: for the terminal, for Markdown, and between the markers of a README."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bestiary.shared.core.errors import UserError
from bestiary.shared.results.join import NOTHING_PUBLISHED, Cell
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


def to_terminal(table: Table, cells: Sequence[Cell]) -> str:
    """Aligned columns under the table's title, protocol and paper."""
    lines = [HEADINGS, *lines_of(cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    right = (2, 3, 4)
    body = [
        "  ".join(
            text.rjust(w) if i in right else text.ljust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([*header(table), "", body[0].rstrip(), rule, *(text.rstrip() for text in body[1:])])


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


def to_markdown(table: Table, cells: Sequence[Cell]) -> str:
    """A Markdown table, one line a row and one column a metric, with the protocol below it."""
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
