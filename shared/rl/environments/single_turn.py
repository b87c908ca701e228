"""One prompt, one answer, one verdict: the environment of a trainer that is given none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bestiary.shared.core.examples import Example
from bestiary.shared.rl.environments.verdicts import Verifiers
from bestiary.shared.rl.protocols import Turn, Verdict, Verifier


class SingleTurn:
    """Asks a verifier once.

    Args:
        verifier: for all examples, built or by name; None takes the one that each example names.
        options: arguments of the verifiers by name, for example ``{math: {workers: 4}}``.
    """

    name = "single_turn"
    version = "1"
    max_turns = 1

    def __init__(self, verifier: Verifier | str | None = None, options: Mapping[str, Mapping[str, Any]] | None = None):
        self.verifiers = Verifiers(verifier, options)

    def prompt(self, example: Example) -> Example:
        """The example as it is."""
        return example

    def reset(self, example: Example, seed: int) -> SingleAnswer:
        """There is no world, so the seed changes nothing."""
        return SingleAnswer(self.verifiers, example)

    def self_test(self, examples: Sequence[Example]) -> str:
        """Test the verifiers on these examples."""
        return self.verifiers.self_test(examples)

    def describe(self) -> str:
        """One line for the log."""
        return f"{self.name}: one answer, scored by {self.verifiers.describe()}"

    def counters(self) -> dict[str, float]:
        """What the verifiers have counted since the start."""
        return self.verifiers.counters()

    def close(self) -> None:
        """Close the verifiers."""
        self.verifiers.close()


class SingleAnswer:
    """An episode that ends with its first turn."""

    def __init__(self, verifiers: Verifiers, example: Example):
        self._verifiers, self._example = verifiers, example

    def step(self, text: str) -> Turn:
        """Done."""
        return Turn()

    def verify(self, text: str) -> Verdict:
        """Ask the verifier."""
        return self._verifiers.verify(self._example, text)

    def close(self) -> None:
        """There is nothing to give back."""
