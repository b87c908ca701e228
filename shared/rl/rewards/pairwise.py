"""Rewards from comparisons in a circle, a judge for dry runs, and the reward that trains a judge."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import ScoredRow, Verdict
from bestiary.shared.rl.rewards.extract import after_think, last_fence
from bestiary.shared.rl.rewards.text import gold_of


class Judge(Protocol):
    """Compares two answers. Deterministic, if runs are to be repeatable."""

    def __call__(self, a: str, b: str, example: Example) -> tuple[float, float, float]:
        """Score of a and of b (helpfulness, 1 to 5), and a rank: 1, a is far better, to 6, b is far better."""
        ...


class LengthJudge:
    """A judge for tests and dry runs: the closer to a number of words, the better.

    Args:
        words: the best length.
    """

    def __init__(self, words: int = 50):
        self.words = words

    def __call__(self, a: str, b: str, example: Example) -> tuple[float, float, float]:
        """Scores fall by one for each quarter of ``words`` that an answer is off; the rank follows their difference."""
        one, two = (max(1, 5 - abs(len(text.split()) - self.words) * 4 // self.words) for text in (a, b))
        return float(one), float(two), 3.5 - (one - two) * 2.5 / 4


class CircularComparison:
    """Replaces rewards by what a judge says when each completion meets the next one of its group.

    Completion i meets i + 1, the last one the first: N comparisons in place of N(N − 1)/2. Each is judged in both
    orders, and the two are averaged. Where the two scores are equal, the rank s_r parts them: s_i += 3.5 − s_r,
    s_j += s_r − 3.5. A reward is the mean over a completion's two comparisons. The judge sees what follows the
    thoughts. Masked rows stay out of the circle; a row that is left alone keeps its reward; one whose comparisons all
    failed (the judge raised, or gave no finite numbers) is masked.

    Paper: arXiv:2512.20848 (Nemotron 3 Nano), RLHF with GenRM.

    Args:
        judge: compares two answers.
        think_tag: name of the tag of the thoughts.
    """

    def __init__(self, judge: Judge, think_tag: str = "think"):
        self.judge, self.think_tag = judge, think_tag

    def __call__(self, rewards: torch.Tensor, groups: Sequence[Sequence[ScoredRow]]) -> torch.Tensor:
        """New rewards (P, G)."""
        out = rewards.clone()
        for number, group in enumerate(groups):
            circle = [i for i in range(len(group)) if not bool(rewards[number, i].isnan())]
            if len(circle) < 2:
                continue
            scores: dict[int, list[float]] = {i: [] for i in circle}
            for i, j in zip(circle, circle[1:] + circle[:1], strict=True):
                match = self._match(group[i], group[j])
                if match is not None:
                    scores[i].append(match[0])
                    scores[j].append(match[1])
            for i, found in scores.items():
                out[number, i] = sum(found) / len(found) if found else math.nan
        return out

    def _match(self, one: ScoredRow, two: ScoredRow) -> tuple[float, float] | None:
        a, b = after_think(one.text, self.think_tag), after_think(two.text, self.think_tag)
        try:
            forth = untie(*self.judge(a, b, one.example))
            back = untie(*self.judge(b, a, one.example))
            means = (forth[0] + back[1]) / 2, (forth[1] + back[0]) / 2
        except Exception:  # a judge is part of the harness: what it does wrong is no answer's fault
            return None
        return means if all(math.isfinite(mean) for mean in means) else None


def untie(score_i: float, score_j: float, rank: float) -> tuple[float, float]:
    """The two scores, parted by the rank (1 to 6) where they are equal."""
    if score_i != score_j:
        return score_i, score_j
    return score_i + 3.5 - rank, score_j + rank - 3.5


class GenRM:
    """The reward of a completion that judges two answers: how far its numbers are from the gold ones.

    −10 for bad format, else −|p1 − g1| − |p2 − g2| − |p_rank − g_rank|: 0 is the best. The completion ends with JSON,
    fenced or bare: ``{"score_1": 4, "score_2": 2, "rank": 2}``, with scores of 1 to 5 and a rank of 1 to 6; so does the
    gold answer. Whole numbers are asked for.

    Paper: arXiv:2512.20848 (Nemotron 3 Nano), training of the GenRM. Differs from paper: the format is ours.

    Attributes:
        best: what a right answer scores.
    """

    name = "genrm"
    version = "1"
    best = 0.0

    def check(self, example: Example) -> None:
        """Raise BadDataError where the gold answer is not of this form."""
        if read_judgement(gold_of(example)) is None:
            raise BadDataError(
                f'example {example.get("id")!r}: its answer is not {{"score_1": 1–5, "score_2": 1–5, "rank": 1–6}}'
            )

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Compare the numbers."""
        wanted, found = read_judgement(gold), read_judgement(answer)
        if wanted is None:
            return Verdict(0.0, "error", note="the gold answer is no judgement")
        if found is None:
            return Verdict(-10.0, parts={"bad_format": 1.0}, note="bad format")
        off = [abs(f - w) for f, w in zip(found, wanted, strict=True)]
        return Verdict(
            0.0 - sum(off), parts={"bad_format": 0.0, "score_1": -off[0], "score_2": -off[1], "rank": -off[2]}
        )

    def gold_answer(self, example: Example) -> str | None:
        """The gold judgement."""
        return example.get("answer")

    def close(self) -> None:
        """Nothing to give back."""


def read_judgement(text: str) -> tuple[int, int, int] | None:
    """Two scores and a rank, from the last JSON object of a text; None where they are not there or out of range."""
    text = after_think(text)
    body = last_fence(text, ("json",))
    if body is None:
        start = text.rfind("{")
        body = text[start : text.rfind("}") + 1] if start >= 0 else ""
    if len(body) > 1000:
        return None
    try:
        found: Any = json.loads(body)
        numbers = found["score_1"], found["score_2"], found["rank"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not all(type(n) is int and 1 <= n <= top for n, top in zip(numbers, (5, 5, 6), strict=True)):
        return None
    return numbers
