"""Plan: python tools/plan.py dataset.root=FOLDER [planner=resenc_m] [gpu_memory_gb=8] [min_batch=2] [out=FILE].

Checks every file of a folder in nnU-Net's raw layout, takes its fingerprint, and writes spacing, patch, batch, network
and normalisation by nnU-Net's rules. What is wrong comes in one report, and nothing is written then.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from bestiary.shared.core.command_line import short_answers, split_arguments


def main() -> None:
    """Plan the data set that the arguments name; what conf/plan.yaml does not have changes the data set's config."""
    cfg, overrides = split_arguments("plan", sys.argv[1:])
    from bestiary.shared.data.planning.make import make_plan

    make_plan(cfg, overrides)


if __name__ == "__main__":
    with short_answers():
        main()
