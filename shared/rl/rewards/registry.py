"""Verifiers by name, what they have counted, and the test they pass before a run starts."""

from __future__ import annotations

import importlib
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bestiary.shared.core.build import check_arguments, nearest
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import Verdict, Verifier

_HERE = "bestiary.shared.rl.rewards"

VERIFIERS: dict[str, str] = {
    "code": f"{_HERE}.code:Code",
    "combined": f"{_HERE}.combined:Combined",
    "exact_text": f"{_HERE}.text:ExactText",
    "format": f"{_HERE}.format:Format",
    "format_and_answer": f"{_HERE}.format_and_answer:FormatAndAnswer",
    "genrm": f"{_HERE}.pairwise:GenRM",
    "instructions": f"{_HERE}.instructions:Instructions",
    "json_schema": f"{_HERE}.json_schema:JsonSchema",
    "math": f"{_HERE}.math:Math",
    "metadata": f"{_HERE}.metadata:Metadata",
    "multiple_choice": f"{_HERE}.text:MultipleChoice",
    "numeric": f"{_HERE}.text:Numeric",
    "patch": f"{_HERE}.patch:Patch",
    "reasoning_gym": f"{_HERE}.reasoning_gym:ReasoningGym",
}
"""Name to ``module:Class``; a module is imported when its verifier is first made. A project may add its own."""

NONSENSE = "zzz wrong"
"""What no verifier may take for right, if it takes an empty answer for right as well."""


def known() -> list[str]:
    """Names of the verifiers there are."""
    return sorted(VERIFIERS)


def make_verifier(name: str, **options: Any) -> Verifier:
    """A verifier by name.

    Args:
        name: of :data:`VERIFIERS`.
        **options: arguments of its class.

    Raises:
        ConfigError: for an unknown name, or an option that the verifier does not have.
    """
    if name not in VERIFIERS:
        hint = nearest(name, VERIFIERS)
        raise ConfigError(f"there is no verifier {name!r} among {', '.join(known())}{hint}")
    module, _, attribute = VERIFIERS[name].partition(":")
    target = getattr(importlib.import_module(module), attribute)
    check_arguments(target, options, f"verifier {name!r}")
    try:
        return target(**options)
    except TypeError as error:  # an option that is missing
        raise ConfigError(f"verifier {name!r}: {error}") from error


@dataclass
class SelfTest:
    """What :func:`self_test` has looked at, by verifier.

    Attributes:
        tested: examples whose gold answer scored as it must.
        without_gold: examples for which no right answer is known.
    """

    tested: Counter[str] = field(default_factory=Counter)
    without_gold: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        parts = []
        for name in sorted({*self.tested, *self.without_gold}):
            unknown = f" ({self.without_gold[name]} without a gold answer)" if self.without_gold[name] else ""
            parts.append(f"{name} {self.tested[name]}{unknown}")
        return f"verifiers know the gold answers: {', '.join(parts) or 'no example was tested'}"


def self_test(verifiers: Mapping[str, Verifier], examples: Sequence[Example], only: str | None = None) -> SelfTest:
    """Let each example's verifier score the answer that must be right, nothing at all, and nonsense.

    A right answer scores 1, or ``verifier.best`` where a verifier has one (a weighted sum). A verifier with a method
    ``check(example)`` is asked first whether it can score the example at all.

    Args:
        verifiers: by the names that examples use.
        examples: some of what will be trained on.
        only: the verifier of all examples, whatever they name; None takes each example's.

    Raises:
        ConfigError: if a gold answer does not score as it must, or both an empty answer and nonsense score as well as
            a right one, or an example names no verifier, or one that is not there.
        BadDataError: from a verifier's ``check``.
    """
    report = SelfTest()
    for example in examples:
        where, name = f"example {example.get('id')!r}", only or example.get("verifier")
        if name is None:
            raise ConfigError(f"{where} names no verifier, so nothing can score its answers")
        if name not in verifiers:
            hint = nearest(name, verifiers)
            raise ConfigError(f"{where}: there is no verifier {name!r} among {', '.join(verifiers)}{hint}")
        verifier: Any = verifiers[name]
        if callable(getattr(verifier, "check", None)):
            verifier.check(example)
        best, answer = getattr(verifier, "best", 1.0), example.get("answer", "")
        gold = verifier.gold_answer(example)
        if gold is None:
            report.without_gold[name] += 1
        else:
            verdict = verifier.verify(answer, gold, example)
            if verdict.status != "ok" or verdict.score != best:
                raise ConfigError(
                    f"{where}: verifier {name!r} gives its own gold answer {verdict.score:g}, not {best:g} "
                    f"(status {verdict.status}; {verdict.note or 'no note'}). The answer: {gold[:200]!r}"
                )
            report.tested[name] += 1
        if all(_is_right(verifier.verify(answer, text, example), best) for text in ("", NONSENSE)):
            raise ConfigError(
                f"{where}: verifier {name!r} takes both an empty answer and {NONSENSE!r} for right; it would reward "
                "anything. Leave such examples out, or use another verifier"
            )
    return report


def _is_right(verdict: Verdict, best: float) -> bool:
    return verdict.status == "ok" and verdict.score >= best


class VerifierCounters:
    """How often each verifier was asked, ran out of time, and failed. Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def count(self, name: str, verdict: Verdict) -> None:
        """Count one verdict."""
        kind = {"timeout": "timeout", "error": "error"}.get(verdict.status)
        with self._lock:
            for key in ("calls", "timeout", "error"):
                self._counts[f"verifier/{name}/{key}"] += key in ("calls", kind)

    def snapshot(self) -> dict[str, int]:
        """``verifier/NAME/calls``, ``…/timeout`` and ``…/error`` since the start."""
        with self._lock:
            return dict(self._counts)
