"""Train: python tools/train.py +project=NAME [dataset=… backbone=… recipe=… key=value …] [-m] [--cfg job]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from bestiary.shared.core.command_line import hydra_tool


def main() -> None:
    """Compose the config with Hydra, then run it."""

    def run(cfg, choices, overrides):
        from bestiary.shared.core.train import train

        train(cfg, choices, overrides)

    hydra_tool("train", run)


if __name__ == "__main__":
    main()
