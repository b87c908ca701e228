"""What is known of each prompt: its last pass rate, how often it was played, and when."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bestiary.shared.rl.controllers.base import PassRecord

UNKNOWN = PassRecord()


class PassRates:
    """Prompt id to :class:`PassRecord`.

    Args:
        capacity: prompts that are remembered; beyond it those played longest ago are forgotten.
    """

    def __init__(self, capacity: int = 1_000_000):
        self.capacity = capacity
        self._records: dict[str, PassRecord] = {}  # the one played last stands last

    def __len__(self) -> int:
        return len(self._records)

    def get(self, name: str) -> PassRecord:
        """What is known of a prompt."""
        return self._records.get(name, UNKNOWN)

    def update(self, ids: Sequence[str], rates: Sequence[float], step: int = 0) -> None:
        """Take the rates of a step.

        Args:
            ids: of the prompts; one that comes twice gets the mean of its rates, and counts as played twice.
            rates: of their groups. NaN (nothing was scored) leaves what was known before.
            step: of the stage.
        """
        found: dict[str, list[float]] = {}
        for name, rate in zip(ids, rates, strict=True):
            if not math.isnan(rate):
                found.setdefault(name, []).append(float(rate))
        for name, values in found.items():
            seen = self.get(name).seen + len(values)
            self._records.pop(name, None)
            self._records[name] = PassRecord(sum(values) / len(values), seen, step)
        while len(self._records) > self.capacity:
            del self._records[next(iter(self._records))]

    def state_dict(self) -> dict[str, Any]:
        """Plain lists by id, in the order in which they would be forgotten."""
        return {"records": {name: [r.rate, r.seen, r.step] for name, r in self._records.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._records = {name: PassRecord(*values) for name, values in state["records"].items()}
