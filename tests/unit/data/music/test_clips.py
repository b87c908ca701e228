"""Clips: notes and labels by hand and by music21, nothing that gives an answer away, and no chance in them."""

import numpy as np
import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.data.music.clips import (
    ACCENT,
    INSTRUMENTS,
    MAJOR,
    METRE_NAMES,
    MINOR,
    PLAIN,
    SIGNATURES,
    ClipMaker,
    chord_at,
    chord_name,
    described,
    play,
)
from bestiary.shared.data.music.questions import baselines
from bestiary.shared.data.music.render import Note
from bestiary.shared.data.music.scores import METRES, Tune

SCALE = (0, 2, 4, 5, 7, 9, 11)


def tune(name, beats, unit, sharps=0, bars=12, voices=1, upbeat=0.0, mode="major"):
    """Up and down a scale in eighths, after an upbeat: diatonic, so that its notes tell the key signature."""
    tonic = 60 + 7 * sharps % 12
    whole = beats * 4 / unit
    count = round(bars * whole * 2)
    places = [i % 14 if i % 14 < 7 else 13 - i % 14 for i in range(count)]
    voice = [[0.0, upbeat, tonic]] if upbeat else []
    voice += [[upbeat + i / 2, 0.5, tonic + SCALE[place]] for i, place in enumerate(places)]
    parts = [[[onset, length, pitch - 12 * v] for onset, length, pitch in voice] for v in range(voices)]
    onsets = [upbeat + whole * i for i in range(bars)]
    return Tune(name, "ryan", name, "jig", sharps, "", mode, beats, unit, parts, onsets)


def many():
    """Tunes of all metres, some in four voices."""
    signs = [sign for signs in METRES.values() for sign in signs]
    return [
        tune(f"{beats}/{unit}:{sharps}:{voices}", beats, unit, sharps, voices=voices, bars=16)
        for beats, unit in signs
        for sharps in range(-3, 5)
        for voices in ((1,) if unit == 8 or (beats, unit) == (6, 4) else (1, 4))
    ]


def test_notes_by_hand():
    """A waltz at 120: a quarter lasts half a second; G major up a tone is A major, three sharps."""
    waltz = tune("w", 3, 4, sharps=1, upbeat=1.0)
    notes = play(waltz, "trumpet", 120, 2, start=4.0, seconds=2.0)  # from the second bar
    assert [note.start for note in notes] == pytest.approx([0.25 * i for i in range(8)])
    assert [note.duration for note in notes] == pytest.approx([0.225] * 8)
    # The scale from G4 on in eighths, from its seventh note: F# F# E D C B A G, a tone up.
    assert [note.pitch for note in notes] == [80, 80, 78, 76, 74, 73, 71, 69]
    assert [note.velocity for note in notes] == [ACCENT, *[PLAIN] * 5, ACCENT, PLAIN]
    assert {note.program for note in notes} == {56}
    clip = described(waltz, "trumpet", 120, 2, notes, 2.0)
    assert clip.labels == {
        "instrument": "trumpet",
        "metre": "triple",
        "key_signature": "3 sharps",
        "key": "A major",
        "tempo": "fast",
        "texture": "one voice",
    }
    assert clip.record == {
        "Instruments": ["trumpet"],
        "Meter": "3/4",
        "Key signature": "3 sharps",
        "BPM": "120",
        "Structure": "one voice",
        "Key": "A major",
        "Genre": "jig",
    }
    assert clip.classes == {"instrument": 6, "metre": 1, "key_signature": 3, "tempo": 2, "texture": 0}


@pytest.mark.parametrize(("beats", "unit", "bar"), [(6, 8, 2.0), (2, 2, 2.0), (4, 4, 4.0), (9, 8, 3.0), (2, 4, 2.0)])
def test_at_sixty_a_felt_beat_is_a_second(beats, unit, bar):
    notes = play(tune("t", beats, unit), "piano", 60, 0, start=0.0, seconds=13.0)
    accents = [note.start for note in notes if note.velocity == ACCENT]
    assert accents == pytest.approx([bar * i for i in range(len(accents))])
    assert len(accents) == int(13 / bar - 1e-9) + 1


