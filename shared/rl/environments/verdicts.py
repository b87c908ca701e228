"""The verifiers of an environment: made when first asked for, counted, and kept from raising."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from bestiary.shared.core.errors import ConfigError, UserError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import Verdict, Verifier
from bestiary.shared.rl.rewards.registry import VERIFIERS, VerifierCounters, make_verifier, self_test


class Verifiers:
    """Scores answers with the verifier that an example names, or with one for all. Safe to use from many threads.

    Args:
        verifier: one for all examples, built or by name; None looks at ``example["verifier"]``.
        options: arguments of the verifiers that are made here, by name.

    Raises:
        ConfigError: for options of a verifier that is not there.
    """

    def __init__(self, verifier: Verifier | str | None = None, options: Mapping[str, Mapping[str, Any]] | None = None):
        self._options = {name: dict(values) for name, values in (options or {}).items()}
        self._made: dict[str, Verifier] = {}
        self._lock = threading.Lock()
        self._counters = VerifierCounters()
        self._only: str | None = None
        for name in self._options:
            if name not in VERIFIERS:
                make_verifier(name)  # its message names the nearest
        if isinstance(verifier, str):
            self._only = verifier
            self._get(verifier)
        elif verifier is not None:
            self._only = verifier.name
            self._made[verifier.name] = verifier

    def verify(self, example: Example, text: str) -> Verdict:
        """Score an answer; a verifier that raises or gives no finite score is an error of the harness.

        Raises:
            ConfigError: if the example names no verifier, or one that is not there.
        """
        name = self._name(example)
        verifier = self._get(name)
        try:
            verdict = verifier.verify(example.get("answer", ""), text, example)
            if not math.isfinite(verdict.score):
                verdict = Verdict(0.0, "error", note=f"verifier {name} returned {verdict.score!r}")
        except UserError:
            raise
        except Exception as error:
            verdict = Verdict(0.0, "error", note=f"verifier {name} raised {error!r}"[:300])
        self._counters.count(name, verdict)
        return verdict

    def self_test(self, examples: Sequence[Example]) -> str:
        """Test the verifiers on these examples (:func:`~bestiary.shared.rl.rewards.registry.self_test`)."""
        names = {self._name(example) for example in examples}
        return str(self_test({name: self._get(name) for name in names}, examples, self._only))

    def describe(self) -> str:
        """Which verifiers there are."""
        known = ", ".join(f"{n} {v.version}" for n, v in sorted(self._made.items()))
        return known or "the verifier that each example names"

    def counters(self) -> dict[str, float]:
        """What was counted since the start."""
        return {name: float(count) for name, count in self._counters.snapshot().items()}

    def close(self) -> None:
        """Close the verifiers; one that is asked again is made again."""
        with self._lock:
            made, self._made = self._made, {}
        for verifier in made.values():
            verifier.close()
        # One that was handed over cannot be made again here.
        if self._only in made and self._only not in VERIFIERS:
            self._made[self._only] = made[self._only]

    def _name(self, example: Example) -> str:
        name = self._only or example.get("verifier")
        if name is None:
            raise ConfigError(
                f"example {example.get('id')!r} names no verifier, so nothing can score its answers: give the data set "
                "one, or the environment (environment.verifier=…)"
            )
        return name

    def _get(self, name: str) -> Verifier:
        with self._lock:
            if name not in self._made:
                self._made[name] = make_verifier(name, **self._options.get(name, {}))
            return self._made[name]
