"""Structured metadata, by hand-worked records."""

from __future__ import annotations

import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.rl.rewards.metadata import Metadata

RECORD = {
    "Genre": "synth-pop",
    "BPM": 120,
    "Key": "A# minor",
    "Meter": "4/4",
    "Instruments": ["bass", "drum machine"],
}


def score(text, record=RECORD, **options):
    verdict = Metadata(**options).verify("", text, {"id": "e", "meta": {"metadata": record}})
    assert verdict.status == "ok"
    return verdict.score


def test_the_gold_answer_is_right():
    for options in ({}, {"answer_tag": "answer"}):
        verifier, example = Metadata(**options), {"id": "e", "meta": {"metadata": RECORD}}
        verifier.check(example)
        assert verifier.verify("", verifier.gold_answer(example), example).score == 1


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("SYNTH POP at 120 BPM in Bb minor, 4/4, with drum machine and bass.", 5 / 5),
        ("<think>synth-pop 120 bpm</think>Nothing said.", 0),
        ("A tempo of about 124, in B♭ min.", 2 / 5),
        ("125 bpm", 0),  # 4.2 % off
        ("60 bpm", 0),  # an octave off
        ("120 people", 0),
        ("Bb major", 0),
        ("A minor", 0),
        ("A#m", 1 / 5),
        ("in 4/4", 1 / 5),
        ("in 3/4", 0),
        ("on 14/4", 0),
        ("a bass", 0.5 / 5),  # half of the instruments
        ("a bassoon", 0),
        ("", 0),
    ],
)
def test_what_is_named(text, share):
    assert score(text) == pytest.approx(share)


def test_naming_everything_does_not_pay():
    tempos = ", ".join(f"{bpm} bpm" for bpm in range(60, 200, 5))
    keys = ", ".join(f"{note}{sign} {mode}" for note in "ABCDEFG" for sign in ("", "#") for mode in ("major", "minor"))
    assert score(tempos) == score(keys) == score("2/4 3/4 4/4 6/8") == 0
    assert score("It may be 120 bpm or 60 bpm") == pytest.approx(1 / 5)  # two are let pass
    genres = ["rock", "jazz", "folk", "metal", "synth-pop", "blues"]
    everything = ", ".join(genres)
    record = {"Genre": "synth-pop"}
    assert score(everything, record) == 1  # nothing is known of the other genres
    assert score(everything, record, vocabulary={"genre": genres}) == 0
    assert score("rock, jazz, synth-pop", record, vocabulary={"genre": genres}) == 1
    assert score("rock, jazz, synth-pop", record, vocabulary={"genre": genres}, slack=1) == 0
    assert score("synth-pop " + "word " * 2000, record) == 0


def test_a_value_inside_a_longer_one_is_not_another():
    options = {"vocabulary": {"instruments": ["bass", "double bass", "harp"]}, "slack": 0}
    assert score("double bass", {"Instruments": ["double bass"]}, **options) == 1
    assert score("double bass and harp", {"Instruments": ["double bass"]}, **options) == 0


def test_which_categories_count():
    assert score("4/4", categories=["meter"]) == 1
    assert score("it has a groove of 7", {"Groove": "7"}, kinds={"groove": "text"}) == 1
    with pytest.raises(ConfigError, match="kinds are text, bpm, key and meter, not colour"):
        Metadata(kinds={"genre": "colour"})


def test_records_that_cannot_be_met():
    for record in (None, {}, {"Key": "H dur"}, {"BPM": "fast"}, {"Genre": "—"}, {"Instruments": []}):
        with pytest.raises(BadDataError, match="example 'e'"):
            Metadata().check({"id": "e", "meta": {"metadata": record}})


def test_hostile_texts(hostile_texts):
    more = {"keys": "A minor " * 900, "tempo": "tempo " * 1300, "slashes": "1/" * 4000}
    for name, text in (hostile_texts | more).items():
        assert score(text, max_chars=2 * 10**6) <= 0.2, name
