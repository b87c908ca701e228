#!/usr/bin/env python
"""Tables of papers: what was published, what was measured here, and how to measure it.

    python tools/reproduce.py list
    python tools/reproduce.py show asm_unet/params_flops
    python tools/reproduce.py run asm_unet/icbm152 --row asm_unet --seeds 0,1,2
    python tools/reproduce.py report asm_unet/icbm152 [--markdown]
    python tools/reproduce.py check

`run` trains each row once a seed and adds the means to projects/<project>/results/measured.csv; a run that was
stopped goes on. `-o key=value` changes the training, and marks the result as reduced. Exit status: 0 all that was
asked for ran and is within tolerance, 1 something is outside, 2 something could not run, 3 a table file is bad.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

# The package is found from any folder and before any install.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bestiary.shared.core.errors import UserError
from bestiary.shared.results import join, measured, render, runs, tables

ROOT = Path(__file__).resolve().parents[1]


def csv_path(root: Path, table: tables.Table) -> Path:
    return root / "projects" / table.project / "results" / "measured.csv"


def show_list(root: Path) -> int:
    paths = tables.find_tables(root / "projects")
    if not paths:
        print("no tables")
    for table in map(tables.read_table, paths):
        cells = join.join(table, measured.read(csv_path(root, table)))
        counts = {
            v: sum(c.verdict.split(":")[0] == v for c in cells)
            for v in dict.fromkeys(c.verdict.split(":")[0] for c in cells)
        }
        print(f"{table.ref:<28} {len(table.rows)} rows  {table.title}")
        print(" " * 29 + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    return 0


def show(root: Path, ref: str) -> int:
    """The published values and how each row is run; no measurement."""
    table = tables.load_table(root / "projects", ref)
    print("\n".join(render.header(table)))
    for row in table.rows:
        print(f"\n{row.id}: {row.label} [{row.tier}]")
        values = [
            f"{m.key} {m.format(row.published[m.key])}" for m in table.metrics if row.published[m.key] is not None
        ]
        print(f"  published  {', '.join(values) or 'nothing'}" + (f" ({row.source})" if row.source else ""))
        if row.function:
            print(f"  run        {row.function}({', '.join(f'{k}={v!r}' for k, v in row.args.items())})")
        elif row.overrides is not None:
            print(f"  run        python tools/train.py {shlex.join(row.overrides)}")
        if not row.runnable:
            print(f"  blocked    {join.why_blocked(row)}")
        if row.needs:
            print(f"  needs      {', '.join(f'{k}: {v}' for k, v in row.needs.items())}")
        if row.note:
            print(f"  note       {row.note}")
    return 0


def run(root: Path, args: argparse.Namespace) -> int:
    """Run the rows asked for, then report them."""
    table = tables.load_table(root / "projects", args.table)
    rows = [table.row(name) for name in args.row] if args.row else [r for r in table.rows if r.runnable]
    from bestiary.shared.core.runs import git_commit  # brings Hydra, which `list` and `report` do without

    commit, dirty = git_commit()
    runs_dir = Path(args.runs or os.environ.get("BESTIARY_RUNS") or root / "runs").expanduser().resolve()
    started, failed = runs.now(), []
    if not rows:
        print(f"{table.ref}: no row of this table can be run here; why: python tools/reproduce.py show {table.ref}")
        return 2
    for row in rows:
        if not row.runnable:
            print(f"{table.ref} {row.id}: blocked: {join.why_blocked(row)}", file=sys.stderr)
            failed.append(row.id)
            continue
        if row.function and args.override:
            raise UserError(f"{table.ref} {row.id} is measured by a function; --override changes only what is trained")
        plan = runs.Plan(table, row, args.seeds, tuple(args.override), commit, dirty, started)
        if args.dry_run:
            commands = (
                [plan.command(args.train, runs_dir, seed) for seed in plan.seeds] if row.overrides is not None else []
            )
            print("\n".join(shlex.join(c) for c in commands) or f"{row.function}({row.args})")
            continue
        try:
            measurements = runs.execute(plan, args.train, runs_dir)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed.append(row.id)
            continue
        # Written row by row: what was measured stays, whatever happens to the next one.
        measured.append(csv_path(root, table), measurements)
    if args.dry_run:
        return 2 if failed else 0
    cells = join.join(table, measured.read(csv_path(root, table)), [row.id for row in rows])
    print("\n" + render.to_terminal(table, cells))
    if failed:
        print(f"could not run: {', '.join(failed)}", file=sys.stderr)
        return 2
    return int(any(cell.outside for cell in cells))


def report(root: Path, args: argparse.Namespace) -> int:
    """Join published and measured values; computes nothing."""
    table = tables.load_table(root / "projects", args.table)
    cells = join.join(table, measured.read(csv_path(root, table)))
    print(render.to_markdown(table, cells) if args.markdown else render.to_terminal(table, cells))
    return int(any(cell.outside for cell in cells))


def documents(root: Path) -> list[Path]:
    """The Markdown files that may hold rendered tables."""
    found = [root / "README.md", *(root / "docs").rglob("*.md"), *(root / "projects").glob("*/README.md")]
    return [path for path in found if path.is_file()]


def check(root: Path, write: bool) -> int:
    """Every table is well formed, every measurement fits one, every README shows what the files say."""
    found = {table.ref: table for table in map(tables.read_table, tables.find_tables(root / "projects"))}
    wrong = []
    for path in sorted((root / "projects").glob("*/results/measured.csv")):
        project, lines = path.parent.parent.name, measured.read(path)
        known = {table.id for table in found.values() if table.project == project}
        wrong += [f"{path}: there is no table {name!r}" for name in sorted({m.table for m in lines} - known)]
        for table in found.values():
            if table.project == project:
                wrong += [f"{path}: nothing in the table fits {name}" for name in join.orphans(table, lines)]
    for path in documents(root):
        text = new = path.read_text(encoding="utf-8")
        for ref, body in render.blocks(text).items():
            if ref not in found:
                wrong.append(f"{path}: shows a table {ref!r} that does not exist")
                continue
            table = found[ref]
            rendered = render.to_markdown(table, join.join(table, measured.read(csv_path(root, table))))
            if body != rendered and not write:
                wrong.append(f"{path}: the table {ref} is out of date; python tools/reproduce.py check --write")
            new = render.with_block(new, ref, rendered)
        if write and new != text:
            path.write_text(new, encoding="utf-8")
            print(f"{path}: written")
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    print(f"{len(found)} tables, {len(wrong)} problems")
    return 3 if wrong else 0


def seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"seeds are whole numbers between commas, like 0,1,2, not {text!r}") from None
    if len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(f"a seed stands twice in {text!r}: the spread would be wrong")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Published and measured tables.")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="all tables and where they stand")
    verb = verbs.add_parser("show", help="the published values and how each row is run")
    verb.add_argument("table", metavar="PROJECT/TABLE")
    verb = verbs.add_parser("run", help="measure rows and add them to measured.csv")
    verb.add_argument("table", metavar="PROJECT/TABLE")
    verb.add_argument("--row", action="append", default=[], help="only this row (may be repeated)")
    verb.add_argument("--seeds", type=seeds, default=(0,), help="0,1,2 (an effect needs three or more)")
    verb.add_argument("-o", "--override", action="append", default=[], metavar="KEY=VALUE", help="marks it as reduced")
    verb.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    verb.add_argument("--runs", help="folder of the runs (default $BESTIARY_RUNS or runs/)")
    verb.add_argument("--train", type=Path, default=ROOT / "tools" / "train.py", help=argparse.SUPPRESS)
    verb = verbs.add_parser("report", help="published against measured, computing nothing")
    verb.add_argument("table", metavar="PROJECT/TABLE")
    verb.add_argument("--markdown", action="store_true")
    verb = verbs.add_parser("check", help="tables, measurements and READMEs agree")
    verb.add_argument("--write", action="store_true", help="bring the READMEs up to date")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.verb == "list":
            return show_list(args.root)
        if args.verb == "show":
            return show(args.root, args.table)
        if args.verb == "run":
            return run(args.root, args)
        if args.verb == "check":
            return check(args.root, args.write)
        return report(args.root, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed: pip install -e '.[zoo]'", file=sys.stderr)
        return UserError.exit_code


if __name__ == "__main__":
    sys.exit(main())
