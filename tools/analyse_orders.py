"""Scan orders: python tools/analyse_orders.py checkpoint=RUN [split=test] [case=ID] [donor=train] [out=FOLDER]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from bestiary.shared.core.command_line import short_answers, split_arguments


def main() -> None:
    """Map the learned scan orders of a checkpoint, say what they are made of, and what is lost without them."""
    cfg, rest = split_arguments("analyse_orders", sys.argv[1:])
    from bestiary.projects.asm_unet.order_report import analyse

    for line in analyse(cfg, rest):
        print(line)


if __name__ == "__main__":
    with short_answers():
        main()
