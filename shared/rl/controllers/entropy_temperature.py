"""Sampling temperature by the entropy of what is sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.rl.controllers.base import Controller, check_share


class EntropyTemperature(Controller):
    """Keeps the temperature-adjusted entropy near a target.

    After each step log T grows by ``rate`` times what the entropy lacks (an integral controller), within bounds:
    T ← T · exp(rate · (target − H_T)). It begins with the sampling's own temperature. The entropy H_T is that of the
    distribution that was sampled from, in nats a token, averaged over the step's tokens (``adjusted_entropy``).

    Paper: arXiv:2506.13284 (AceReason 1.1): a temperature with an adjusted entropy of about 0.3 balances exploring and
    exploiting. Differs from paper: there T is chosen once a stage by hand; that a controller follows it is ours.

    Args:
        target: nats a token.
        rate: change of log T a step and nat. With 0.1, an entropy that lacks 0.1 raises T by 1 %.
        low, high: bounds of the temperature.
    """

    def __init__(self, target: float = 0.3, rate: float = 0.1, low: float = 0.6, high: float = 1.2):
        check_share("EntropyTemperature.target", target, 0.0, 100.0)
        check_share("EntropyTemperature.rate", rate, 0.0, 10.0)
        if not 0 < low <= high < math.inf:
            raise ConfigError(f"EntropyTemperature: bounds must be 0 < low <= high, not low={low}, high={high}")
        self.target, self.rate, self.low, self.high = target, rate, low, high
        self._log_t: float | None = None

    @property
    def temperature(self) -> float | None:
        """The temperature of the next step; None before the first."""
        return None if self._log_t is None else math.exp(self._log_t)

    def sampling(self, step: int, sampling: Sampling) -> Sampling:
        """With the temperature that was found."""
        if self._log_t is None:
            self._log_t = self._bounded(math.log(max(sampling.temperature, self.low)))
        return replace(sampling, temperature=math.exp(self._log_t))

    def observe(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Move the temperature; an entropy that is missing or not finite leaves it."""
        entropy = metrics.get("adjusted_entropy", math.nan)
        if self._log_t is not None and math.isfinite(entropy):
            self._log_t = self._bounded(self._log_t + self.rate * (self.target - entropy))
        return {} if self._log_t is None else {"controller/next_temperature": math.exp(self._log_t)}

    def _bounded(self, value: float) -> float:
        return min(max(value, math.log(self.low)), math.log(self.high))

    def state_dict(self) -> dict[str, Any]:
        """The logarithm of the temperature."""
        return {"log_temperature": self._log_t}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        value = state["log_temperature"]
        self._log_t = None if value is None else self._bounded(float(value))
