"""From easy prompts to hard ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.controllers.base import Controller, PassRecord, check_share, known_rate


class GaussianCurriculum(Controller):
    """Plays prompts whose pass rate is near a target that falls linearly over training.

    A candidate is played with the probability exp(−(rate − target)² / 2 width²), 1 at the target, but never less than
    ``floor``. Its rate is that of its last group, so it moves with the policy; before the first it is
    ``meta["pass_rate"]`` where the data has one, and a prompt of which nothing is known is played.

    Paper: arXiv:2512.20848 (Nemotron 3 Nano): within a domain, pass rates are sampled from a Gaussian whose mean falls
    linearly. Differs from paper: its mean, width and the floor are not stated there, and these are ours; it draws
    prompts by their profiled rates, where this accepts or refuses the stream's.

    Args:
        steps: over which the target falls.
        start, end: the target at the first step and from step ``steps`` on.
        width: standard deviation.
        floor: least probability, so that a set without any prompt near the target still yields some.
    """

    def __init__(self, steps: int, start: float = 0.8, end: float = 0.2, width: float = 0.2, floor: float = 0.02):
        for name, value in {"start": start, "end": end, "floor": floor}.items():
            check_share(f"GaussianCurriculum.{name}", value)
        if steps < 1 or not 0 < width < math.inf:
            raise ConfigError(f"GaussianCurriculum: steps={steps} must be 1 or more, and width={width} above 0")
        self.steps, self.start, self.end, self.width, self.floor = steps, start, end, width, floor

    def target(self, step: int) -> float:
        """The pass rate that is wanted at a step."""
        return self.start + (self.end - self.start) * min(max(step / self.steps, 0.0), 1.0)

    def probability(self, step: int, rate: float) -> float:
        """Chance that a prompt of this pass rate is played."""
        return max(self.floor, math.exp(-0.5 * ((rate - self.target(step)) / self.width) ** 2))

    def admit(self, step: int, example: Example, record: PassRecord, rng: np.random.Generator) -> bool:
        """Draw."""
        rate = known_rate(example, record)
        return rate is None or bool(rng.random() < self.probability(step, rate))

    def observe(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The target."""
        return {"controller/target_rate": self.target(step)}
