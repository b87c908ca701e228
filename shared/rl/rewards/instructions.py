"""Instructions on form (lengths, keywords, formats): did the answer keep to them."""

from __future__ import annotations

import inspect
from typing import Any

from bestiary.shared.core.build import nearest
from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import Verdict
from bestiary.shared.rl.rewards.extract import after_think
from bestiary.shared.rl.rewards.instruction_checks import CHECKS


class Instructions:
    """1 if what follows the thoughts keeps to all instructions of ``meta["instructions"]``.

    An instruction is ``{"id": "family:name", "kwargs": {…}}``; the checkers are those of
    :mod:`~bestiary.shared.rl.rewards.instruction_checks`. They are our own, written in the manner of IFEval, and a
    score on them says nothing about a published number. An empty answer keeps to nothing.

    Paper: arXiv:2512.13607 (Nemotron-Cascade), IF-RL: reward 1 or 0 by a verifier of instructions.

    Args:
        share: the score is the share of instructions that are kept.
        max_chars: a longer answer scores 0.
    """

    name = "instructions"
    version = "1"

    def __init__(self, share: bool = False, max_chars: int = 200_000):
        self.share, self.max_chars = share, max_chars

    def check(self, example: Example) -> None:
        """Raise BadDataError for an instruction that is unknown, or has arguments that its checker cannot use."""
        where = f"example {example.get('id')!r}"
        instructions = self._instructions(example)
        if not isinstance(instructions, list) or not instructions:
            raise BadDataError(f'{where} has no meta["instructions"]: a list of {{"id": …, "kwargs": {{…}}}}')
        for instruction in instructions:
            if not isinstance(instruction, dict) or "id" not in instruction:
                raise BadDataError(f'{where}: {instruction!r} is no instruction: {{"id": …, "kwargs": {{…}}}}')
            name, kwargs = instruction["id"], instruction.get("kwargs") or {}
            if name not in CHECKS:
                raise BadDataError(f"{where}: there is no instruction {name!r}{nearest(name, CHECKS)}")
            try:
                inspect.signature(CHECKS[name]).bind("", **kwargs)
                for text in ("", "Some text. [x] *y*"):
                    CHECKS[name](text, **kwargs)
            except (TypeError, ValueError, AttributeError, BadDataError) as error:
                raise BadDataError(f"{where}: instruction {name!r} cannot be checked: {error}") from error

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Check each instruction."""
        text = after_think(answer)
        if len(text) > self.max_chars:
            return Verdict(0.0, note=f"longer than {self.max_chars} characters")
        kept = []
        try:
            instructions = self._instructions(example)
            for instruction in instructions:
                kept.append(CHECKS[instruction["id"]](text, **(instruction.get("kwargs") or {})))
        except Exception as error:  # the instruction is at fault: check() says how
            return Verdict(0.0, "error", note=f"an instruction cannot be checked: {error!r}"[:300])
        if not text.strip() or not kept:
            return Verdict(0.0, note="an empty answer")
        broken = [i["id"] for i, holds in zip(instructions, kept, strict=True) if not holds]
        share = 1 - len(broken) / len(kept)
        return Verdict(
            share if self.share else float(not broken), note=f"broken: {', '.join(broken)}" if broken else ""
        )

    def gold_answer(self, example: Example) -> str | None:
        """The example's answer, where it has one."""
        return example.get("answer") or None

    def close(self) -> None:
        """Nothing to give back."""

    def _instructions(self, example: Example) -> Any:
        return (example.get("meta") or {}).get("instructions")
