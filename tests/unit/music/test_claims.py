"""Claims of a text against a record, and chains of thought that are mended or dropped: hand-worked cases."""

import pytest

from bestiary.shared.music.claims import claims, steps
from bestiary.shared.music.records import Record, Value
from bestiary.shared.music.think import check_chain

RECORD = Record(
    30.0,
    {
        name: Value(value, "made")
        for name, value in {
            "Key": "E flat major",
            "BPM": 120.0,
            "Meter": "3/4",
            "Instruments": ["electric guitar", "drums"],
            "Theory": ["E flat:maj", "C:min", "B flat:maj"],
        }.items()
    },
)


def judged(text, record=RECORD):
    return [(claim.category, claim.said, claim.right) for claim in claims(text, record)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is in E flat major.", [("Key", "E flat major", True)]),
        ("It is in D♯ major.", [("Key", "D♯ major", True)]),
        ("The key is E flat minor.", [("Key", "E flat minor", False)]),
        ("It runs at 124 bpm.", [("BPM", "124", True)]),
        ("It runs at 125.1 BPM.", [("BPM", "125.1", False)]),
        ("The tempo is about 60.", [("BPM", "60", False)]),
        ("A waltz in 3/4, not in 4/4.", [("Meter", "3/4", True)]),
        ("It is in 12/8 time.", [("Meter", "12/8", False)]),
        ("A guitar and a flute play.", [("Instruments", "guitar", True), ("Instruments", "flute", False)]),
        (
            "Electric guitars over drum fills.",
            [("Instruments", "Electric guitars", True), ("Instruments", "drum", True)],
        ),
        ("The harpsichord, no harp.", [("Instruments", "harpsichord", False)]),
        ("There are no drums and it isn't a violin.", []),
        ("The chords are E flat major, C minor and G major.", [("Theory", "E flat major", True)] * 1
         + [("Theory", "C minor", True), ("Theory", "G major", False)]),
        ("It goes C:min, A flat:maj.", [("Theory", "C:min", True), ("Theory", "A flat:maj", False)]),
        ("The chords circle in the key of E flat major.", [("Key", "E flat major", True)]),
        ("It modulates to G major.", []),
        ("Its relative minor is C minor.", []),
        ("A minor change of mood. A minor third falls.", []),
        ("A minor is its key.", [("Key", "A minor", False)]),
        ("A calm, warm piece.", []),
        ("It was recorded in 1984 at 44.1 kHz.", []),
    ],
)  # fmt: skip
def test_claims(text, found):
    assert judged(text) == found


def test_spans_point_at_the_values():
    text = "First, at 90 bpm. Then in 4/4!\nIn G major."
    assert [text[c.start : c.end] for c in claims(text, RECORD)] == ["90", "4/4", "G major"]


def test_what_the_record_does_not_know_is_not_judged():
    assert judged("In C major, 4/4, 90 bpm, for flute, with G:maj.", Record(1.0)) == []


def test_steps_are_sentences_and_lines():
    text = "1. The tempo is 120.5 bpm. It is fast! 2. Then\nIn 3/4; so a waltz\n\n2) Ends."
    assert [text[a:b] for a, b in steps(text)] == [
        "1. The tempo is 120.5 bpm.",
        "It is fast!",
        "2. Then",
        "In 3/4;",
        "so a waltz",
        "2) Ends.",
    ]
    assert steps(" \n ") == []


def test_a_minor_error_is_mended():
    chain = (
        "The pulse is steady at 121 bpm. It feels bright. The mode is major: an F major piece.\n"
        "The metre is 3/4. Drums enter late. The guitar leads. It ends softly."
    )
    checked = check_chain(chain, RECORD)
    assert [step.verdict for step in checked.steps] == [
        *("right", "neutral", "wrong", "right", "right", "right", "neutral")
    ]
    assert checked.wrong == pytest.approx(1 / 7)
    assert checked.text == (
        "The pulse is steady at 121 bpm. It feels bright. The mode is major: an E flat major piece. "
        "The metre is 3/4. Drums enter late. The guitar leads. It ends softly."
    )


def test_the_article_follows_the_value():
    record = Record(1.0, {"Key": Value("G major", "made"), "BPM": Value(80.0, "made")})
    chain = "It is an E minor song at a 110 bpm pace. " + "It goes on. " * 4
    assert check_chain(chain, record).text.startswith("It is a G major song at an 80 bpm pace. It goes on.")


def test_a_step_without_a_single_right_value_is_left_out():
    chain = "In 3/4. A flute plays. A G:maj comes. It goes on. It goes on. It goes on. It ends."
    checked = check_chain(chain, RECORD)
    assert checked.wrong == pytest.approx(2 / 7)
    assert checked.text == "In 3/4. It goes on. It goes on. It goes on. It ends."


@pytest.mark.parametrize(("neutral", "kept"), [(6, False), (7, True)])
def test_more_than_thirty_percent_wrong_steps_drop_the_chain(neutral, kept):
    """Three wrong of nine are over the limit; three of ten are not."""
    chain = "In 4/4. In 2/4. In G major. " + "It goes on. " * neutral
    checked = check_chain(chain, RECORD)
    assert (checked.text is not None) is kept
    assert checked.wrong == 3 / (neutral + 3)


def test_nothing_is_no_chain():
    assert check_chain("", RECORD).text is None
