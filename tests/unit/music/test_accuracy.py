"""The score of the extractors: what is true of a rendered clip, worked out by hand."""

import json

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.data.music.clips import Clip
from bestiary.shared.data.music.render import Note
from bestiary.shared.music import accuracy as module
from bestiary.shared.music.accuracy import constant, truth_of
from bestiary.shared.music.records import Chord, Record, Value, record_from


def notes(start, length, *pitches):
    return [Note(start, length, pitch, 70, 0) for pitch in pitches]


def clip(played, seconds=6.0, **record):
    return Clip(played, seconds, "t", "bach", {}, {"BPM": "90", "Structure": "four voices", **record})


def test_triads_sound_from_onset_to_onset():
    """C major, then over its held C and G a passing F, then A minor in another position; nothing after it."""
    played = [*notes(0.0, 1.8, 48, 67), *notes(0.0, 0.9, 64), *notes(1.0, 0.9, 65), *notes(2.0, 1.8, 45, 60, 64, 69)]
    record = truth_of(clip(played, Key="C major"))
    assert record.chords == [Chord(0.0, 1.0, "C:maj"), Chord(2.0, 6.0, "A:min")]
    assert record.values == {"BPM": Value(90.0, "score"), "Key": Value("C major", "score")}
    assert record_from(record.to_json()) == record


def test_one_voice_and_seventh_chords_have_no_triad():
    assert truth_of(clip(notes(0.0, 1.0, 60))).chords == []
    assert truth_of(clip(notes(0.0, 1.0, 60, 64, 67, 70))).chords == []
    assert "Key" not in truth_of(clip(notes(0.0, 1.0, 60))).values


def test_the_best_constant_by_hand():
    """100 is within 4 % of 97 and 103; nothing is of these and of 150. C major is two keys of three."""
    truths = [
        Record(1.0, {"BPM": Value(bpm, "x"), "Key": Value(key, "x")}, chords=chords)
        for bpm, key, chords in (
            (97.0, "C major", [Chord(0, 1, "C:maj")]),
            (103.0, "C major", [Chord(0, 2, "G:maj"), Chord(2, 4, "C:maj")]),
            (150.0, "A minor", []),
        )
    ]
    assert constant(truths) == {
        "tempo": pytest.approx(2 / 3),
        "key": pytest.approx(2 / 3),
        "chords": pytest.approx(0.6),
    }
    assert constant([Record(1.0, {"BPM": Value(97.0, "x")})]) == {"tempo": 1.0}


def test_the_command_writes_a_file_like_the_other_benchmarks(tmp_path, monkeypatch, capsys):
    made = {"what": "x", "date": "2026-01-02T03:04:05+00:00", "rows": [{"clips": "all", "n": 3, "tempo": 0.25}]}
    asked = []
    monkeypatch.setattr(module, "scored", lambda count, seconds: asked.append((count, seconds)) or made)
    module.main(["--clips", "3", "--seconds", "2", "--out", str(tmp_path)])
    assert asked == [(3, 2.0)]
    assert json.loads((tmp_path / "extractors_2s_2026-01-02.json").read_text()) == made
    assert "clips all  n 3  tempo 0.250" in capsys.readouterr().out


def test_careless_use_is_one_line(capsys, monkeypatch):
    with pytest.raises(SystemExit) as left:
        module.main(["--clips", "0"])
    assert left.value.code == 2
    assert "--clips is 1 or more, not 0" in capsys.readouterr().err

    def broken(count, seconds):
        raise BadDataError("no scores")

    monkeypatch.setattr(module, "scored", broken)
    with pytest.raises(SystemExit):
        module.main([])
    assert capsys.readouterr().err.endswith("no scores\n")
