"""Composing a run's configuration from conf/, and checking it before anything is built."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bestiary.shared.core.errors import ConfigError


def repo_root() -> Path | None:
    """The source checkout this package runs from, or None for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() else None


def conf_dir() -> Path:
    """The folder of the configuration tree, in a checkout and in an installed wheel alike."""
    import bestiary.conf

    return Path(bestiary.conf.__file__).resolve().parent


def register_resolvers() -> None:
    """Make the ``bestiary_*`` interpolations of conf/paths known to OmegaConf; harmless when repeated."""
    root = repo_root() or Path.cwd()
    OmegaConf.register_new_resolver("bestiary_runs", lambda: str(root / "runs"), replace=True)
    OmegaConf.register_new_resolver("bestiary_home", lambda: str(Path("~/.cache/bestiary").expanduser()), replace=True)


def compose(overrides: Sequence[str], name: str = "train") -> tuple[DictConfig, dict[str, str]]:
    """Compose ``conf/<name>.yaml`` with overrides, as the command line does.

    Args:
        overrides: Hydra overrides, for example ``["+project=asm_unet", "seed=1"]``.
        name: the primary config.

    Returns:
        The config in struct mode (without Hydra's own node), and the chosen option of each group.

    Raises:
        ConfigError: a short answer for what Hydra refuses.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_resolvers()
    previous = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            try:
                cfg = hydra_compose(name, overrides=list(overrides), return_hydra_config=True)
            except Exception as error:
                raise explain(error, overrides) from error
            choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
            OmegaConf.set_struct(cfg, False)
            del cfg["hydra"]
            OmegaConf.set_struct(cfg, True)
    finally:
        GlobalHydra.instance().clear()
        if previous is not None:
            GlobalHydra.instance().initialize(previous)
    return cfg, {k: str(v) for k, v in choices.items() if not k.startswith("hydra/")}  # type: ignore[union-attr]


def quoted(path: Path | str) -> str:
    """A path as Hydra's grammar takes it in ``key=value``."""
    text = str(path)
    return text if re.fullmatch(r"[\w./-]+", text, re.ASCII) else "'" + text.replace("'", "\\'") + "'"


def options(group: str) -> list[str]:
    """The options of a config group, subfolders as ``folder/name``."""
    base = conf_dir() / group
    return sorted(str(p.relative_to(base).with_suffix("")) for p in base.rglob("*.yaml"))


def explain(error: Exception, overrides: Sequence[str] = ()) -> ConfigError:
    """Turn what Hydra says into what exists, the nearest name, and nothing else.

    Args:
        error: an exception from composing.
        overrides: the command line, which says what was meant.

    Returns:
        The error to raise instead.
    """
    from bestiary.shared.core.build import nearest

    text = str(error).strip()
    selected = [o.lstrip("+").split("=", 1)[0] for o in overrides if "=" in o and "." not in o.split("=", 1)[0]]
    if "project" in selected and "experiment" in selected:
        return ConfigError("an experiment brings its project with it: give +experiment=… alone")
    missing = re.search(r"Could not find '([\w-]+)/([\w/-]+)'|In '[^']*': Could not (?:find|load) '([^']+)'", text)
    if missing:
        group, option = missing.group(1), missing.group(2)
        if group is None and "/" in (missing.group(3) or ""):
            group, option = missing.group(3).split("/", 1)
        if group:
            known = [o for o in options(group) if o != "none" or group in ("encoder", "backbone")]
            return ConfigError(f"there is no {group} {option!r}{nearest(option, known)}\n{group}: {', '.join(known)}")
    key = re.search(r"Key '([^']+)' is not in struct.*?full_key: (\S+)", text + str(error.__cause__ or ""), re.DOTALL)
    if key:
        return ConfigError(_unknown_key(key.group(2), overrides))
    unread = getattr(error, "override", None)  # Hydra's grammar refused this argument
    if unread and "=" in unread:
        key, _, value = unread.partition("=")
        return ConfigError(
            f"{unread} cannot be read ({text.splitlines()[0]}): a value that holds spaces, commas, brackets or = is "
            f"quoted twice, for the shell and for Hydra: {shlex.quote(f'{key}={quoted(value)}')}"
        )
    if "project" not in selected and "experiment" not in selected:
        return ConfigError(no_project())
    return ConfigError(text.splitlines()[0] if text else type(error).__name__)


