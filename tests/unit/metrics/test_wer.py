"""Error rates of transcriptions, by hand-worked cases and an alignment of our own."""

from __future__ import annotations

import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.protocols import EvalProtocol
from bestiary.shared.metrics.audio_answers import Answered
from bestiary.shared.metrics.wer import ErrorRate, error_rate, normalise


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, World!", ["hello", "world"]),
        ("Don\u2019t stop\u2026 don`t", ["don't", "stop", "don't"]),  # apostrophes are one, inside a word
        ("'Cause I'm singin'", ["cause", "i'm", "singin"]),
        ("well-known\nlines\t here", ["well", "known", "lines", "here"]),
        ("[Chorus]\nLa (la) la [x2]", ["la", "la", "la"]),
        ("\uff21\uff22 \ufb01ne", ["ab", "fine"]),  # full width letters and a ligature
        ("Stra\u00dfe \u00c9t\u00e9 e\u0301te\u0301", ["strasse", "\u00e9t\u00e9", "\u00e9t\u00e9"]),
        ("99 bottles", ["99", "bottles"]),
        ("' -- '", []),
        ("", []),
    ],
)
def test_words(text, words):
    assert normalise(text) == words


def test_characters():
    assert normalise("\u6211\u7231\uff0c\u4f60\u3002 OK!", "character") == ["\u6211", "\u7231", "\u4f60", "o", "k"]
    assert normalise("don't", "character") == list("dont")
    with pytest.raises(ConfigError, match="unit is word or character, not 'letter'"):
        normalise("", "letter")


def test_words_by_hand():
    # one word of three is replaced, one is missing of two, and one is too many.
    found = error_rate(["I love you", "hello there"], ["I loved you", "hello"])
    assert found == pytest.approx(
        {"rate": 2 / 5, "substitutions": 1 / 5, "deletions": 1 / 5, "insertions": 0, "units": 5}
    )
    assert error_rate(["la"], ["la la la"])["rate"] == 2  # it may be above 1
    assert error_rate(["Hello, you!"], ["hello you"])["rate"] == 0
    assert error_rate(["a b"], [""]) == pytest.approx(
        {"rate": 1, "substitutions": 0, "deletions": 1, "insertions": 0, "units": 2}
    )


def test_it_is_of_the_corpus_not_a_mean():
    references, answers = ["a b c d e f g h i", "x"], ["a b c d e f g h i", "y"]
    assert error_rate(references, answers)["rate"] == pytest.approx(1 / 10)


def test_characters_by_hand():
    found = error_rate(["\u6211\u7231\u4f60\u4eec"], ["\u6211 \u7231\u4ed6"], "character")
    assert found["rate"] == pytest.approx(2 / 4)  # one replaced, one missing
    # As words there are one of each, and they differ.
    assert error_rate(["\u6211\u7231\u4f60\u4eec"], ["\u6211\u7231\u4ed6"])["rate"] == 1


def levenshtein(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def test_against_an_edit_distance_of_our_own():
    import random

    draw = random.Random(0)
    for unit in ("word", "character"):
        texts = [
            [" ".join(draw.choice(["so", "la", "mi"]) for _ in range(draw.randint(1, 9))) for _ in range(20)]
            for _ in "ab"
        ]
        pairs = [(normalise(a, unit), normalise(b, unit)) for a, b in zip(*texts, strict=True)]
        expected = sum(levenshtein(a, b) for a, b in pairs) / sum(len(a) for a, _ in pairs)
        assert error_rate(*texts, unit)["rate"] == pytest.approx(expected)


def answered(reference, text, cut=False, **meta):
    return Answered({"id": reference, "answer": reference, "meta": meta}, text, cut)


def test_the_protocol():
    protocol = ErrorRate(by=["category"], label="musdb18")
    assert isinstance(protocol, EvalProtocol)
    values = protocol.numbers(
        [
            answered("one two", "<think>three four</think><answer>One, two.</answer>", category="a"),
            answered("three four", "three", cut=True, category="b"),
        ]
    )
    assert values == pytest.approx(
        {
            "musdb18/wer": 1 / 4,
            "musdb18/wer/substitutions": 0,
            "musdb18/wer/deletions": 1 / 4,
            "musdb18/wer/insertions": 0,
            "musdb18/words": 4,
            "musdb18/prompts": 2,
            "musdb18/truncated_share": 1 / 2,
            "musdb18/wer/category=a": 0,
            "musdb18/wer/category=b": 1 / 2,
        }
    )
    cer = ErrorRate("character").numbers([answered("\u6211\u7231", "\u6211")])
    assert (cer["cer"], cer["characters"]) == (1 / 2, 2)


def test_references_without_words():
    with pytest.raises(BadDataError, match=r"nothing of the reference '\[Intro\]'"):
        ErrorRate().numbers([answered("[Intro]", "la")])
    with pytest.raises(ConfigError, match="unit is word"):
        ErrorRate("phoneme")
