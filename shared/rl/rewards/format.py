"""Does a completion have the form that was asked for: thoughts, then an answer."""

from __future__ import annotations

from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import Verdict


class Format:
    """1 if a completion is ``<think>…</think>`` and then an answer that is not empty, with each tag exactly once.

    White space before, between and after does not count. What stands inside the thoughts is free; they may be empty.

    Paper: arXiv:2511.10289 (Music Flamingo): the format reward, with both pairs of tags.

    Args:
        think: name of the tag of the thoughts.
        answer: name of a tag that must hold the whole answer, or None where the answer is bare.
        opened_in_prompt: the prompt ends with ``<think>``, so that the completion begins inside the thoughts.
    """

    name = "format"
    version = "1"

    def __init__(self, think: str = "think", answer: str | None = None, opened_in_prompt: bool = False):
        self.think, self.answer, self.opened_in_prompt = think, answer, opened_in_prompt

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Look at the tags."""
        problem = self._problem(answer)
        return Verdict(float(not problem), note=problem)

    def gold_answer(self, example: Example) -> str | None:
        """The gold answer (or a stand-in for one) in its tags."""
        gold = example.get("answer") or "an answer"
        body = gold if self.answer is None else f"<{self.answer}>{gold}</{self.answer}>"
        return f"{'' if self.opened_in_prompt else f'<{self.think}>'}thoughts</{self.think}>{body}"

    def close(self) -> None:
        """Nothing to give back."""

    def _problem(self, text: str) -> str:
        opening, closing = f"<{self.think}>", f"</{self.think}>"
        if text.count(opening) != (0 if self.opened_in_prompt else 1) or text.count(closing) != 1:
            return f"not exactly one {opening}…{closing}"
        if not self.opened_in_prompt and not text.lstrip().startswith(opening):
            return f"it does not begin with {opening}"
        body = text[text.index(closing) + len(closing) :].strip()
        if self.answer is not None:
            opening, closing = f"<{self.answer}>", f"</{self.answer}>"
            if text.count(opening) != 1 or text.count(closing) != 1:
                return f"not exactly one {opening}…{closing}"
            if not (body.startswith(opening) and body.endswith(closing)):
                return f"the answer does not lie in {opening}…{closing} alone"
            body = body[len(opening) : -len(closing)].strip()
        return "" if body else "the answer is empty"
