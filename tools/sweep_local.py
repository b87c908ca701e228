#!/usr/bin/env python
"""A sweep file of W&B, run here without an account.

    python tools/sweep_local.py conf/sweeps/asm_unet_lr.yaml --max 8 --parallel 2
    python tools/sweep_local.py conf/sweeps/asm_unet_lr.yaml --dry-run debug=fast       # the commands alone

Grid and random, as the file says; further overrides come after those of the file. Results go to sweep.csv and
sweep.png in the sweep's folder. Start the same command again, and it goes on: finished trials (same resolved config)
are not run again, stopped ones go on from their last checkpoint. Exit status: 0 all trials ran, 1 some failed,
2 nothing could be run, 130 stopped.
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

ROOT = Path(__file__).resolve().parents[1]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="a file of conf/sweeps/, or one like it")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="for every trial")
    parser.add_argument(
        "--max", type=at_least_one, metavar="N", help="the first N trials (default: the file's run_cap)"
    )
    parser.add_argument(
        "--parallel", type=at_least_one, default=1, metavar="K", help="trials at once; they share the cores"
    )
    parser.add_argument(
        "--memory-gb", type=positive, metavar="G", help="for all trials together (default: 90 %% of what is free)"
    )
    parser.add_argument(
        "--out", type=Path, help="the sweep's folder (default: sweeps/<name> in $BESTIARY_RUNS or runs/)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of a random sweep's values")
    parser.add_argument("--wandb", action="store_true", help="keep the file's logger=wandb (default: logger=csv)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with short_answers():
        from bestiary.shared.results.sweep_runs import Results, plan, run_sweep, summary
        from bestiary.shared.results.sweeps import read_sweep

        sweep = read_sweep(args.sweep if args.sweep.exists() else ROOT / args.sweep)  # named from any folder
        runs = Path(os.environ.get("BESTIARY_RUNS") or ROOT / "runs")
        out = (args.out or runs / "sweeps" / sweep.name).expanduser().resolve()
        planned = plan(sweep, out, args.max, args.seed, args.overrides, args.wandb)
        if args.dry_run:
            print("\n".join(shlex.join(trial.command) for trial in planned))
            return 0
        try:
            results = run_sweep(sweep, planned, out, args.parallel, args.memory_gb)
        except KeyboardInterrupt:
            summary(sweep, planned, Results(out / "sweep.csv"), out)
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 130
        return int(summary(sweep, planned, results, out) > 0)


if __name__ == "__main__":
    sys.exit(main())
