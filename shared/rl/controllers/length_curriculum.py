"""Longest completion by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bestiary.shared.core.protocols import Sampling
from bestiary.shared.rl.controllers.base import Controller, at_step, check_lengths, check_schedule


class LengthCurriculum(Controller):
    """Sets ``max_new_tokens`` by a schedule.

    Paper: arXiv:2505.16400 (AceReason) trains with 8K, then 16K, then 24K; arXiv:2512.13607 (Cascade) gives the steps
    at which it goes on.

    Args:
        schedule: ``[[step, max_new_tokens], …]``, for example ``[[0, 8192], [1200, 16384]]``.
    """

    def __init__(self, schedule: Sequence[Sequence[int]]):
        self.schedule = check_schedule("LengthCurriculum.schedule", schedule)
        check_lengths("LengthCurriculum.schedule", [length for _, length in self.schedule])

    def sampling(self, step: int, sampling: Sampling) -> Sampling:
        """With the length of this step."""
        return replace(sampling, max_new_tokens=at_step(self.schedule, step))
