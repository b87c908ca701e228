"""Replay: python tools/replay.py run=RUN [rule=dapo] [verifier=NAME]: stored rollouts under other rules or rewards."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from bestiary.shared.core.command_line import short_answers, split_arguments


def main() -> None:
    """Recompute rewards, advantages and losses of a stage's rollouts, and say what would have been different."""
    cfg, rest = split_arguments("replay", sys.argv[1:])
    from bestiary.shared.rl.replay import replay

    replay(cfg, rest)


if __name__ == "__main__":
    with short_answers():
        main()
