"""When completions that were cut carry loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.rl.controllers.base import Controller, at_step, check_lengths, check_schedule


class OverlongSchedule(Controller):
    """Masks truncated completions at some steps, or as long as the length limit is short.

    Paper: arXiv:2506.13284 (AceReason 1.1): masking helps with limits of 8K and 16K, is neutral at 24K, and costs
    accuracy at 32K (``up_to: 16384``).

    Args:
        schedule: ``[[step, true or false], …]``; or
        up_to: mask where ``max_new_tokens`` is at most this. Stand it behind the controller that sets the length.

    Raises:
        ConfigError: unless exactly one of the two is given.
    """

    def __init__(self, schedule: Sequence[Sequence[Any]] | None = None, up_to: int | None = None):
        if (schedule is None) == (up_to is None):
            raise ConfigError("OverlongSchedule needs either schedule ([[0, true], [1000, false]]) or up_to (16384)")
        self.schedule = None if schedule is None else check_schedule("OverlongSchedule.schedule", schedule)
        for _, value in self.schedule or []:
            if not isinstance(value, bool):
                raise ConfigError(f"OverlongSchedule.schedule: a value is true or false, not {value!r}")
        if up_to is not None:
            check_lengths("OverlongSchedule.up_to", [up_to])
        self.up_to = up_to
        self._length: int | None = None

    def sampling(self, step: int, sampling: Sampling) -> Sampling:
        """Unchanged; its length is noted."""
        self._length = sampling.max_new_tokens
        return sampling

    def overlong(self, step: int) -> bool | None:
        """Whether truncated completions are masked now."""
        if self.schedule is not None:
            return at_step(self.schedule, step)
        return None if self._length is None or self.up_to is None else self._length <= self.up_to

    def state_dict(self) -> dict[str, Any]:
        """The length that was last seen."""
        return {"length": self._length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self._length = state["length"]