def test_bars_stay_regular_when_a_tune_begins_again():
    short = tune("s", 3, 4, bars=8, upbeat=1.0)
    notes = play(short, "flute", 90, 0, start=short.bars[5], seconds=60.0)
    accents = [note.start for note in notes if note.velocity == ACCENT]
    assert np.diff(accents) == pytest.approx(np.full(len(accents) - 1, 2.0))
    assert len(accents) == 30
    # After three bars comes the first whole bar, not the upbeat; its notes are those of the tune's beginning.
    again = [note.pitch for note in notes if 6.0 - 1e-6 <= note.start < 8.0 - 1e-6]
    assert again == [pitch for _, _, pitch in short.parts[0][1:7]]
    assert max(note.start + note.duration for note in notes if note.start < 6.0 - 1e-6) <= 6.0


def test_a_long_last_note_does_not_sound_into_the_beginning():
    held = tune("h", 2, 4, bars=8)
    held.parts[0][-1][1] = 9.0
    notes = play(held, "organ", 60, 0, start=held.bars[7], seconds=6.0)
    assert notes[3].start + notes[3].duration <= 2.0


@pytest.mark.parametrize("sharps", range(-6, 7))
def test_key_signatures_in_words_and_tonics_are_those_of_music21(sharps):
    key = pytest.importorskip("music21.key")
    fifths = sharps % 12
    if sharps not in (-6, 6):
        kind = "sharp" if sharps > 0 else "flat"
        plural = "" if abs(sharps) == 1 else "s"
        assert SIGNATURES[fifths] == (f"{abs(sharps)} {kind}{plural}" if sharps else "no sharps")
    for mode, names in (("major", MAJOR), ("minor", MINOR)):
        reference = key.KeySignature(sharps).asKey(mode).tonic
        assert pitch_class(names[fifths]) == reference.pitchClass
        if sharps != -6:  # six sharps stand for it
            assert names[fifths] == reference.name.replace("#", " sharp").replace("-", " flat")


