#!/usr/bin/env python
"""Tables of papers: what was published, what was measured here, and how to measure it.

    python tools/reproduce.py list
    python tools/reproduce.py show asm_unet/params_flops
    python tools/reproduce.py run asm_unet/icbm152 --row asm_unet --seeds 0,1,2 [--parallel 4] [--resume] [--dry-run]
    python tools/reproduce.py report asm_unet/icbm152 [--markdown | --json]
    python tools/reproduce.py check [--write]

`run` trains each row once a seed and adds the means to projects/<project>/results/measured.csv, row by row. The same
command at the same commit goes on where it was stopped; with --resume also runs of other calls and commits are taken
over if their resolved config is the same, and the measurement names all commits. `-o key=value` changes the training,
and marks the result as reduced. `check` compares tables, measurements, the trace that every measurement leaves beside
it, and READMEs. `adopt PROJECT` writes that trace for lines that have none (from before traces were kept, or after a
merge); lines that were changed or removed it refuses.

Exit status: 0 all that was asked for ran and is within tolerance, 1 something is outside, 2 something could not run,
3 a table, measurement or README is wrong; 130 stopped.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

# The package is found from any folder and before any install.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bestiary.shared.core.command_line import at_least_one, positive, short_answers
from bestiary.shared.core.errors import UserError
from bestiary.shared.results import check, join, measured, render, runs, tables

ROOT = Path(__file__).resolve().parents[1]


def show_list(root: Path) -> int:
    paths = tables.find_tables(root / "projects")
    if not paths:
        print("no tables")
    for table in map(tables.read_table, paths):
        cells = join.join(table, measured.read(check.measured_path(root, table.project)))
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
    rows = [table.row(name) for name in dict.fromkeys(args.row)] or [
        r for r in table.rows if r.runnable and args.tier in (None, r.tier)
    ]
    from bestiary.shared.core.machine import git_commit  # brings OmegaConf, which `list` and `report` do without
    from bestiary.shared.results.measure import Session

    commit, dirty = git_commit()
    runs_dir = Path(args.runs or os.environ.get("BESTIARY_RUNS") or root / "runs").expanduser().resolve()
    if not rows:
        which = f" of tier {args.tier}" if args.tier else ""
        why = f"why: python tools/reproduce.py show {table.ref}"
        print(f"{table.ref}: no row{which} of this table can be run here; {why}")
        return 2
    plans, failed, started = [], [], runs.now()
    for row in rows:
        if not row.runnable:
            print(f"{table.ref} {row.id}: blocked: {join.why_blocked(row)}", file=sys.stderr)
            failed.append(row.id)
        elif row.function and args.override:
            raise UserError(f"{table.ref} {row.id} is measured by a function; --override changes only what is trained")
        else:
            plans.append(runs.Plan(table, row, args.seeds, tuple(args.override), commit, dirty, started))
    csv = check.measured_path(root, table.project)
    session = Session(plans, args.train, runs_dir, csv, args.resume, args.parallel, args.memory_gb, failed)
    if args.dry_run:
        print("\n".join(session.commands()))
        return 2 if failed else 0
    try:
        session.run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here (with --resume also at another commit)", file=sys.stderr)
        return 130
    cells, comparisons = check.joined(root, table, [row.id for row in rows])
    print("\n" + render.to_terminal(table, cells, comparisons))
    if failed:
        print(f"could not run: {', '.join(failed)}", file=sys.stderr)
        return 2
    return int(any(cell.outside for cell in cells))


def report(root: Path, args: argparse.Namespace) -> int:
    """Join published and measured values; computes nothing."""
    table = tables.load_table(root / "projects", args.table)
    cells, comparisons = check.joined(root, table)
    how = render.to_json if args.json else render.to_markdown if args.markdown else render.to_terminal
    print(how(table, cells, comparisons))
    return int(any(cell.outside for cell in cells))


def run_check(root: Path, write: bool) -> int:
    """Every table is well formed, every measurement fits one and is as it was written, READMEs show what files say."""
    wrong, written, count = check.check(root, write)
    for path in written:
        print(f"{path}: written")
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    print(f"{count} tables, {len(wrong)} problems")
    return 3 if wrong else 0


def adopt(root: Path, project: str) -> int:
    """Give lines of measured.csv that have no trace one."""
    names = check.adopt(root, project)
    print("\n".join([f"{len(names)} lines had no trace and have one now", *(f"  {name}" for name in names)]))
    return 0


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
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="all tables and where they stand")
    verb = verbs.add_parser("show", help="the published values and how each row is run")
    verb.add_argument("table", metavar="PROJECT/TABLE")
    verb = verbs.add_parser("run", help="measure rows and add them to measured.csv")
    verb.add_argument("table", metavar="PROJECT/TABLE")
    which = verb.add_mutually_exclusive_group()
    which.add_argument("--row", action="append", default=[], help="only this row (may be repeated)")
    which.add_argument("--tier", choices=tables.TIERS, help="only rows of this size")
    verb.add_argument("--seeds", type=seeds, default=(0,), help="0,1,2 (an effect needs three or more)")
    verb.add_argument("-o", "--override", action="append", default=[], metavar="KEY=VALUE", help="marks it as reduced")
    verb.add_argument("--parallel", type=at_least_one, default=1, metavar="N", help="runs at once, one thread each")
    verb.add_argument(
        "--memory-gb", type=positive, metavar="G", help="for all runs together (default: 90 %% of what is free)"
    )
    verb.add_argument("--resume", action="store_true", help="take over runs of earlier calls, of other commits too")
    verb.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    verb.add_argument("--runs", help="folder of the runs (default $BESTIARY_RUNS or runs/)")
    verb.add_argument("--train", type=Path, default=ROOT / "tools" / "train.py", help=argparse.SUPPRESS)
    verb = verbs.add_parser("report", help="published against measured, computing nothing")
    verb.add_argument("table", metavar="PROJECT/TABLE")
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--markdown", action="store_true")
    how.add_argument("--json", action="store_true")
    verb = verbs.add_parser("check", help="tables, measurements and READMEs agree")
    verb.add_argument("--write", action="store_true", help="bring the READMEs up to date")
    verb = verbs.add_parser("adopt", help="write the trace of measurements that have none (see the top of this help)")
    verb.add_argument("project", metavar="PROJECT")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with short_answers():
        if args.verb == "list":
            return show_list(args.root)
        if args.verb == "show":
            return show(args.root, args.table)
        if args.verb == "run":
            return run(args.root, args)
        if args.verb == "check":
            return run_check(args.root, args.write)
        if args.verb == "adopt":
            return adopt(args.root, args.project)
        return report(args.root, args)


if __name__ == "__main__":
    sys.exit(main())
