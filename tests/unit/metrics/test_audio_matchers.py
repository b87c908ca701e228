"""Matchers of audio benchmarks on hand-worked answers."""

from __future__ import annotations

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.metrics.audio_matchers import MATCHERS, answer_of, numeric


def question(answer, options=("Man", "Woman", "A child", "Robot"), **meta):
    return {"id": "x", "answer": answer, "meta": {"options": list(options), **meta}}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("B", "B"),
        ("<think>It is A.</think> B ", "B"),
        ("<think>A?</think><answer>the second</answer> done", "the second"),
        ("<answer>one</answer><answer>two</answer>", "two"),
        ("B <think>or A", "B"),
        ("<think>surely A", ""),  # thoughts that were cut off answer nothing
        ("", ""),
    ],
)
def test_what_is_the_answer(text, answer):
    assert answer_of(text) == answer


def check(matcher, example, text, choice, right):
    read = MATCHERS[matcher](text, example)
    assert (read.choice, read.right) == (choice, right), text


@pytest.mark.parametrize(
    ("text", "answer", "choice", "right"),
    [
        # By MMAU's rule: every gold word, and no word that only other options have.
        ("Man", "A", "A", True),
        ("It is a man.", "A", None, False),  # "a" is a word of another option, "A child"
        ("The speaker is clearly the MAN!", "A", "A", True),
        ("Man or Woman", "A", None, False),  # a hedge
        ("Woman", "A", "B", False),
        ("a child", "C", "C", True),
        ("child", "C", None, False),  # the word "a" is missing
        ("A", "A", None, False),  # a letter alone has no word of the option
        ("(A)", "A", None, False),
        ("(B) Woman", "B", "B", True),  # b is nobody's word
        ("(A) Man", "A", None, False),  # a is: the rule is blind to what a letter is
        ("Mankind", "A", None, False),
        ("", "A", None, False),
        ("...", "A", None, False),
        ("<think>Woman? Robot?</think>Man", "A", "A", True),
        ("<think>Man", "A", None, False),
    ],
)
def test_mmau_words(text, answer, choice, right):
    check("mmau_words", question(answer), text, choice, right)


def test_mmau_words_that_options_share_are_nobodys():
    options = ("C major", "C minor", "G major")
    check("mmau_words", question("A", options), "C major", "A", True)
    check("mmau_words", question("B", options), "The key is C minor", "B", True)
    # "c" and "major" belong to the gold option as well; "g" does not.
    check("mmau_words", question("A", options), "G major, C major", None, False)
    # An option inside another: "rock" says all of Rock, and lacks a word of Punk rock.
    inside = ("Rock", "Punk rock")
    check("mmau_words", question("A", inside), "rock", "A", True)
    check("mmau_words", question("A", inside), "punk rock", "B", False)
    check("mmau_words", question("B", inside), "punk rock", "B", True)


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B. Woman", "B"),
        ("The answer is (B).", "B"),
        ("I believe the correct option is B, a woman", "B"),
        ("Woman", "B"),
        ("It sounds like a woman to me", "B"),
        ("A child", "C"),
        ("(A) or (B)", None),
        ("Man and woman", None),
        ("no idea", None),
        ("", None),
        ("<think>The answer is A.</think>B", "B"),
        ("<think>The answer is B", None),
        ("E", None),  # there are four
    ],
)
def test_letter(text, choice):
    check("letter", question("B"), text, choice, choice == "B")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", "B"),
        ("(B) Woman", "B"),
        ("Options: A C. The correct answer is: B", "B"),
        ("Drums", "D"),  # any capital counts
        ("A or B", None),
        ("A or B, but woman", "B"),  # two letters: then the text of the first option that is there
        ("it is a woman", "B"),
        ("WOMAN", "A"),  # one letter of an option among its capitals
        ("", None),
    ],
)
def test_muchomusic(text, choice):
    # "woman" holds "man", so the first option must not be Man here.
    check("muchomusic", question("B", ("Horse", "Woman", "Cello", "Robot")), text, choice, choice == "B")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Well. [[B]]", "B"),
        ("[[A]] no, [[B]]", "B"),  # the last
        ("[[A]] but the answer is B", "A"),  # brackets before words
        ("The answer is A. No: my guess is b", "B"),
        ("answer is a waltz", "A"),  # the authors' rule ignores case
        ("option B or option A", "A"),  # the first of the alphabet, not of the text
        ("(B)", "B"),
        ("It is a horse", "A"),
        ("B", None),  # a bare letter is none of the forms
        ("[[F]]", None),
        ("", None),
    ],
)
def test_rul(text, choice):
    check("rul", question("B", ("Horse", "Woman", "Cello", "Robot")), text, choice, choice == "B")


@pytest.mark.parametrize(
    ("text", "choice", "right"),
    [
        ("Synth lead.", "synth lead", True),
        ("synth_lead", "synth lead", True),
        ("<answer>SYNTH-LEAD</answer>", "synth lead", True),
        ("bass", "bass", False),
        ("It is a synth lead", None, False),  # exact: the whole answer
        ("synth", None, False),
        ("", None, False),
    ],
)
def test_label(text, choice, right):
    check("label", question("synth lead", labels=["synth_lead", "bass"]), text, choice, right)


def test_labels_need_not_be_known():
    check("label", {"id": "x", "answer": "F#", "meta": {}}, "f#", "f#", True)
    check("label", {"id": "x", "answer": "F#", "meta": {}}, "F", "f", False)


@pytest.mark.parametrize(
    ("text", "choice", "right"),
    [("60", "60", True), ("MIDI 60", "60", True), ("60 or 61", "61", False), ("C4", None, False), ("", None, False)],
)
def test_numeric(text, choice, right):
    check("numeric", {"id": "x", "answer": "60", "meta": {}}, text, choice, right)
    assert numeric("61", {"id": "x", "answer": "60", "meta": {}}, 1.0).right


def test_gold_answers_that_are_none():
    with pytest.raises(BadDataError, match="neither a letter nor an option"):
        MATCHERS["letter"]("A", question("Dog"))
    with pytest.raises(BadDataError, match="has no answer"):
        MATCHERS["label"]("A", {"id": "x", "meta": {}})
    with pytest.raises(BadDataError, match="the gold answer is no number"):
        MATCHERS["numeric"]("1", {"id": "x", "answer": "C4", "meta": {}})
