"""A recipe's stages, read from the config and checked."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig

from bestiary.shared.core.build import nearest, to_plain
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.loader import check_phases


@dataclass
class Stage:
    """One stage of a recipe; the keys of ``recipe.stages.<name>``.

    Attributes:
        objective: node of the objective.
        optim: node of the optimiser (built with the parameter groups).
        steps: optimiser steps.
        batch_size: samples a step, over all ranks and micro-batches.
        data: ``{part: NAME}`` of the run's data set, or null for the whole.
        blend: name to ``{dataset: node or null (the run's), part, weight}``, or null for none; instead of ``data``.
        phases: shares of the steps at which the blend's next phase begins; a weight may then be a list, one a phase.
        schedule: node of the learning-rate schedule, or null for constant.
        trainable: globs of parameters that are trained. prepare: nodes applied before the stage.
        no_decay: globs of parameters without weight decay. clip: largest gradient norm, or null.
        max_len: longest sequence in tokens, or null. evaluate: names from recipe.evaluations.
        eval_every: steps between evaluations on the validation part, or null for the stage's end alone.
        num_workers: processes that make examples; 0 makes them in the training process.
        max_bad_steps: steps with a loss that is not finite, after which the run ends.
    """

    objective: dict[str, Any]
    optim: dict[str, Any]
    steps: int
    batch_size: int
    data: dict[str, Any] | None = None
    blend: dict[str, Any] | None = None
    phases: list[float] | None = None
    schedule: dict[str, Any] | None = None
    trainable: list[str] = field(default_factory=lambda: ["*"])
    prepare: list[dict[str, Any]] = field(default_factory=list)
    no_decay: list[str] = field(default_factory=list)
    clip: float | None = None
    max_len: int | None = None
    evaluate: list[str] = field(default_factory=list)
    eval_every: int | None = None
    num_workers: int = 0
    max_bad_steps: int = 10

    @classmethod
    def read(cls, name: str, node: Any) -> Stage:
        """Read and check one stage.

        Raises:
            ConfigError: for an unknown, missing or impossible value.
        """
        values = to_plain(node)
        if values.get("blend"):
            values["blend"] = {key: entry for key, entry in values["blend"].items() if entry is not None}
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"recipe.stages.{name} has no key {key!r}{nearest(key, known)}")
        for key in ("objective", "optim", "steps", "batch_size"):
            if values.get(key) is None:
                raise ConfigError(f"recipe.stages.{name}.{key} is missing")
        whole = ("steps", "batch_size", "num_workers", "max_bad_steps", "max_len", "eval_every")
        for key in whole:
            if values.get(key) is not None and (not isinstance(values[key], int) or isinstance(values[key], bool)):
                raise ConfigError(f"recipe.stages.{name}.{key} must be a whole number, not {values[key]!r}")
        stage = cls(**values)
        if stage.num_workers < 0:
            raise ConfigError(f"recipe.stages.{name}.num_workers must not be negative")
        if stage.steps < 1 or stage.batch_size < 1:
            raise ConfigError(f"recipe.stages.{name}: steps and batch_size must be at least 1")
        if stage.data and stage.blend:
            raise ConfigError(f"recipe.stages.{name} has both data and blend; give one")
        check_phases(f"recipe.stages.{name}", stage.blend, stage.phases)
        return stage


def read_stages(cfg: DictConfig) -> dict[str, Stage]:
    """The stages that will run, in order, with the debug caps applied last."""
    debug = dict(cfg.get("debug") or {})
    stages = {name: Stage.read(name, cfg.recipe.stages[name]) for name in cfg.recipe.run}
    world = processes(cfg)
    for name, stage in stages.items():
        stage.steps = min(stage.steps, debug.get("max_steps") or stage.steps)
        stage.batch_size = min(stage.batch_size, max(debug.get("max_batch") or stage.batch_size, world))
        if stage.batch_size % world:
            raise ConfigError(
                f"recipe.stages.{name}.batch_size {stage.batch_size} cannot be divided over {world} processes"
            )
    return stages


def processes(cfg: DictConfig) -> int:
    """How many processes the trainer will have, as far as the config says (``devices: auto`` counts as one)."""
    devices = cfg.trainer.get("devices", 1)
    return devices * cfg.trainer.get("num_nodes", 1) if isinstance(devices, int) and devices > 0 else 1
