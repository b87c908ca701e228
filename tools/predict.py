"""Predict: python tools/predict.py checkpoint=RUN_OR_STAGE_FOLDER inputs=FILE[,FILE…] [out=FOLDER] [question="…"]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from bestiary.shared.core.command_line import short_answers, split_arguments


def main() -> None:
    """Load a checkpoint, read the paths, and let the model predict."""
    cfg, _ = split_arguments("predict", sys.argv[1:], strict=True)
    from bestiary.shared.core.build import check_arguments
    from bestiary.shared.core.checkpoint import find_checkpoint, load_checkpoint
    from bestiary.shared.core.device import pick_device

    inputs = [cfg.inputs] if isinstance(cfg.inputs, str) else list(cfg.inputs)
    folder = find_checkpoint(cfg.checkpoint)
    model, _ = load_checkpoint(folder)
    out = Path(cfg.out) if cfg.out else Path.cwd() / "predictions"
    given = {name: cfg[name] for name in ("question", "facts", "max_new_tokens") if cfg[name] is not None}
    check_arguments(type(model).predict, given, f"checkpoint={cfg.checkpoint}")
    for path in model.to(pick_device(cfg.device)).predict([Path(p).expanduser() for p in inputs], out, **given):
        print(path)


if __name__ == "__main__":
    with short_answers():
        main()
