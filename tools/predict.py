"""Predict: python tools/predict.py checkpoint=RUN_OR_STAGE_FOLDER inputs=PATH[,PATH…] [out=FOLDER] [question="…"]."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from bestiary.shared.core.command_line import short_answers, split_arguments
from bestiary.shared.core.errors import ConfigError, UserError


def main() -> None:
    """Load a checkpoint, read the paths, and let the model predict."""
    read, _ = split_arguments("predict", sys.argv[1:], strict=True)
    from omegaconf import OmegaConf

    from bestiary.shared.core.build import check_arguments
    from bestiary.shared.core.device import pick_device
    from bestiary.shared.vision.ensemble import load_models

    # As they were given: a question or a path may hold ${…}.
    cfg: Any = OmegaConf.to_container(read, resolve=False)
    inputs = [cfg["inputs"]] if isinstance(cfg["inputs"], str) else list(cfg["inputs"])
    if not all(inputs):
        # The empty path is the folder that one stands in.
        raise ConfigError("inputs= holds an empty path: give files, with commas between and none at the end")
    given = options(cfg)
    model: Any = load_models(cfg["checkpoint"])
    out = Path(cfg["out"]) if cfg["out"] else Path.cwd() / "predictions"
    check_arguments(type(model).predict, given, f"checkpoint={cfg['checkpoint']}")
    try:
        written = model.to(pick_device(cfg["device"])).predict([Path(p).expanduser() for p in inputs], out, **given)
    except UserError as error:
        # What was predicted before or beside the failure is there all the same.
        print(*getattr(error, "written", []), sep="\n", end="")
        raise
    for path in written:
        print(path)


def options(cfg: Any) -> dict[str, Any]:
    """What was given of the arguments that not every model takes, as what they are and not as texts.

    Raises:
        ConfigError: for another kind of value.
    """
    names = ("question", "facts", "max_new_tokens", "overwrite")
    given: dict[str, Any] = {n: cfg[n] for n in names if cfg[n] not in (None, "null")}
    for name in {"facts", "overwrite"} & set(given):
        if given[name].lower() not in ("true", "false"):
            raise ConfigError(f"{name} is true or false, not {given[name]!r}")
        given[name] = given[name].lower() == "true"
    if "max_new_tokens" in given:
        if not given["max_new_tokens"].isdecimal() or int(given["max_new_tokens"]) < 1:
            raise ConfigError(f"max_new_tokens is a whole number, 1 or more, not {given['max_new_tokens']!r}")
        given["max_new_tokens"] = int(given["max_new_tokens"])
    return given


if __name__ == "__main__":
    with short_answers():
        main()
