"""Music Flamingo's three rewards: the form of an answer, its accuracy, and the metadata that a description names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import Verdict, Verifier
from bestiary.shared.rl.rewards.format import Format
from bestiary.shared.rl.rewards.registry import make_verifier

ANSWER: dict[str, Mapping[str, Any]] = {
    "exact_text": {"answer_tag": "answer", "ignore_case": True, "ignore_punctuation": True, "ignore_spaces": True},
    "multiple_choice": {},
    "numeric": {},
    "metadata": {"answer_tag": "answer"},
}
"""What scores the answer, by the verifier that an example names, and its options."""


class FormatAndAnswer:
    """Format plus, for a question, accuracy; for a description, the share of its record that it names.

    An example says by its verifier which of the two it is: ``metadata`` is a description, anything else a question.

    Paper: arXiv:2511.10289 (Music Flamingo), section on GRPO. The weights are not stated; the plain
    sum is the natural reading.

    Args:
        format_weight, answer_weight: of the two parts.
        options: arguments of the verifiers by name, in place of :data:`ANSWER`'s.

    Attributes:
        best: the largest sum, which a right answer has.
    """

    name = "format_and_answer"

    def __init__(
        self,
        format_weight: float = 1.0,
        answer_weight: float = 1.0,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.weights = format_weight, answer_weight
        self.best = format_weight + answer_weight
        self.format = Format(answer="answer")
        self._options = {**ANSWER, **(options or {})}
        self._made: dict[str, Verifier] = {name: make_verifier(name, **self._options[name]) for name in self._options}
        self.version = f"1({format_weight:g},{answer_weight:g})"

    def check(self, example: Example) -> None:
        """Raise BadDataError where an example cannot be scored."""
        if example.get("verifier") not in self._made:
            raise BadDataError(f"example {example.get('id')!r} {self._unknown(example)}")
        check = getattr(self._answer(example), "check", None)
        if callable(check):
            check(example)

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Score both parts; their scores are logged as ``format`` and ``accuracy`` or ``metadata``."""
        if example.get("verifier") not in self._made:
            return Verdict(0.0, "error", note=f"the example {self._unknown(example)}")
        form = self.format.verify(gold, answer, example)
        verdict = self._answer(example).verify(gold, answer, example)
        what = "metadata" if example.get("verifier") == "metadata" else "accuracy"
        parts = {"format": form.score, what: verdict.score, **{f"{what}/{k}": v for k, v in verdict.parts.items()}}
        score = self.weights[0] * form.score + self.weights[1] * verdict.score
        note = "; ".join(note for note in (form.note, verdict.note) if note)
        return Verdict(0.0 if verdict.status == "error" else score, verdict.status, parts, note)

    def gold_answer(self, example: Example) -> str | None:
        """The gold answer after a thought, in its tags."""
        gold = self._answer(example).gold_answer(example) if example.get("verifier") in self._made else None
        if gold is None:
            return None
        inner = gold if gold.startswith("<answer>") else f"<answer>{gold}</answer>"
        return f"<think>thoughts</think>{inner}"

    def close(self) -> None:
        """Close the verifiers."""
        for verifier in self._made.values():
            verifier.close()

    def _answer(self, example: Example) -> Verifier:
        return self._made[str(example.get("verifier"))]

    def _unknown(self, example: Example) -> str:
        return f"names the verifier {example.get('verifier')!r}; format_and_answer has {', '.join(self._made)}"
