"""What tools/plan.py does: check the folder, take the fingerprint, plan, write, and say what to run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bestiary.shared.core.build import build, nearest
from bestiary.shared.core.checkpoint import make_folder
from bestiary.shared.core.config import compose, conf_dir, options, quoted
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.data.nnunet_folder import NnUNetFolder
from bestiary.shared.data.planning.check import Report, check_folder
from bestiary.shared.data.planning.fingerprint import Fingerprint, fingerprint, normalizations
from bestiary.shared.data.planning.plan import DEFAULT_ORDER, FILE_NAME, FORMAT, write_plan
from bestiary.shared.data.planning.planner import PRESETS, Configuration, Outcome, Planner

LAPTOP_GB = 1.0
"""The memory that the suggestion for a machine without a large GPU is planned for: a choice, nothing was measured."""


PLANNED = ("patch_size", "spacing", "strides", "kernel_sizes")
"""Keys of a data set's config that a plan fills where they are null."""


def make_plan(cfg: Any, overrides: list[str]) -> Path:
    """Plan a data set and print what was found.

    Args:
        cfg: conf/plan.yaml with its arguments. overrides: ``dataset.key=value``, each.

    Returns:
        The plan's file.

    Raises:
        BadDataError: with the whole report, if any file is at fault; nothing is written then.
        ConfigError: for a setting that is not there.
    """
    preset = PRESETS.get(cfg.planner)
    if preset is None:
        raise ConfigError(
            f"there is no planner {cfg.planner!r}{nearest(cfg.planner, PRESETS)}; there are {', '.join(PRESETS)}"
        )
    memory = None if cfg.gpu_memory_gb is None else _number("gpu_memory_gb", cfg.gpu_memory_gb)
    smallest, workers = (int(_number(key, cfg[key])) for key in ("min_batch", "workers"))
    source, stated = _source(cfg, overrides)
    source.require_root()
    out = source.root / FILE_NAME if cfg.out is None else Path(cfg.out).expanduser()
    if not out.parent.is_dir():
        raise ConfigError(f"out={out}: there is no folder {out.parent}")
    if out.is_dir():
        raise ConfigError(f"out={out}: is a folder. Give a file in it.")
    make_folder(out.parent, "out=FILE")  # what cannot be written is said before hours of reading
    report = check_folder(source, workers)
    report.refuse()
    found = fingerprint(report.records, report.dims)
    names = source.description["channel_names"]
    planner = Planner(len(source.description["labels"]), preset, memory, smallest)
    try:
        outcome = planner.plan(found.spacings, found.shapes)
    except BadDataError as error:
        raise BadDataError(f"{source.root}: {error}") from None
    values = {
        "format": FORMAT,
        "axes": found.axes,
        "channel_names": names,
        "normalization": [dict(scheme) for scheme in normalizations(names, found)],
        "configurations": {name: _plain(network) for name, network in outcome.configurations.items()},
        "made_with": {
            "planner": preset.name,
            "gpu_memory_gb": memory or preset.memory_gb,
            "min_batch": smallest,
            "cases": len(report.records),
            "kept_by_cropping": found.kept,
            "foreground": [dict(channel) for channel in found.foreground],
        },
    }
    head = [
        "A plan by nnU-Net's rules; python tools/plan.py makes it, dataset.plan=auto reads it. Axes are (z, y, x), of",
        "files that lie as `axes` says (there as x, y, z); spacing is in mm, levels go from fine to coarse.",
    ]
    kept = write_plan(out, values, head)
    if kept is not None:
        print(f"another plan was there and is kept: {kept}")
    for line in _lines(report, found, outcome, values):
        print(line)
    for line in _commands(cfg, source, stated, out, outcome, planner, found):
        print(line)
    return out


def _number(key: str, text: Any) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{key} is a number, not {text!r}") from error