def no_project() -> str:
    """The three lines that answer a command line without a project."""
    projects = ", ".join(sorted(options("project"), key=lambda n: (n.startswith("_"), n)))
    return (
        "which project? add +project=NAME (or +experiment=PROJECT/NAME)\n"
        f"projects: {projects}\n"
        "python tools/list_zoo.py lists projects, encoders, backbones, data sets and recipes"
    )


def _unknown_key(full_key: str, overrides: Sequence[str]) -> str:
    from bestiary.shared.core.build import nearest

    group = full_key.split(".", 1)[0]
    if "." not in full_key:
        known = [p.name for p in conf_dir().iterdir() if p.is_dir() and not p.name.startswith("_")]
        known += ["seed", "resume", "init_from", "compare"]
        return f"there is no key {full_key!r}{nearest(full_key, known)}\nconfig groups: {', '.join(sorted(known))}"
    try:
        keys = {o: o.split("=", 1)[0].lstrip("+~") for o in overrides}
        kept = [o for o, k in keys.items() if not (f"{k}.".startswith(f"{full_key}.") or full_key.startswith(f"{k}."))]
        if len(kept) == len(overrides):  # composing again would fail again, for ever
            raise ConfigError(full_key)
        node: Any = compose(kept)[0]
        for part in full_key.split(".")[:-1]:
            node = node[part]
        known = [str(k) for k in node]
    except (ConfigError, OmegaConfBaseException, KeyError, TypeError):
        return f"there is no key {full_key!r}"
    last = full_key.rsplit(".", 1)[-1]
    return (
        f"there is no key {full_key!r}{nearest(last, known)}\n"
        f"{full_key.rsplit('.', 1)[0]}: {', '.join(known)}\n"
        f"python tools/train.py … --cfg job -p {group} prints them with their values"
    )


def check_choices(cfg: DictConfig) -> None:
    """Check that a composed config is a runnable whole, before anything heavy is imported.

    Raises:
        ConfigError: if the project is missing, or a recipe runs a stage it does not have.
    """
    from bestiary.shared.core.build import nearest

    if "project" not in cfg:
        raise ConfigError(no_project())
    if not isinstance(cfg.seed, int) or isinstance(cfg.seed, bool) or cfg.seed < 0:
        raise ConfigError(f"seed must be a whole number from 0 on, not {cfg.seed!r}")
    stages = list(cfg.recipe.stages)
    if isinstance(cfg.recipe.run, str) or not len(cfg.recipe.run):
        raise ConfigError(f"recipe.run is a list of stages, for example 'recipe.run=[{stages[0]}]'")
    if str(cfg.trainer.get("precision")) in ("16", "16-mixed", "16-true"):
        raise ConfigError("fp16 needs a loss scale, which is not built: use trainer.precision=bf16-mixed or 32-true")
    for name in cfg.recipe.run:
        if name not in stages:
            raise ConfigError(f"recipe.run names {name!r}{nearest(name, stages)}; stages: {', '.join(stages)}")
    for forbidden in ("accumulate_grad_batches", "gradient_clip_val"):
        if cfg.trainer.get(forbidden) is not None:
            raise ConfigError(
                f"trainer.{forbidden} is not used here: a stage's micro_batch and clip do that (recipe.stages.…)"
            )


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain data, interpolations resolved; missing values stay ``???``."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)  # type: ignore[return-value]


def config_hash(values: dict[str, Any]) -> str:
    """Identity of an experiment: the resolved config without where it is written, logged or resumed."""
    kept = {k: v for k, v in values.items() if k not in ("paths", "resume", "logger", "launcher")}
    text = OmegaConf.to_yaml(OmegaConf.create(kept), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(stored: Any, now: Any, path: str = "") -> list[str]:
    """Lines ``key: stored -> now`` for every leaf that differs."""
    if isinstance(stored, dict) and isinstance(now, dict):
        keys = list(stored) + [k for k in now if k not in stored]
        return [
            line
            for key in keys
            for line in differences(stored.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if stored == now else [f"{path}: {stored!r} -> {now!r}"]