def pitch_class(name):
    letter, _, sign = name.partition(" ")
    return {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[letter] % 12 + {"sharp": 1, "flat": -1, "": 0}[
        sign
    ]


@pytest.mark.parametrize("shift", range(-5, 7))
def test_the_key_signature_is_that_of_what_sounds(shift):
    """Of the twelve diatonic scales only one holds all notes of a diatonic tune."""
    for sharps in (-3, 0, 4):
        diatonic = tune("d", 4, 4, sharps)
        clip = described(diatonic, "piano", 90, shift, play(diatonic, "piano", 90, shift, 0.0, 8.0), 8.0)
        sounding = {note.pitch % 12 for note in clip.notes}
        fitting = [f for f in range(12) if sounding <= {(7 * f + step) % 12 for step in SCALE}]
        assert fitting == [clip.classes["key_signature"]]
        assert pitch_class(clip.labels["key"].removesuffix(" major")) % 12 == 7 * fitting[0] % 12


def test_chords_are_those_of_music21():
    """Qualities by the class of the set of pitches (Forte), roots where music21 takes its own spelling for a chord."""
    chord = pytest.importorskip("music21.chord")
    rng = np.random.default_rng(0)
    named = {
        "3-11B": "major",
        "3-11A": "minor",
        "3-10": "diminished",
        "4-27B": "dominant seventh",
        "4-20": "major seventh",
        "4-26": "minor seventh",
        "4-27A": "half-diminished seventh",
    }
    seen, roots = set(), 0
    for _ in range(500):
        pitches = [int(p) for p in rng.integers(48, 73, int(rng.integers(3, 5)))]
        found = chord_at([Note(0.0, 1.0, p, 70, 0) for p in pitches], 0.5)
        reference = chord.Chord(pitches)
        assert (found[1] if found else None) == named.get(reference.forteClass), pitches
        if found:
            seen.add(found[1])
            if reference.isTriad() or reference.isSeventh():
                roots += 1
                assert reference.root().pitchClass == found[0]
    assert seen == set(named.values())
    assert roots > 20


def test_a_chord_is_what_sounds_at_its_time():
    notes = [Note(0.0, 1.0, 60, 70, 0), Note(0.0, 2.0, 64, 70, 0), Note(0.5, 1.0, 67, 70, 0), Note(1.0, 1.0, 69, 70, 0)]
    assert [chord_at(notes, time) for time in (0.0, 0.5, 1.2, 1.6)] == [None, (0, "major"), None, None]
    assert chord_name((1, "minor"), 3) == "C sharp minor"
    assert chord_name((1, "minor"), 9) == "D flat minor"


def test_a_clip_is_a_function_of_its_number():
    first, second = ClipMaker(many(), "train"), ClipMaker(many(), "train")
    backwards = [second.clip(n) for n in reversed(range(20))][::-1]
    assert [first.clip(n) for n in range(20)] == backwards
    assert [first.time_clip(n) for n in range(5)] == [second.time_clip(n) for n in range(5)]
    assert first.clip(3) != ClipMaker(many(), "train", seed=1).clip(3)
    assert first.clip(3) != ClipMaker(many(), "val").clip(3)
    # A longer clip may begin elsewhere, but it is of the same tune, on the same instrument.
    assert first.clip(3).labels == ClipMaker(many(), "train", seconds=9.0).clip(3).labels
    with pytest.raises(BadDataError, match="no tune of these scores is in the split 'val'"):
        ClipMaker([], "val")


@pytest.fixture(scope="module")
def drawn():
    maker = ClipMaker(many(), "train")
    return [maker.clip(n) for n in range(3000)]


def share(clips, task, value):
    return sum(clip.labels[task] == value for clip in clips) / len(clips)


def test_metres_instruments_and_keys_are_balanced(drawn):
    """Each share is within four standard errors of equal."""
    for task, values in (("instrument", INSTRUMENTS), ("metre", METRE_NAMES), ("key_signature", SIGNATURES)):
        equal = 1 / len(values)
        for value in values:
            assert abs(share(drawn, task, value) - equal) < 4 * (equal * (1 - equal) / len(drawn)) ** 0.5
    assert share(drawn, "texture", "four voices") == pytest.approx(0.1, abs=0.02)


def test_neither_speed_nor_instrument_nor_key_tells_the_metre(drawn):
    """The best threshold on the tempo, and the best guess from each other label, are at chance."""
    metres = np.array([clip.classes["metre"] for clip in drawn])
    tempi = np.array([int(clip.record["BPM"]) for clip in drawn])
    assert (tempi.min(), tempi.max()) == (70, 130)
    best = max(
        np.mean(metres == np.where(tempi < edge, low, high))
        for edge in range(75, 130, 5)
        for low in range(3)
        for high in range(3)
    )
    assert best < 1 / 3 + 0.04
    for other in ("instrument", "key_signature"):
        table = np.zeros((12, 3))
        for clip in drawn:
            table[clip.classes[other], clip.classes["metre"]] += 1
        assert table.max(1).sum() / len(drawn) < 1 / 3 + 0.04
    # The number of voices does tell something, and no more than this: no compound tune has four.
    known = baselines(drawn, "metre")
    assert known["chance"] == pytest.approx(1 / 3)
    assert 0.36 < known["texture"] < 0.41


def test_time_clips_are_what_is_heard_when():
    maker = ClipMaker(many(), "train", time_seconds=12.0)
    by_program = {program: name for name, program in INSTRUMENTS.items()}
    counts, entries = set(), set()
    for number in range(200):
        clip = maker.time_clip(number)
        at = [{by_program[n.program] for n in clip.notes if s <= n.start < s + 1} for s in range(12)]
        assert all(len(names) <= 1 for names in at)
        heard = [name for names in at for name in names]
        changes = [s for s in range(1, 12) if at[s] and at[s - 1] and at[s] != at[s - 1]]
        assert clip.labels["first_instrument"] == heard[0]
        assert clip.labels["last_instrument"] == heard[-1]
        assert [(heard[0], 0), *((next(iter(at[s])), s) for s in changes)] == clip.entries
        assert clip.labels["entry"] == f"{dict(clip.entries)[clip.entering]} seconds"
        assert clip.entering != heard[0]
        for half, seconds in (("first_half", range(6)), ("second_half", range(6, 12))):
            names = {name for s in seconds for name in at[s]}
            assert names == {clip.labels[half]} if half in clip.labels else len(names) > 1
        counts.add(len(clip.entries))
        entries.add(clip.labels["entry"])
    assert counts == {2, 3}
    assert entries == {f"{second} seconds" for second in range(3, 10)}


@pytest.mark.parametrize("seconds", [4.0, 5.5, 7.0, 31.0])
def test_time_clips_of_any_length_have_whole_seconds(seconds):
    maker = ClipMaker(many(), "train", time_seconds=seconds)
    for number in range(50):
        starts = [second for _, second in maker.time_clip(number).entries]
        assert all(isinstance(second, int) for second in starts)
        assert min(np.diff([*starts, seconds])) >= max(2, seconds / 4)