def _source(cfg: Any, overrides: list[str]) -> tuple[NnUNetFolder, list[str]]:
    """The data set, and which of a plan's values its config states and a plan would not change."""
    known = options("dataset")
    if cfg.dataset not in known:
        raise ConfigError(f"there is no dataset {cfg.dataset!r}{nearest(cfg.dataset, known)}")
    wrong = next((text for text in overrides if not text.startswith("dataset.")), None)
    if wrong is not None:
        raise ConfigError(f"{wrong}: dataset.key=value can be given beside the keys of conf/plan.yaml")
    # A path may hold any character, as in the tools that Hydra does not read.
    plain = re.compile(r"dataset\.root=[^'\"]")
    overrides = [f"dataset.root={quoted(o.partition('=')[2])}" if plain.match(o) else o for o in overrides]
    composed, _ = compose([f"+project={cfg.project}", f"dataset={cfg.dataset}", *overrides])
    if OmegaConf.is_missing(composed.dataset, "root"):
        raise ConfigError("dataset.root= is missing: the folder to plan")
    source = build(composed.dataset)
    if not isinstance(source, NnUNetFolder):
        raise ConfigError(f"dataset={cfg.dataset} is no folder in nnU-Net's layout, and needs no plan")
    return source, [key for key in PLANNED if composed.dataset.get(key) is not None]


def _plain(network: Configuration) -> dict[str, Any]:
    def lists(value: Any) -> Any:
        return [lists(item) for item in value] if isinstance(value, tuple) else value

    return {key: lists(value) for key, value in asdict(network).items()}


def _lines(report: Report, found: Fingerprint, outcome: Outcome, values: Mapping[str, Any]) -> list[str]:
    lines = report.text().splitlines()
    flat = report.dims == 2
    spacings = [s[1:] if flat else s for s in found.spacings]
    shapes = [s[1:] if flat else s for s in found.shapes]
    lines.append(f"voxel size  {_range(spacings)} mm, size {_range(shapes)} voxels after cropping")
    for name, scheme in zip(values["channel_names"], values["normalization"], strict=True):
        numbers = ", ".join(f"{key} {value:.5g}" for key, value in scheme.items() if key != "scheme")
        lines.append(f"channel {name}: {scheme['scheme']}{f' ({numbers})' if numbers else ''}")
    for name, network in outcome.configurations.items():
        spacing = " x ".join(f"{s:.4g}" for s in network.spacing)
        lines.append(
            f"{name}: {spacing} mm, patch {_times(network.patch_size)}, batch {network.batch_size}, features "
            f"{', '.join(map(str, network.features))}{', residual' if network.residual else ''}"
        )
    if not flat and "2d" in outcome.configurations:
        lines.append(
            "2d is nnU-Net's plan for slices; bestiary trains on whole volumes or on 2D files, not on slices of 3D"
        )
    return [*lines, *outcome.notes]


def _range(rows: Sequence[tuple[float, ...]]) -> str:
    parts = []
    for axis in zip(*rows, strict=True):
        low, high = min(axis), max(axis)
        parts.append(f"{low:.4g}" if low == high else f"{low:.4g}-{high:.4g}")
    return " x ".join(parts)


def _times(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values))


def _commands(
    cfg: Any,
    source: NnUNetFolder,
    stated: list[str],
    out: Path,
    outcome: Outcome,
    planner: Planner,
    found: Fingerprint,
) -> list[str]:
    """The command that trains by the plan, and one for a machine without a large GPU."""
    name = next(name for name in DEFAULT_ORDER if name in outcome.configurations)
    network = outcome.configurations[name]
    plan = "auto" if out == source.root / FILE_NAME else str(out)
    paths = [shlex.quote(f"dataset.{key}={quoted(path)}") for key, path in (("root", source.root), ("plan", plan))]
    parts = [f"python tools/train.py +project={cfg.project} dataset={cfg.dataset}", *paths]
    parts += [f"recipe.batch_size={network.batch_size}"]
    parts += [f"dataset.{key}=null" for key in stated]  # what is stated would win over the plan
    lines = [f"plan  {out}"]
    if network.residual and "unet_residual" in options("encoder"):
        parts.append("encoder=unet_residual")
    elif network.residual:
        lines.append(
            f"its residual encoder is in no file of {conf_dir() / 'encoder'}: trained as it is, the net is plain"
        )
    train = " ".join(parts)
    lines += [f"train with:\n  {train}"]
    if (planner.memory_gb or planner.preset.memory_gb) <= LAPTOP_GB:
        return lines
    small = Planner(planner.num_classes, planner.preset, LAPTOP_GB, 2)
    try:
        patch = small.plan(found.spacings, found.shapes).configurations[name].patch_size
    except ConfigError:
        return lines
    if patch == network.patch_size:
        return lines
    lines.append(
        f"for {LAPTOP_GB:g} GB (a laptop) the same rules give a patch of {_times(patch)}: run this with "
        f"gpu_memory_gb={LAPTOP_GB:g}, and shorten the training by recipe.steps. Nothing was timed here"
    )
    return lines
