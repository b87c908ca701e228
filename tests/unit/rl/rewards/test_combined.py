"""Weighted sums of verifiers."""

from __future__ import annotations

import pytest

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.rl.rewards.combined import Combined
from bestiary.shared.rl.rewards.registry import self_test

PARTS = {
    "form": {"verifier": "format", "answer": "answer"},
    "accuracy": {"verifier": "exact_text", "weight": 2.0, "answer_tag": "answer"},
}


@pytest.mark.parametrize(
    ("text", "expected", "parts"),
    [
        ("<think>a</think><answer>5</answer>", 3.0, {"form": 1.0, "accuracy": 1.0}),
        ("<answer>5</answer>", 2.0, {"form": 0.0, "accuracy": 1.0}),
        ("<think>a</think><answer>6</answer>", 1.0, {"form": 1.0, "accuracy": 0.0}),
        ("", 0.0, {"form": 0.0, "accuracy": 0.0}),
    ],
)
def test_sums(text, expected, parts):
    verdict = Combined(PARTS).verify("5", text, {"id": "e", "answer": "5"})
    assert (verdict.score, verdict.parts, verdict.status) == (expected, parts, "ok")


@pytest.mark.parametrize("order", [("form", "accuracy"), ("accuracy", "form")])
def test_the_gold_answer_satisfies_all_parts(order):
    combined = Combined({name: PARTS[name] for name in order})
    assert combined.best == 3
    report = self_test({"combined": combined}, [{"id": "e", "answer": "5", "verifier": "combined"}])
    assert report.tested == {"combined": 1}


def test_a_part_that_fails_masks_the_row():
    combined = Combined({"form": {"verifier": "format"}, "data": {"verifier": "metadata"}})
    assert combined.verify("", "<think>a</think>b", {"id": "e", "meta": {}}).status == "error"


def test_wrong_parts():
    for parts, message in [
        ({}, "needs parts"),
        ({"a": {"weight": 1}}, "part 'a' names no verifier"),
        ({"a": {"verifier": "formatt"}}, "did you mean 'format'"),
        ({"a": {"verifier": "format", "tag": "x"}}, "no argument 'tag'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Combined(parts)
