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


@pytest.mark.parametrize(
    ("category", "value", "before", "after"),
    [
        ("Key", "F sharp minor", "It is a C major piece.", "It is an F sharp minor piece."),
        ("Key", "E major", "It is a C major piece.", "It is an E major piece."),
        ("Key", "B major", "It is an A major piece.", "It is a B major piece."),
        ("Key", "A minor", "It stays in C major.", "It stays in A minor."),
        ("Key", "A minor", "C major is its key.", "A minor is its key."),
        ("BPM", 110.0, "It has an 80 bpm pulse.", "It has a 110 bpm pulse."),
        ("BPM", 180.0, "It has an 80 bpm pulse.", "It has a 180 bpm pulse."),
        ("BPM", 84.5, "It has a 120 bpm pulse.", "It has an 84.5 bpm pulse."),
        ("Meter", "3/4", "It is an 8/8 tune.", "It is a 3/4 tune."),
        ("Meter", "11/8", "It is a 4/4 tune.", "It is an 11/8 tune."),
        ("Instruments", "French horn", "An oboe plays.", "A French horn plays."),
        ("Instruments", "flute", "An oboe plays.", "A flute plays."),
        ("Instruments", "organ", "A flute plays.", "An organ plays."),
        ("Instruments", "piano", "Oboes lead.", "Piano lead."),
    ],
)
def test_a_mended_step_reads_on(category, value, before, after):
    record = Record(1.0, {category: Value(value, "made")})
    (step, *_) = check_chain(before + " It goes on." * 4, record).steps
    assert (step.verdict, step.kept) == ("wrong", after)


@pytest.mark.parametrize(
    "step", ["It goes from 60 bpm to 90 bpm.", "It is at 120 bpm, then at 90 bpm.", "In G major or in C major."]
)
def test_a_step_with_two_values_of_a_category_cannot_be_mended(step):
    """It would go from one value to the same."""
    checked = check_chain(step + " It goes on." * 4, RECORD)
    assert checked.steps[0].kept is None
    assert checked.text == "It goes on. It goes on. It goes on. It goes on."


def test_several_values_of_a_step_are_mended_together():
    step = check_chain("In G major, at 90 bpm and in 4/4." + " It goes on." * 4, RECORD).steps[0]
    assert step.kept == "In E flat major, at 120 bpm and in 3/4."


def test_a_chain_of_wrong_steps_alone_that_cannot_be_mended_is_dropped():
    checked = check_chain("A flute plays.", RECORD, limit=1.0)
    assert (checked.wrong, checked.text) == (1.0, None)


@pytest.mark.parametrize(("wrong", "total", "kept"), [(3, 10, True), (6, 20, True), (9, 30, True), (1, 3, False)])
def test_the_limit_itself_is_kept(wrong, total, kept):
    chain = "In 4/4. " * wrong + "It goes on. " * (total - wrong)
    assert (check_chain(chain, RECORD).text is not None) is kept


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
