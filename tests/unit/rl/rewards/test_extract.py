"""Finding answers in texts, by hand-worked cases; and megabytes of what is hard to search."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from bestiary.shared.rl.rewards.extract import (
    after_think,
    as_number,
    last_boxed,
    last_fence,
    last_number,
    last_tag,
    numbers,
)


def test_after_the_thoughts():
    assert after_think("<think>a</think>b</think> c") == " c"
    assert after_think("no thoughts") == "no thoughts"
    assert after_think("<think>cut off", required=True) == ""
    assert after_think("a</plan>b", tag="plan") == "b"


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{1} \boxed{cut", None),
        (r"boxed{1}", None),
        ("", None),
    ],
)
def test_the_last_box(text, content):
    assert last_boxed(text) == content


def test_the_last_tag():
    assert last_tag("<answer>1</answer> <answer>2</answer>") == "2"
    assert last_tag("<answer>1<answer>2</answer>") == "2"
    assert last_tag("</answer><answer>") is None
    assert last_tag("<a>x</a>", "a") == "x"


def test_the_last_fence():
    text = "```python\n1\n```\n```json\n{}\n```\n```\nplain\n```\n```json\ncut off"
    assert last_fence(text, ("json",)) == "plain\n"
    assert last_fence(text, ("json",), plain=False) == "{}\n"
    assert last_fence(text, ("python",), plain=False) == "1\n"
    assert last_fence(text, ("rust",), plain=False) is None
    assert last_fence("````md\n```\ninner\n```\n````") == "```\ninner\n```\n"
    assert last_fence("~~~\na\n```\n~~~") == "a\n```\n"
    assert last_fence("a ```json not a fence```") is None
    assert last_fence("```JSON\n1\n```", ("json",), plain=False) == "1\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x=5-3", ["5", "3"]),
        ("it is -3", ["-3"]),
        ("(2)-3", ["2", "3"]),
        ("1,234.56 and 1,23", ["1,234.56", "1", "23"]),
        ("-1/2 or .5", ["-1/2", ".5"]),
        ("12km, v2, x3y", ["12"]),
        ("2e-3.", ["2e-3"]),
        ("x = −7", ["−7"]),
        ("nan inf", []),
    ],
)
def test_numbers_of_a_text(text, found):
    assert numbers(text) == found
    assert last_number(text) == (found[-1] if found else None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,000", Fraction(1000)),
        ("-1/2", Fraction(-1, 2)),
        ("−0.25", Fraction(-1, 4)),
        ("1e-2", Fraction(1, 100)),
        ("5.", Fraction(5)),
        (".5", Fraction(1, 2)),
        ("1/0", None),
        ("1,00", None),
        ("1e401", None),
        ("nan", None),
        ("inf", None),
        ("", None),
        (".", None),
        ("9" * 401, None),
        ("٣", None),
        ("1_000", None),
    ],
)
def test_exact_numbers(text, value):
    assert as_number(text) == value


def test_megabytes_take_seconds(hostile_texts):
    more = {"minus": "-" * 10**6, "ticks": "`" * 10**6, "backslashes": "\\boxed{" + "\\" * 10**7}
    for name, text in (hostile_texts | more).items():
        began = time.monotonic()
        for find in (after_think, last_boxed, last_tag, last_fence, last_number):
            find(text)
        assert time.monotonic() - began < 30, name
