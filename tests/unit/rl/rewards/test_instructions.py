"""Every checker of instructions, with texts that keep to it and texts that do not, worked by hand."""

from __future__ import annotations

import time

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.rl.rewards.instruction_checks import CHECKS
from bestiary.shared.rl.rewards.instructions import Instructions

LEAST_2 = {"relation": "at least", "count": 2}
TWO = {"relation": "exactly", "count": 2}

# id: (kwargs, texts that keep to it, texts that do not)
CASES = {
    "length:words": (
        {"relation": "at most", "count": 3},
        ["One two three.", "it's well-known"],
        ["a b c d", "1 2 3 4"],
    ),
    "length:sentences": (TWO, ["One. Two.", 'He said "Go!" She went'], ["One.", "A. B. C."]),
    "length:paragraphs": (TWO, ["a\n\nb", "\na\nb\n \n\nc\n"], ["a\nb", "a\n\nb\n\nc"]),
    "length:lines": (LEAST_2, ["a\nb", "a\n\nb\n"], ["a", "a\n\n"]),
    "length:characters": ({"relation": "less than", "count": 4}, ["abc", "  ab \n"], ["abcd", "ab cd"]),
    "length:each_word": ({"relation": "at most", "count": 3}, ["the cat sat", "a"], ["the cats sat", "four"]),
    "keywords:present": (
        {"keywords": ["red", "big dog"]},
        ["A Big Dog, red.", "red big dog"],
        ["redder big dog", "red dog"],
    ),
    "keywords:absent": ({"keywords": ["red", "blue"]}, ["A green one", "redder"], ["Red.", "so blue"]),
    "keywords:frequency": (
        {"keyword": "cat", "relation": "exactly", "count": 2},
        ["cat, Cat", "cat's cat"],
        ["cat", "cat cats"],
    ),
    "keywords:first_word": ({"word": "yes", "paragraph": 2}, ["a\n\nYes, b", "a b\n\nyes"], ["yes", "a\n\nno yes"]),
    "letters:frequency": ({"letter": "e", "relation": "more than", "count": 1}, ["eE", "tree"], ["e", "abc"]),
    "letters:ascii": ({}, ["plain", "a\nb!"], ["naïve", "“quoted”"]),
    "letters:script": ({"script": "cyrillic"}, ["Да, 5!", "мир"], ["Да yes", "123"]),
    "letters:palindromes": (TWO, ["Anna saw a level", "noon, 121"], ["Anna", "aa bb"]),
    "case:lower": ({}, ["all low, 5", "é"], ["One", "oNe"]),
    "case:upper": ({}, ["ALL UP, 5", "É"], ["One", "123"]),
    "case:capital_words": (LEAST_2, ["BIG and RED", "A B c"], ["BIG red", "Big Red"]),
    "format:title": ({}, ["<<A title>>\ntext", "text <<t>>"], ["<A title>", "<< >> <<a\nb>>"]),
    "format:bullets": (TWO, ["* a\n- b", "x:\n  * a\n\n  * b\ny"], ["* a", "**a**\n*b*\n* c"]),
    "format:sections": (
        {"word": "Section", "relation": "exactly", "count": 2},
        ["Section 1\na\nSection 2\nb", "## Section 1\n**section 2**"],
        ["Section one\nSection 2", "In Section 1 and\nin Section 2"],
    ),
    "format:highlights": (TWO, ["*a* and *b c*", "**a**, *b*"], ["*a*", "* a\n* b"]),
    "format:placeholders": (LEAST_2, ["[name] at [place]", "[a][b][c]"], ["[name]", "[] []"]),
    "format:json": ({}, ['{"a": 1}', "```json\n[1, 2]\n```"], ["{a: 1}", "5"]),
    "punctuation:no_commas": ({}, ["one two", "a; b"], ["one, two", "一，二"]),
    "ends:postscript": ({}, ["Text\nP.S. more", "P.S. x"], ["Text P.S. more", "Text\nP.S."]),
    "ends:starts_with": ({"phrase": "Dear"}, ["Dear all", " Dear"], ["dear all", "My Dear"]),
    "ends:ends_with": (
        {"phrase": "Any questions?"},
        ["So. Any questions?\n", "Any questions?"],
        ["Any questions? No", ""],
    ),
    "ends:quotation": ({}, ['"all of it"', " “all” "], ['"some" of it', '""']),
    "combination:two_responses": ({}, ["a******b", "a\n\n******\n\nb"], ["a******a", "a******b******c"]),
    "combination:repeat_prompt": ({"prompt": "Say it."}, ["Say it. It.", "Say it.\nOk"], ["Say it.", "It. Say it."]),
    "choice:constrained": ({"choices": ["Yes.", "No."]}, ["Yes.", " No.\n"], ["Yes", "Yes. No."]),
}


