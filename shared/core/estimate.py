"""What a run will need: weights, gradients and optimiser, from the meta device, before any of it is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from bestiary.shared.core.build import build
from bestiary.shared.core.checkpoint import Structure, build_model
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.machine import free_memory
from bestiary.shared.core.prepare import set_trainable


@dataclass(frozen=True)
class Estimate:
    """Bytes by purpose.

    Attributes:
        parameters: how many there are. weights, gradients, optimizer: bytes, in fp32.
        available: bytes that the device has.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    available: int

    @property
    def total(self) -> int:
        """Bytes needed before the first activation."""
        return self.weights + self.gradients + self.optimizer

    def __str__(self) -> str:
        def gb(n: int) -> str:
            return f"{n / 2**30:.1f}"

        return (
            f"{self.parameters / 1e6:,.1f} M parameters: weights {gb(self.weights)}, gradients {gb(self.gradients)}, "
            f"optimiser {gb(self.optimizer)} GiB, and activations; {gb(self.available)} GiB are there"
        )


def estimate(structure: Structure, stage: Any, accelerator: str = "auto") -> Estimate:
    """Estimate one stage of one model.

    Args:
        structure: what to build.
        stage: the :class:`~bestiary.shared.core.stages.Stage`.
        accelerator: the trainer's.
    """
    with torch.device("meta"):
        model = build_model(structure)
    everything = _bytes(list(model.parameters()) + list(model.buffers()))
    trained = set_trainable(model, stage.trainable) if not stage.prepare else list(model.parameters())
    gradients = _bytes(trained)
    try:
        optimizer = build({**stage.optim, "_partial_": True})([nn.Parameter(torch.zeros(4))])
    except (TypeError, ValueError) as error:  # a learning rate that is no number, a negative weight decay
        raise ConfigError(f"{stage.optim['_target_']}: {error}") from error
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.zeros(4)
    optimizer.step()
    states = sum(
        v.numel() // 4 for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.numel() >= 4
    )
    numbers = sum(p.numel() for p in model.parameters())
    return Estimate(numbers, everything, gradients, gradients * states, available_memory(accelerator))


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def available_memory(accelerator: str) -> int:
    """Free bytes of the device that would be used."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return free_memory()


def refuse_what_cannot_fit(structure: Structure, stage: Any, source: Any, cfg: DictConfig) -> None:
    """Say what a run needs when it is large, and refuse it when it cannot fit.

    Raises:
        ConfigError: with the figures.
    """
    needed = estimate(structure, stage, cfg.trainer.get("accelerator", "auto"))
    if needed.total > needed.available:
        raise ConfigError(f"this cannot fit: {needed}")
    if needed.parameters > 20e6:
        print(f"{needed}", flush=True)
