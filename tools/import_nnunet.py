"""Take over a model of nnU-Net v2: python tools/import_nnunet.py checkpoint=MODEL_FOLDER out=FOLDER [fold=0]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from bestiary.shared.core.command_line import short_answers, split_arguments


def main() -> None:
    """Write a trained model of nnU-Net as a checkpoint folder, and say what to do with it."""
    cfg, _ = split_arguments("import_nnunet", sys.argv[1:], strict=True)
    from bestiary.projects.asm_unet.convert import import_nnunet

    for line in import_nnunet(cfg.checkpoint, Path(cfg.out).expanduser(), cfg.fold):
        print(line)


if __name__ == "__main__":
    with short_answers():
        main()
