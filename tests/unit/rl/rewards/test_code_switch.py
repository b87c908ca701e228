"""Which completions leave their prompt's script, and what that costs."""

from __future__ import annotations

import math

import pytest
import torch

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.rl.rewards.code_switch import CodeSwitch, switches_script


def example(prompt):
    return {"id": "e", "messages": [{"role": "user", "content": [{"type": "text", "value": prompt}]}]}


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("Add 1 and 2", "3, naïvely", False),
        ("Add 1 and 2", "So α = π/2, ∑ₙ 𝛼ₙ ∈ ℝ, |ℕ| = ℵ₀, 90 Ω, 5 µm, Ａ", False),
        ("Add 1 and 2", "その答え", True),
        ("Add 1 and 2", "答案是 3", True),
        ("Add 1 and 2", "Ответ", True),
        ("Add 1 and 2", "cаt", True),  # with a Cyrillic а
        ("Add 1 and 2", "，。 😀", False),
        ("What does the word 你好 mean in Chinese?", "你好 means hello", False),
        ("What does the word 你好 mean in Chinese?", "你好 means 您好", True),
        ("你好, 你是谁?", "我是", False),
        ("", "漢", True),
    ],
)
def test_scripts(prompt, text, expected):
    assert switches_script(example(prompt), text) is expected


@pytest.mark.parametrize(("mode", "penalty"), [("batch_min_minus_10", -13.0), ("minus_one", -1.0), ("zero", 0.0)])
def test_penalties(scored_rows, mode, penalty):
    groups = scored_rows([["fine", "не fine"], ["fine", "не fine"]])
    rewards = torch.tensor([[2.0, 5.0], [-3.0, math.nan]], dtype=torch.float64)
    found = CodeSwitch(mode)(rewards, groups)
    assert found[:, 0].tolist() == [2.0, -3.0]
    assert found[0, 1] == penalty
    assert found[1, 1].isnan()


def test_a_step_that_is_all_masked(scored_rows):
    assert CodeSwitch("batch_min_minus_10")(torch.tensor([[math.nan]]), scored_rows([["не"]])).isnan().all()
    with pytest.raises(ConfigError, match="mode is one of"):
        CodeSwitch("minus_two")


def test_hostile_texts(hostile_texts):
    for name, text in hostile_texts.items():
        assert switches_script(example("English"), text) is (name == "foreign"), name
