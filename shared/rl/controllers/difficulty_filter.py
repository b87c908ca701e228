"""Drops prompts that are too hard or too easy, but for a few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.controllers.base import Controller, PassRecord, check_share, known_rate


class DifficultyFilter(Controller):
    """A prompt that no completion or every completion solved the last time teaches nothing: it is seldom played again.

    It is looked at when it comes up again, so in a stream that is reshuffled each time round this is the filter after
    every epoch, with a new chance for a dropped prompt in each. A prompt that was never played is judged by
    ``meta["pass_rate"]`` where its data has one, and else played.

    Paper: arXiv:2512.13607 (Cascade): drop 0 % and 100 % after every epoch, re-admit the hard with 10 % and the easy
    with 1 %. arXiv:2505.16400 (AceReason): in the later stages keep what is solved at most 6 times of 16
    (``max_rate: 0.375, min_rate: 0``).

    Args:
        readmit_hard, readmit_easy: probability that a dropped prompt is played all the same.
        min_rate: lowest pass rate that is kept; None keeps all above 0.
        max_rate: highest pass rate that is kept; None keeps all below 1.

    Raises:
        ConfigError: for shares that are none, or a band that is empty.
    """

    def __init__(
        self,
        readmit_hard: float = 0.1,
        readmit_easy: float = 0.01,
        min_rate: float | None = None,
        max_rate: float | None = None,
    ):
        shares = {"readmit_hard": readmit_hard, "readmit_easy": readmit_easy, "min_rate": min_rate or 0.0}
        for name, value in {**shares, "max_rate": 1.0 if max_rate is None else max_rate}.items():
            check_share(f"DifficultyFilter.{name}", value)
        if min_rate is not None and max_rate is not None and min_rate > max_rate:
            raise ConfigError(f"DifficultyFilter keeps nothing: min_rate={min_rate} is above max_rate={max_rate}")
        self.readmit_hard, self.readmit_easy = readmit_hard, readmit_easy
        self.min_rate, self.max_rate = min_rate, max_rate
        self._counts = {"hard": 0, "easy": 0, "readmitted": 0}

    def admit(self, step: int, example: Example, record: PassRecord, rng: np.random.Generator) -> bool:
        """Whether the prompt's last pass rate is within the band, or chance lets it in."""
        kind = self._kind(known_rate(example, record))
        if kind is None:
            return True
        let_in = bool(rng.random() < (self.readmit_hard if kind == "hard" else self.readmit_easy))
        self._counts["readmitted" if let_in else kind] += 1
        return let_in

    def _kind(self, rate: float | None) -> str | None:
        if rate is None:
            return None
        if rate <= 0 if self.min_rate is None else rate < self.min_rate:
            return "hard"
        if rate >= 1 if self.max_rate is None else rate > self.max_rate:
            return "easy"
        return None

    def observe(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """How many candidates of this step were dropped and why, and how many came back."""
        out = {f"controller/{name}_prompts": float(count) for name, count in self._counts.items()}
        self._counts = dict.fromkeys(self._counts, 0)
        return out

    def state_dict(self) -> dict[str, Any]:
        """Counts since the last step; pass rates are kept by the trainer."""
        return {"counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self._counts = {name: int(state["counts"].get(name, 0)) for name in self._counts}
