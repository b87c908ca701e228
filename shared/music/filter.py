"""What is kept of what was written: by rule against the record, and by a language model as judge.

Paper: arXiv:2511.10289, MF-Skills stage 4: a frontier multimodal model checks captions and questions. Its thresholds
are not public; ours are the constants below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bestiary.shared.music import prompts
from bestiary.shared.music.claims import Claim, claims
from bestiary.shared.music.records import Record
from bestiary.shared.music.write import Complete, Item, ask_json, facts_of
from bestiary.shared.rl.rewards.metadata import plain

KEEP = 7
"""The lowest score of ten at which a judged item is kept: ours."""


def contradictions(item: Item, record: Record) -> list[Claim]:
    """Claims of an item's answer that its record denies.

    An answer is read as the end of its question, so that "What is the tempo?" and "90" are a claim about the tempo.
    """
    if item.task == "caption":
        return [claim for claim in claims(item.answer, record) if not claim.right]
    asked = item.question.rstrip().rstrip("?.!:") + ": "
    found = claims(asked + item.answer, record)
    return [claim for claim in found if not claim.right and claim.start >= len(asked)]


def fault(
    item: Item,
    record: Record,
    judge: Callable[[Item, Record, Sequence[str]], str | None] | None = None,
    captions: Sequence[str] = (),
) -> str | None:
    """Why an item is dropped, or None if it is kept; the judge is asked about what the rules keep."""
    wrong = contradictions(item, record)
    if wrong:
        return f"contradicts {wrong[0].category}"
    if item.task != "caption" and plain(item.answer) in plain(item.question):
        return "the question holds its answer"
    return None if judge is None else judge(item, record, captions)


class Judge:
    """A language model that scores items against the record and the initial captions: all that the writer was told.

    Args:
        complete: the model. keep: the lowest score of ten that passes.
    """

    def __init__(self, complete: Complete, keep: float = KEEP):
        self.complete, self.keep = complete, keep

    def __call__(self, item: Item, record: Record, captions: Sequence[str] = ()) -> str | None:
        """Why the item is dropped, or None."""
        listed = " / ".join(item.options)
        shown = f"{item.question} {listed}\n{item.answer}"
        score = ask_json(self.complete, prompts.JUDGE.format(facts=facts_of(record, captions), item=shown), _score)
        if score is None:
            return "the judge gave no score"
        return None if score >= self.keep else "the judge scored it low"


def _score(value: Any) -> float:
    score = value["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 10:
        raise ValueError("no score")
    return float(score)
