"""What the trainer asks of a controller, with answers that change nothing, and schedules by step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.core.protocols import Sampling

T = TypeVar("T")


@dataclass(frozen=True)
class PassRecord:
    """What is known of a prompt.

    Attributes:
        rate: mean score of its last group, 0 to 1; None where it was never played.
        seen: how often it was played. step: when it last was.
    """

    rate: float | None = None
    seen: int = 0
    step: int = 0


class Controller:
    """Changes nothing. A controller overrides what it has an opinion on.

    A step asks, in this order: ``sampling``, each controller changing what the one before returned; ``admit`` for each
    candidate prompt, which is played if all controllers say yes; ``overlong``, where the last opinion holds; and
    ``observe`` when the step's rollouts are known. All processes ask alike, so answers follow from the arguments and
    the state alone.
    """

    def sampling(self, step: int, sampling: Sampling) -> Sampling:
        """How this step's completions are drawn."""
        return sampling

    def admit(self, step: int, example: Example, record: PassRecord, rng: np.random.Generator) -> bool:
        """Whether a candidate prompt is played.

        Args:
            step: of the stage.
            example: the candidate.
            record: what is known of it.
            rng: the candidate's own; the same on all processes.
        """
        return True

    def overlong(self, step: int) -> bool | None:
        """Whether completions that were cut carry no loss (true), or count as they scored; None: no opinion."""
        return None

    def observe(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Take note of a step's numbers, those of all processes; returns what is to be logged."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the next answers depend on, as JSON-able data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""


def known_rate(example: Example, record: PassRecord) -> float | None:
    """The pass rate of a prompt: its last, or else ``meta["pass_rate"]`` of its data, or None."""
    rate: Any = record.rate if record.rate is not None else example.get("meta", {}).get("pass_rate")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not math.isfinite(rate):
        return None
    return float(rate)


def check_schedule(name: str, schedule: Sequence[Sequence[Any]]) -> list[tuple[int, Any]]:
    """A schedule ``[[step, value], …]`` as pairs.

    Raises:
        ConfigError: if it is none, does not begin at step 0, or its steps do not rise.
    """
    wanted = f"{name} is a list of [step, value] whose steps rise from 0, like [[0, 8192], [1000, 16384]]"
    if isinstance(schedule, str) or not isinstance(schedule, Sequence) or not schedule:
        raise ConfigError(f"{wanted}, not {schedule!r}")
    pairs: list[tuple[int, Any]] = []
    for pair in schedule:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 or not _is_int(pair[0]):
            raise ConfigError(f"{wanted}; {pair!r} is no such pair")
        pairs.append((pair[0], pair[1]))
    steps = [step for step, _ in pairs]
    if steps[0] != 0 or any(a >= b for a, b in itertools.pairwise(steps)):
        raise ConfigError(f"{wanted}; these steps are {steps}")
    return pairs


def at_step(schedule: Sequence[tuple[int, T]], step: int) -> T:
    """The value that holds at a step: that of the last pair whose step is not later."""
    return next(value for start, value in reversed(schedule) if start <= step)


def check_lengths(name: str, lengths: Sequence[Any]) -> None:
    """Raise ConfigError where a length is no whole number of tokens above 0."""
    bad = [length for length in lengths if not _is_int(length) or length < 1]
    if bad:
        raise ConfigError(f"{name}: a length is a whole number of tokens, 1 or more, not {bad[0]!r}")


def check_share(name: str, value: Any, low: float = 0.0, high: float = 1.0) -> None:
    """Raise ConfigError where a value is no number between two others."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} is a number from {low:g} to {high:g}, not {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
