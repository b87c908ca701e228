"""The form of a completion."""

from __future__ import annotations

import pytest

from bestiary.shared.rl.rewards.format import Format


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "<think>a</think>b", 1),
        ({}, " \n<think></think>\n b\n", 1),
        ({}, "<think>a</think>", 0),
        ({}, "<think>a</think> \n", 0),
        ({}, "<think>a b", 0),
        ({}, "b", 0),
        ({}, "x<think>a</think>b", 0),
        ({}, "<think>a</think>b</think>c", 0),
        ({}, "<think>a<think>b</think>c", 0),
        ({}, "</think>a<think>b", 0),
        ({"answer": "answer"}, "<think>a</think> <answer>b</answer>\n", 1),
        ({"answer": "answer"}, "<think>a</think>b", 0),
        ({"answer": "answer"}, "<think>a</think><answer> </answer>", 0),
        ({"answer": "answer"}, "<think>a</think><answer>b</answer> more", 0),
        ({"answer": "answer"}, "<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ({"answer": "answer"}, "<think><answer>b</answer></think>c", 0),
        ({"opened_in_prompt": True}, "a</think>b", 1),
        ({"opened_in_prompt": True}, "<think>a</think>b", 0),
        ({"think": "plan"}, "<plan>a</plan>b", 1),
        ({"think": "plan"}, "<think>a</think>b", 0),
    ],
)
def test_forms(options, text, expected):
    assert Format(**options).verify("", text, {}).score == expected


def test_gold_answers(hostile_texts):
    for options in ({}, {"answer": "answer"}, {"opened_in_prompt": True, "answer": "a"}, {"think": "t"}):
        verifier = Format(**options)
        for example in ({"id": "e"}, {"id": "e", "answer": "5"}):
            assert verifier.verify("", verifier.gold_answer(example), example).score == 1
        for name, text in hostile_texts.items():
            assert verifier.verify("", text, {}).score == 0, name
