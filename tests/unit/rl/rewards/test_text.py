"""Exact texts, numbers and multiple choice, by hand-worked cases."""

from __future__ import annotations

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.rl.rewards.text import ExactText, MultipleChoice, Numeric

EXAMPLE = {"id": "e", "answer": "1000", "meta": {}}


def score(verifier, gold, answer, meta=None):
    verdict = verifier.verify(gold, answer, {"id": "e", "answer": gold, "meta": meta or {}})
    assert verdict.status == "ok"
    return verdict.score


@pytest.mark.parametrize(
    ("options", "gold", "answer", "expected"),
    [
        ({}, "095", " 095\n", 1),
        ({}, "095", "<think>94?</think>095", 1),
        ({}, "095", "95", 0),
        ({}, "Yes", "yes", 0),
        ({"ignore_case": True}, "Straße", "STRASSE", 1),
        ({"ignore_punctuation": True}, "it's 5€", "its 5", 1),
        ({}, "a b", "a  b", 0),
        ({"ignore_spaces": True}, "a b", "a \n b", 1),
        ({"answer_tag": "answer"}, "5", "so <answer> 5 </answer>", 1),
        ({"answer_tag": "answer"}, "5", "5", 0),
        ({"answer_tag": "answer"}, "5", "<answer>5</answer> or <answer>6</answer>", 0),
    ],
)
def test_exact_text(options, gold, answer, expected):
    assert score(ExactText(**options), gold, answer) == expected


@pytest.mark.parametrize("options", [{}, {"answer_tag": "answer"}, {"ignore_case": True, "ignore_spaces": True}])
def test_its_gold_answer_is_right(options):
    verifier = ExactText(**options)
    assert score(verifier, EXAMPLE["answer"], verifier.gold_answer(EXAMPLE)) == 1
    assert verifier.gold_answer({"id": "x"}) is None


@pytest.mark.parametrize("answer", [None, "", "  ", 5])
def test_an_example_without_an_answer_is_refused(answer):
    for verifier in (ExactText(), Numeric(), MultipleChoice()):
        with pytest.raises(BadDataError, match="example 'e'"):
            verifier.check({"id": "e", "answer": answer})
    with pytest.raises(BadDataError, match="nothing of its answer is left"):
        ExactText(ignore_punctuation=True).check({"id": "e", "answer": "?!"})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<answer>1,000</answer>", 1),
        ("It is 999, no, 1000.0", 1),
        (r"\boxed{\frac{2000}{2}}", 1),
        (r"\boxed{1{,}000}", 1),
        ("<answer>1000 apples</answer>", 1),
        ("1e3", 1),
        ("<answer>5 or 1000</answer>", 0),
        ("<answer></answer> 1000", 0),
        ("1000%", 0),
        ("-1000", 0),
        ("1000.0001", 0),
        ("nan", 0),
        ("inf", 0),
        ("<think>1000</think> I do not know", 0),
        ("9" * 5000, 0),
    ],
)
def test_numeric(answer, expected):
    assert score(Numeric(), "1000", answer) == expected


def test_tolerances_and_percent():
    assert score(Numeric(absolute=0.5), "10", "10.5") == 1
    assert score(Numeric(absolute=0.5), "10", "10.51") == 0
    assert score(Numeric(relative=0.01), "-200", "-198") == 1
    assert score(Numeric(relative=0.01), "-200", "-197.9") == 0
    assert score(Numeric(), "1/3", "2/6") == 1
    assert score(Numeric(), "1/3", "0.3333333333") == 0
    assert score(Numeric(percent=True), "0.05", r"\boxed{5\%}") == 1
    assert score(Numeric(percent=True), "5%", "0.05") == 1
    assert score(Numeric(percent=True), "5%", "5") == 0
    with pytest.raises(BadDataError, match=r"is no number \(with percent: true"):
        Numeric().check({"id": "e", "answer": "5%"})
    with pytest.raises(BadDataError, match="is no number"):
        Numeric().check({"id": "e", "answer": "5 or 6"})


OPTIONS = ["red", "dark red", "15", "5"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("(B)", 1),
        ("B.", 1),
        ("b", 1),
        ("The answer is B", 1),
        ("Final answer: **B**", 1),
        ("The answer is (B), because A is too bright.", 1),
        ("<answer>B</answer>", 1),
        ("<answer>B) dark red</answer>", 1),
        (r"\boxed{\text{B}}", 1),
        ("Long thoughts about A</think>\nB", 1),
        ("The correct option is B", 1),
        ("It is dark red.", 1),
        ("<answer>Dark Red</answer>", 1),
        ("It is red", 0),
        ("A or B", 0),
        ("The answer is A or B", 0),
        ("The answer is A. No, the answer is B.", 0),
        ("(A) (B) (C) (D)", 0),
        ("<answer>A, B</answer>", 0),
        ("<answer>A B</answer>", 0),
        ("<answer>B. A dark red</answer>", 1),
        ("dark red, or 15", 0),
        ("A bee is a Bee", 0),
        ("", 0),
    ],
)
def test_multiple_choice(answer, expected):
    assert score(MultipleChoice(), "B", answer, {"options": OPTIONS}) == expected
    assert score(MultipleChoice(), "dark red", answer, {"options": dict(zip("ABCD", OPTIONS, strict=True))}) == expected


def test_a_letter_without_known_options():
    assert score(MultipleChoice(), "(c)", "The answer is C.") == 1
    assert MultipleChoice().gold_answer({"id": "e", "answer": "(c)"}) == "<answer>C</answer>"
    with pytest.raises(BadDataError, match="neither a letter nor an option"):
        MultipleChoice().check({"id": "e", "answer": "blue", "meta": {"options": OPTIONS}})
    with pytest.raises(BadDataError, match="neither a letter nor an option"):
        MultipleChoice().check({"id": "e", "answer": "E", "meta": {"options": OPTIONS}})
