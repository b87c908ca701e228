"""What the scripts in tools/ share: Hydra's entry, short answers for what the user can mend, exit codes."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bestiary.shared.core.errors import ConfigError, UserError

Task = Callable[[Any, dict[str, str], list[str]], None]


def hydra_tool(name: str, task: Task) -> None:
    """Run a script whose arguments are Hydra's, on ``conf/<name>.yaml``.

    Args:
        name: the primary config.
        task: called with (config, choices, overrides); once a job with ``-m``.
    """
    sys.argv[1:] = tolerant(sys.argv[1:])
    with short_answers():
        _run_hydra(name, task)


def _run_hydra(name: str, task: Task) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from bestiary.shared.core.config import conf_dir, explain, register_resolvers

    register_resolvers()
    # Hydra would print its own traceback and leave with 1; we want its exceptions.
    full = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failed: list[BaseException] = []

    def restore() -> None:
        if full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = full

    def job(cfg: Any) -> None:
        restore()
        # Hydra would print lines of its own about an exception, and -m would stop at the first: we raise it later.
        try:
            state = HydraConfig.get()
            choices: Any = OmegaConf.to_container(state.runtime.choices)
            chosen = {k: str(v) for k, v in choices.items() if "hydra/" not in k}
            _refuse_multirun_with_many_devices(cfg, state.mode)
            task(cfg, chosen, list(state.overrides.task))
        except (Exception, SystemExit) as error:
            failed.append(error)

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(job)()
    except Exception as error:
        if full == "1":
            raise
        restore()
        raise explain(error, [a for a in sys.argv[1:] if "=" in a]) from error
    if failed:
        raise failed[0]


def _refuse_multirun_with_many_devices(cfg: Any, mode: Any) -> None:
    trainer = cfg.get("trainer") or {}
    if "MULTIRUN" in str(mode) and (trainer.get("strategy") == "ddp" or trainer.get("devices", 1) not in (1, "1")):
        raise ConfigError(
            "-m starts each run in this process, and a run on several devices starts this command again for each: "
            "start the runs one by one (or each under torchrun)"
        )


def split_arguments(name: str, arguments: Sequence[str], strict: bool = False) -> tuple[Any, list[str]]:
    """Read ``key=value`` arguments by ``conf/<name>.yaml``, whose values are plain.

    Args:
        name: the config.
        arguments: the command line.
        strict: refuse keys that the config does not have, instead of returning them.

    Returns:
        The config with the arguments in it, and the arguments that belong elsewhere.

    Raises:
        ConfigError: for an argument without ``=``, a missing value, or (strict) an unknown key.
    """
    from omegaconf import OmegaConf

    from bestiary.shared.core.build import nearest
    from bestiary.shared.core.config import conf_dir

    file = conf_dir() / f"{name}.yaml"
    cfg: Any = OmegaConf.load(file)
    usage = file.read_text().splitlines()[0].removeprefix("# ")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {usage}\n\n{file.read_text()}")
        sys.exit(0 if arguments else 2)
    rest: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is not key=value\nusage: {usage}")
        if key in list(cfg):
            # A path may hold any character: only several inputs are split, at their commas.
            OmegaConf.update(cfg, key, split_paths(value) if key == "inputs" and "," in value else value)
        elif strict or ("." not in key and nearest(key, cfg)):
            raise ConfigError(f"there is no key {key!r}{nearest(key, cfg)}\nusage: {usage}")
        else:
            rest.append(argument)
    for key in cfg:
        if OmegaConf.is_missing(cfg, key):
            raise ConfigError(f"{key}= is missing\nusage: {usage}")
    return cfg, rest


def split_paths(text: str) -> str | list[str]:
    """Paths with commas between. A path that holds commas itself is not cut where it exists; one path stays a text."""
    pieces, paths = text.split(","), []
    while pieces:
        whole = (n for n in range(len(pieces), 1, -1) if os.path.exists(os.path.expanduser(",".join(pieces[:n]))))
        count = next(whole, 1)
        paths.append(",".join(pieces[:count]))
        pieces = pieces[count:]
    return paths[0] if len(paths) == 1 else paths


WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
"""Hydra's options that take a value."""


def tolerant(arguments: Sequence[str]) -> list[str]:
    """The command line as Hydra wants it.

    ``project=x`` and ``experiment=x`` mean ``+project=x`` and ``+experiment=x``; options may stand anywhere
    (``+project=x -m seed=0,1``), where Hydra's parser takes them at the ends alone. Idempotent.
    """
    options: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("-"):
            options.append(argument)
            if rest and (argument in WITH_VALUE or (argument in ("--info", "-i") and "=" not in rest[0])):
                options.append(rest.pop(0))
        else:
            overrides.append(f"+{argument}" if argument.startswith(("project=", "experiment=")) else argument)
    # An optional value (--info) must not swallow the first override.
    return [*overrides, *options]


def at_least_one(text: str) -> int:
    """A whole number from 1 on, for argparse's ``type=``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A number above 0, for argparse's ``type=``."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


EXTRA_OF = {
    **dict.fromkeys(
        (
            "hydra",
            "omegaconf",
            "yaml",
            "lightning",
            "torch",
            "numpy",
            "safetensors",
            "rich",
            "transformers",
            "matplotlib",
        ),
        "zoo",
    ),
    **dict.fromkeys(("monai", "nibabel", "scipy"), "medical"),
    **dict.fromkeys(("gguf", "sentencepiece", "jinja2"), "text"),
}
"""Which extra brings a package that the scripts cannot do without."""


BAD_PATH = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
}
"""Errors of the system that say all there is to say about a path."""


class short_answers:
    """Prints a UserError's message and leaves with its exit code; every other exception keeps its traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            return
        if isinstance(error, UserError):
            sys.stdout.flush()
            print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        if isinstance(error, ModuleNotFoundError) and (root := str(error.name).split(".")[0]) in EXTRA_OF:
            command = f"pip install -e '.[{EXTRA_OF[root]}]'"
            print(f"{os.path.basename(sys.argv[0])}: {root} is not installed: {command}", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, OSError) and error.errno in BAD_PATH:
            print(f"{os.path.basename(sys.argv[0])}: {error.filename}: {error.strerror}", file=sys.stderr)
            sys.exit(2)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            print(
                f"{os.path.basename(sys.argv[0])}: the disk is full ({error.filename or 'while writing'}); "
                "make room and start the same command again: what was finished is kept, and it goes on from there",
                file=sys.stderr,
            )
            sys.exit(2)