def test_there_is_a_case_for_every_checker():
    assert set(CASES) == set(CHECKS)
    assert len(CHECKS) >= 25


@pytest.mark.parametrize("name", CASES)
def test_checkers(name):
    kwargs, kept, broken = CASES[name]
    example = {"id": "e", "meta": {"instructions": [{"id": name, "kwargs": kwargs}]}}
    verifier = Instructions()
    verifier.check(example)
    for text in kept:
        assert verifier.verify("", f"<think>x</think>{text}", example).score == 1, text
    for text in broken:
        verdict = verifier.verify("", text, example)
        assert (verdict.score, verdict.status) == (0, "ok"), text


RELATIONS = {
    "at least": (0, 1, 1),
    "at most": (1, 1, 0),
    "exactly": (0, 1, 0),
    "less than": (1, 0, 0),
    "more than": (0, 0, 1),
}


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations(relation):
    found = tuple(CHECKS["length:words"](text, relation=relation, count=2) for text in ("a", "a b", "a b c"))
    assert found == RELATIONS[relation]


def test_all_or_a_share():
    instructions = [{"id": "case:lower"}, {"id": "punctuation:no_commas", "kwargs": {}}, {"id": "letters:ascii"}]
    example = {"id": "e", "meta": {"instructions": instructions}}
    for text, strict, share in [("a b", 1, 1), ("a, b", 0, 2 / 3), ("A, b", 0, 1 / 3), ("É, b", 0, 0), ("", 0, 0)]:
        assert Instructions().verify("", text, example).score == strict
        assert Instructions(share=True).verify("", text, example).score == pytest.approx(share)
    assert Instructions().verify("", "A, b", example).note == "broken: case:lower, punctuation:no_commas"
    assert Instructions(max_chars=3).verify("", "abcd", example).score == 0
    assert Instructions().gold_answer({"id": "e", "answer": "gold"}) == "gold"
    assert Instructions().gold_answer(example) is None


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        (None, 'has no meta\\["instructions"\\]'),
        ([], 'has no meta\\["instructions"\\]'),
        (["case:lower"], "is no instruction"),
        ([{"id": "case:lowre"}], "no instruction 'case:lowre'; did you mean 'case:lower'"),
        ([{"id": "length:words", "kwargs": {"count": 3}}], "'length:words' cannot be checked: .*'relation'"),
        ([{"id": "length:words", "kwargs": {"relation": "about", "count": 3}}], "relation 'about'"),
        ([{"id": "length:words", "kwargs": {"relation": "at most", "count": "3"}}], "a whole number"),
        ([{"id": "case:lower", "kwargs": {"x": 1}}], "'x'"),
        ([{"id": "keywords:present", "kwargs": {"keywords": "red"}}], "a list of texts"),
        (
            [{"id": "keywords:frequency", "kwargs": {"keyword": "", "relation": "exactly", "count": 1}}],
            "a list of texts",
        ),
        ([{"id": "letters:frequency", "kwargs": {"letter": "ab", "relation": "exactly", "count": 1}}], "one letter"),
        ([{"id": "choice:constrained", "kwargs": {"choices": []}}], "a list of texts"),
    ],
)
def test_bad_instructions_are_found_before_the_run(instructions, message):
    example = {"id": "e", "meta": {"instructions": instructions}}
    with pytest.raises(BadDataError, match=f"example 'e'.*{message}"):
        Instructions().check(example)
    assert Instructions().verify("", "text", example).score == 0


def test_hostile_texts(hostile_texts):
    instructions = [{"id": name, "kwargs": kwargs} for name, (kwargs, _, _) in CASES.items()]
    example = {"id": "e", "meta": {"instructions": instructions}}
    more = {"[a": "[a" * 10**5, "*a": "*a" * 10**5, "<<": "<<" * 10**5, "\n ": "\n " * 10**5, "a-": "a-" * 10**5}
    for name, text in (hostile_texts | more).items():
        began = time.monotonic()
        verdict = Instructions(max_chars=10**6).verify("", text, example)
        assert (verdict.score, verdict.status) == (0, "ok"), name
        assert time.monotonic() - began < 30, name
