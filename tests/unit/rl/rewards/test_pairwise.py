"""Comparisons in a circle, and the reward that trains a judge, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.rl.rewards.pairwise import CircularComparison, GenRM, LengthJudge, untie

NAN = math.nan


def step(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_ties_are_parted_by_the_rank():
    assert untie(4, 2, 1) == (4, 2)
    assert untie(3, 3, 1) == (5.5, 0.5)
    assert untie(3, 3, 6) == (0.5, 5.5)
    assert untie(3, 3, 3.5) == (3, 3)


class Table:
    """Scores by text; ranks by the difference; notes whom it was asked about."""

    def __init__(self, scores, bias=0.0):
        self.scores, self.bias, self.asked = scores, bias, []

    def __call__(self, a, b, example):
        self.asked.append(a + b)
        one, two = self.scores[a] + self.bias, self.scores[b]
        return one, two, 2 if a < b else 5


def test_a_circle_of_three(scored_rows):
    """a–b and c–a are decided. b–c is a tie of 2: in both orders b ranks better (1.5 ahead)."""
    judge = Table({"a": 5, "b": 2, "c": 2})
    found = CircularComparison(judge)(step([0, 0, 0]), scored_rows([["a", "b", "<think>t</think>c"]]))
    assert judge.asked == ["ab", "ba", "bc", "cb", "ca", "ac"]
    assert found.tolist() == [[5, (2 + 3.5) / 2, (0.5 + 2) / 2]]


def test_both_orders_take_out_a_bias_for_the_first(scored_rows):
    found = CircularComparison(Table({"a": 4, "b": 2}, bias=1.0))(step([0, 0]), scored_rows([["a", "b"]]))
    assert found.tolist() == [[4.5, 2.5]]


def test_masked_rows_stay_out_of_the_circle(scored_rows):
    judge = Table({"a": 5, "b": 2, "c": 1})
    rewards = step([0, NAN, 0], [7, NAN, NAN])
    found = CircularComparison(judge)(rewards, scored_rows([["a", "b", "c"]] * 2))
    assert found[0, [0, 2]].tolist() == [5, 1]
    assert found[1, 0] == 7  # nobody to compare with
    assert int(found.isnan().sum()) == 3
    assert not any("b" in pair for pair in judge.asked)


def test_a_judge_that_fails_masks(scored_rows):
    def judge(a, b, example):
        if "x" in a + b:
            raise RuntimeError("no answer")
        return (NAN, 1, 1) if "y" in a + b else (3, 1, 2)

    found = CircularComparison(judge)(step([0, 0, 0]), scored_rows([["a", "x", "b"]]))
    assert found[0, [0, 2]].tolist() == [2, 2]  # b beats a with 3 to 1 in one order, a beats b in the other
    assert found[0, 1].isnan()
    assert CircularComparison(judge)(step([0, 0]), scored_rows([["a", "y"]])).isnan().all()


def test_the_judge_for_dry_runs(scored_rows):
    judge = LengthJudge(words=4)
    assert judge("a b c d", "a b", {}) == (5, 3, 2.25)
    assert judge("", "a b c d", {}) == (1, 5, 6)
    texts = [["a b c d", "a b c d e f", "a"]]
    found = CircularComparison(judge)(step([0, 0, 0]), scored_rows(texts))
    assert found.tolist() == [[5, 3, 2]]


GOLD = '{"score_1": 4, "score_2": 2, "rank": 2}'


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (GOLD, 0),
        ("<think>{}</think>First … so\n```json\n" + GOLD + "\n```", 0),
        ('{"score_1": 3, "score_2": 5, "rank": 5}', -(1 + 3 + 3)),
        ('I think {"score_1": 4, "score_2": 1, "rank": 1}.', -(1 + 1)),
        ('{"score_1": 4, "score_2": 2}', -10),
        ('{"score_1": 0, "score_2": 2, "rank": 2}', -10),
        ('{"score_1": 4, "score_2": 6, "rank": 2}', -10),
        ('{"score_1": 4, "score_2": 2, "rank": 7}', -10),
        ('{"score_1": 4.5, "score_2": 2, "rank": 2}', -10),
        ('{"score_1": true, "score_2": 2, "rank": 2}', -10),
        ('{"score_1": "4", "score_2": 2, "rank": 2}', -10),
        ("[4, 2, 2]", -10),
        ("", -10),
    ],
)
def test_genrm(answer, expected):
    assert GenRM().verify(GOLD, answer, {}).score == expected


def test_genrm_needs_a_gold_judgement(hostile_texts):
    GenRM().check({"id": "e", "answer": GOLD})
    with pytest.raises(BadDataError, match="its answer is not"):
        GenRM().check({"id": "e", "answer": "4, 2, 2"})
    assert GenRM().verify("", GOLD, {}).status == "error"
    for name, text in hostile_texts.items():
        assert GenRM().verify(GOLD, text, {}).score == -10, name
