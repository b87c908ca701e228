"""Form and answer: hand-worked sums, by what the example asks for."""

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.rl.environments.single_turn import SingleTurn
from bestiary.shared.rl.rewards.format_and_answer import FormatAndAnswer

QUESTION = {"id": "q", "answer": "2 sharps", "verifier": "exact_text"}
CHOICE = {"id": "c", "answer": "B", "verifier": "multiple_choice", "meta": {"options": ["flute", "organ"]}}
RECORD = {"Key": "D major", "Instruments": ["flute", "organ"]}
CAPTION = {"id": "d", "answer": "…", "verifier": "metadata", "meta": {"metadata": RECORD}}


@pytest.mark.parametrize(
    ("example", "text", "score"),
    [
        (QUESTION, "<think>hm</think><answer>2 Sharps.</answer>", 2.0),
        (QUESTION, "<think>hm</think><answer>2 flats</answer>", 1.0),
        (QUESTION, "<answer>2 sharps</answer>", 1.0),
        (QUESTION, "2 sharps", 0.0),
        (CHOICE, "<think></think><answer>B</answer>", 2.0),
        (CHOICE, "<think></think><answer>organ</answer>", 2.0),
        (CHOICE, "(B)", 1.0),
        (CAPTION, "<think>x</think><answer>A flute in D major.</answer>", 1.0 + (1 + 0.5) / 2),
        (CAPTION, "<think>D major, flute and organ</think><answer>Music.</answer>", 1.0),
    ],
)
def test_the_sum_is_that_of_form_and_what_is_asked(example, text, score):
    assert FormatAndAnswer().verify(example["answer"], text, example).score == score


def test_weights_and_parts():
    verdict = FormatAndAnswer(0.5, 2.0).verify("2 sharps", "<answer>2 sharps</answer>", QUESTION)
    assert verdict.score == 2.0
    assert verdict.parts == {"format": 0.0, "accuracy": 1.0}
    parts = FormatAndAnswer().verify("", "<think>a</think><answer>a flute</answer>", CAPTION).parts
    assert parts == {"format": 1.0, "metadata": 0.25, "metadata/key": 0.0, "metadata/instruments": 0.5}


def test_gold_answers_have_the_best_score():
    verifier = FormatAndAnswer()
    for example in (QUESTION, CHOICE, CAPTION):
        assert verifier.verify(example["answer"], verifier.gold_answer(example), example).score == verifier.best


def test_the_environment_tests_it_on_what_each_example_names():
    environment = SingleTurn("format_and_answer")
    assert "format_and_answer 3" in environment.self_test([QUESTION, CHOICE, CAPTION])
    with pytest.raises(BadDataError, match="names the verifier 'math'"):
        environment.self_test([{**QUESTION, "verifier": "math"}])
