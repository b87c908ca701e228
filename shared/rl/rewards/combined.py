"""A weighted sum of verifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import Verdict, Verifier
from bestiary.shared.rl.rewards.registry import make_verifier


class Combined:
    """The weighted sum of several verifiers' scores; each is logged by its name.

    A part whose harness failed makes the whole an error; one that ran out of time makes it a timeout, with the sum.

    Args:
        parts: name to ``{verifier: NAME, weight: 1.0, …}``; all else are options of that verifier.

    Attributes:
        best: the largest sum, which a right answer has.

    Raises:
        ConfigError: without parts, or for a part that names no verifier.
    """

    name = "combined"

    def __init__(self, parts: Mapping[str, Mapping[str, Any]]):
        if not parts:
            raise ConfigError("verifier 'combined' needs parts: {NAME: {verifier: …, weight: …}}")
        self.parts: dict[str, tuple[Verifier, float]] = {}
        for name, options in parts.items():
            options = dict(options)
            if "verifier" not in options:
                raise ConfigError(f"verifier 'combined': part {name!r} names no verifier: {{verifier: …, weight: …}}")
            weight = float(options.pop("weight", 1.0))
            self.parts[name] = make_verifier(options.pop("verifier"), **options), weight
        self.version = "1(" + ",".join(f"{w:g}*{v.name}/{v.version}" for v, w in self.parts.values()) + ")"
        self.best = sum(weight * getattr(verifier, "best", 1.0) for verifier, weight in self.parts.values())

    def check(self, example: Example) -> None:
        """Each part's own check."""
        for verifier, _ in self.parts.values():
            check = getattr(verifier, "check", None)
            if callable(check):
                check(example)

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Ask each part."""
        verdicts = {name: verifier.verify(gold, answer, example) for name, (verifier, _) in self.parts.items()}
        statuses = {verdict.status for verdict in verdicts.values()}
        score = sum(self.parts[name][1] * verdict.score for name, verdict in verdicts.items())
        notes = "; ".join(f"{name}: {verdict.note}" for name, verdict in verdicts.items() if verdict.note)
        parts = {name: verdict.score for name, verdict in verdicts.items()}
        if "error" in statuses:
            return Verdict(0.0, "error", parts, notes)
        return Verdict(score, "timeout" if "timeout" in statuses else "ok", parts, notes)

    def gold_answer(self, example: Example) -> str | None:
        """The first part's right answer that satisfies all parts; where none does, the first there is."""
        golds = [verifier.gold_answer(example) for verifier, _ in self.parts.values()]
        golds = [gold for gold in golds if gold is not None]
        for gold in golds:
            if self.verify(example.get("answer", ""), gold, example).score == self.best:
                return gold
        return golds[0] if golds else None

    def close(self) -> None:
        """Close each part."""
        for verifier, _ in self.parts.values():
            verifier.close()
