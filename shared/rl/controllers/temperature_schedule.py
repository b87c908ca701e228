"""Sampling temperature by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bestiary.shared.core.protocols import Sampling
from bestiary.shared.rl.controllers.base import Controller, at_step, check_schedule, check_share


class TemperatureSchedule(Controller):
    """Sets the temperature by a schedule.

    Paper: arXiv:2505.16400 (AceReason) raises it from 0.6 to 1.0 over code RL's second stage; arXiv:2512.13607
    (Cascade) uses 1.0, 1.0 and 0.8 in the stages of math RL.

    Args:
        schedule: ``[[step, temperature], …]``.
        linear: go from each value to the next in a straight line; else a value holds until the next.
    """

    def __init__(self, schedule: Sequence[Sequence[float]], linear: bool = False):
        self.schedule = check_schedule("TemperatureSchedule.schedule", schedule)
        for _, temperature in self.schedule:
            check_share("a temperature of TemperatureSchedule.schedule", temperature, 0.01, 10.0)
        self.linear = linear

    def temperature(self, step: int) -> float:
        """The temperature of a step."""
        following = next(((at, value) for at, value in self.schedule if at > step), None)
        if not self.linear or following is None:
            return float(at_step(self.schedule, step))
        start, value = next(pair for pair in reversed(self.schedule) if pair[0] <= step)
        end, target = following
        return value + (target - value) * (step - start) / (end - start)

    def sampling(self, step: int, sampling: Sampling) -> Sampling:
        """With the temperature of this step."""
        return replace(sampling, temperature=self.temperature(step))
