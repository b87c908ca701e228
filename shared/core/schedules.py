"""Learning-rate schedules: (step, steps) to the factor on the learning rate.

They are pure functions, so resuming needs none of their state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bestiary.shared.core.errors import ConfigError


@dataclass(frozen=True)
class Constant:
    """Linear warm-up over ``warmup`` steps, then 1."""

    warmup: int = 0

    def __call__(self, step: int, steps: int) -> float:
        return _warm(step, self.warmup)


@dataclass(frozen=True)
class Poly:
    """(1 - step/steps)^power, nnU-Net's decay with ``every`` steps between changes (250: once an epoch of nnU-Net)."""

    power: float = 0.9
    every: int = 1
    warmup: int = 0

    def __call__(self, step: int, steps: int) -> float:
        at = step // self.every * self.every
        return _warm(step, self.warmup) * (1 - at / max(steps, 1)) ** self.power


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine down to ``final`` times the peak."""

    warmup: int = 0
    final: float = 0.0

    def __call__(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return _warm(step, self.warmup)
        done = (step - self.warmup) / max(steps - self.warmup, 1)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, a plateau, then a fall to ``final`` over the last ``decay`` share of the steps.

    With x running from 0 to 1 over the decay, the factor is ``final + (1 - final) * (1 - x)`` for ``linear`` and
    ``final + (1 - final) * (1 - sqrt(x))`` for ``minus_sqrt``, which falls fast at first and slowly at the end.
    Paper: arXiv:2405.18392 (Sec. 3, the 1-sqrt decay).

    Raises:
        ConfigError: for another shape.
    """

    warmup: int = 0
    decay: float = 0.2
    final: float = 0.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.shape not in ("linear", "minus_sqrt"):
            raise ConfigError(f"schedule.shape is linear or minus_sqrt, not {self.shape!r}")

    def __call__(self, step: int, steps: int) -> float:
        start = steps * (1 - self.decay)
        if step < start:
            return _warm(step, self.warmup)
        done = min((step - start) / max(steps - start, 1), 1.0)
        left = 1 - (math.sqrt(done) if self.shape == "minus_sqrt" else done)
        return self.final + (1 - self.final) * left


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
