"""Shapings, each worked by hand on a small step."""

from __future__ import annotations

import math

import pytest
import torch

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.rl.protocols import Shaping
from bestiary.shared.rl.rewards.shaping import GroupLengthControl, OverlongPenalty, SigmoidGated, TanhZScore, group_z

NAN = math.nan


def step(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def same(found, *rows):
    torch.testing.assert_close(found, step(*rows), equal_nan=True, rtol=1e-9, atol=1e-9)


def test_z_scores_by_hand():
    # 1, 2, 3: mean 2, deviation 1. 0, 4 beside a masked row: mean 2, deviation √8. Equal ones: 0.
    root = 2 / math.sqrt(8)
    same(group_z(step([1, 2, 3], [0, NAN, 4], [0.1, 0.1, 0.1])), [-1, 0, 1], [-root, NAN, root], [0, 0, 0])
    same(group_z(step([5, NAN, NAN], [NAN, NAN, NAN])), [0, NAN, NAN], [NAN, NAN, NAN])


def test_tanh(scored_rows):
    found = TanhZScore()(step([1, 2, 3], [7, 7, NAN]), scored_rows([["a"] * 3] * 2))
    same(found, [-math.tanh(1), 0, math.tanh(1)], [0, 0, NAN])
    assert isinstance(TanhZScore(), Shaping)


def test_sigmoid_gate(scored_rows):
    """The scores 1, 2, 3 have z = −1, 0, 1; whoever failed the verifier gets 0, whatever the score."""

    def scorer(rewards, groups):
        return step([1, 2, 3], [1, 2, 3])

    def sigmoid(z):
        return 1 / (1 + math.exp(-z))

    found = SigmoidGated(scorer)(step([1, 1, 0], [1, NAN, 0.5]), scored_rows([["a"] * 3] * 2))
    same(found, [1 + sigmoid(-1), 1.5, 0], [1 + sigmoid(-1), NAN, 0])


def test_overlong(scored_rows):
    rows = scored_rows([["a"] * 6], [[10, 80, 90, 100, 120, 95]])
    found = OverlongPenalty(max_tokens=100, cache_tokens=20)(step([1, 1, 0, 1, 1, NAN]), rows)
    same(found, [1, 1, -0.5, 0, 0, NAN])
    for wrong in ((10, 0), (10, 11)):
        with pytest.raises(ConfigError, match="overlong_penalty"):
            OverlongPenalty(*wrong)


def test_length_control_of_answers(scored_rows):
    """Lengths 10, 20, 30: w = 1, 0.5, 0, centred 0.5, 0, −0.5, times 0.5. The 80th percentile of 1, 1, 0 is 1."""
    rows = scored_rows([["a"] * 3] * 2, [[10, 20, 30]] * 2)
    found = GroupLengthControl()(step([1, 1, 0], [0, 1, 1]), rows)
    same(found, [1 + 0.25 + 0.5, 1, -0.25], [0.25, 1, 0.75])  # the second group's shortest is not good enough


def test_length_control_of_thoughts_and_answers(scored_rows):
    """Characters are tokens here. Thoughts (tag included) 10, 20, 30; answers 40, 20, 30."""
    texts = [["t" * (n - 8) + "</think>" + "a" * m for n, m in ((10, 40), (20, 20), (30, 30))]]
    found = GroupLengthControl(weight=1.0, bonus=2.0)(step([5, 1, 5]), scored_rows(texts))
    # Thoughts: +0.5 +2 (the shortest, good), 0, −0.5. Answers: w = 0, 1, 0.5: −0.5, +0.5 (the shortest, not good), 0.
    same(found, [5 + 2.5 - 0.5, 1 + 0 + 0.5, 5 - 0.5 + 0])


def test_unfinished_thoughts_have_no_short_answer(scored_rows):
    texts = [["t" * 12 + "</think>" + "a" * 10, "t" * 12 + "</think>" + "a" * 20, "t" * 40]]
    found = GroupLengthControl(weight=0.0, bonus=1.0, percentile=0.0)(step([0, 0, 0]), scored_rows(texts))
    same(found, [1 + 1, 1, 0])  # two have the shortest thoughts, the first the shortest answer
    found = GroupLengthControl(weight=1.0, bonus=0.0)(step([0, 0, 0]), scored_rows(texts))
    # Thoughts 20, 20, 40: w = 1, 1, 0. Answers 10, 20, and as long as the longest: w = 1, 0, 0.
    same(found, [1 / 3 + 2 / 3, 1 / 3 - 1 / 3, -2 / 3 - 1 / 3])


def test_length_control_leaves_equal_and_masked_rows(scored_rows):
    control = GroupLengthControl(bonus=0.0)
    same(control(step([1, 0]), scored_rows([["a", "b"]], [[7, 7]])), [1, 0])
    same(control(step([1, NAN, 0]), scored_rows([["a"] * 3], [[10, 1, 30]])), [1.25, NAN, -0.25])
    same(control(step([NAN, NAN]), scored_rows([["a", "b"]])), [NAN, NAN])
    same(control(step([1, 0]), scored_rows([["", "</think>"]])), [1 + 0.25 - 0, 0 - 0.25])
    with pytest.raises(ConfigError, match="percentile"):
        GroupLengthControl(percentile=101)


def test_nothing_is_changed_in_place(scored_rows):
    rows = scored_rows([["a", "bb</think>c"]], [[3, 9]])
    for shaping in (TanhZScore(), OverlongPenalty(10, 5), GroupLengthControl(), SigmoidGated(lambda r, g: r + 1)):
        rewards = step([1, 0])
        shaping(rewards, rows)
        same(rewards, [1, 0])
