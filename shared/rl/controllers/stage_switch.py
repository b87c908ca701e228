"""Longest completion by how many are cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.rl.controllers.base import Controller, check_lengths, check_share


class StageSwitch(Controller):
    """Goes to the next ``max_new_tokens`` when the policy has learned to stay within the one it has.

    It has when the share of truncated completions, averaged over the last ``window`` steps, is at most ``share``.

    Paper: arXiv:2512.13607 (Cascade): a length is left when about 10 % of completions are still truncated. The window
    and the least number of steps are not in the paper.

    Args:
        lengths: ``max_new_tokens`` of the stages, in order.
        share: truncated share at which a stage ends.
        window: steps of the moving mean; a new stage begins with an empty one.
        min_steps: a stage is not left before so many steps.
    """

    def __init__(self, lengths: Sequence[int], share: float = 0.1, window: int = 20, min_steps: int = 100):
        if isinstance(lengths, str) or not lengths:
            raise ConfigError(f"StageSwitch.lengths is a list like [24576, 32768], not {lengths!r}")
        check_lengths("StageSwitch.lengths", lengths)
        check_share("StageSwitch.share", share)
        if window < 1 or min_steps < 0:
            raise ConfigError(f"StageSwitch: window={window} must be 1 or more, and min_steps={min_steps} not negative")
        self.lengths, self.share, self.window, self.min_steps = list(lengths), share, window, min_steps
        self.stage, self.steps = 0, 0
        self._shares: list[float] = []

    def sampling(self, step: int, sampling: Sampling) -> Sampling:
        """With the length of the stage."""
        return replace(sampling, max_new_tokens=self.lengths[self.stage])

    def observe(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Count the step, and go on to the next length where it is time to."""
        log = {"controller/length_stage": float(self.stage)}
        share = metrics.get("truncated_share")
        if share is None or not math.isfinite(share):
            return log
        self.steps += 1
        self._shares = [*self._shares, float(share)][-self.window :]
        mean = sum(self._shares) / len(self._shares)
        enough = len(self._shares) == self.window and self.steps >= self.min_steps
        if enough and mean <= self.share and self.stage + 1 < len(self.lengths):
            self.stage, self.steps, self._shares = self.stage + 1, 0, []
        return {**log, "controller/truncated_mean": mean}

    def state_dict(self) -> dict[str, Any]:
        """Stage, its steps, and the shares of the window."""
        return {"stage": self.stage, "steps": self.steps, "shares": list(self._shares)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse; a list of lengths that was made shorter ends at its last."""
        self.stage = min(int(state["stage"]), len(self.lengths) - 1)
        self.steps, self._shares = int(state["steps"]), [float(share) for share in state["shares"]]
