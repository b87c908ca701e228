"""Learning-rate schedules: (step, steps) to the factor on the learning rate.

They are pure functions, so resuming needs none of their state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


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
    """Linear warm-up, a plateau, then a straight line to ``final`` over the last ``decay`` share of the steps."""

    warmup: int = 0
    decay: float = 0.2
    final: float = 0.0

    def __call__(self, step: int, steps: int) -> float:
        start = steps * (1 - self.decay)
        if step < start:
            return _warm(step, self.warmup)
        return 1 + (self.final - 1) * min((step - start) / max(steps - start, 1), 1.0)


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0
