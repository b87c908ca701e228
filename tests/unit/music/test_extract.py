"""Extractors against music made for the test, whose tempo, key and chords are known."""

import importlib.machinery
import json
import sys
import types

import numpy as np
import pytest
import soundfile

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.music import extract as module
from bestiary.shared.music.accuracy import accuracy, chord_overlap, key_match, tempo_match
from bestiary.shared.music.extract import chords_of, extract, key_of, measure
from bestiary.shared.music.records import Chord, Record, Value, name_chord, name_pitch, record_from

pytest.importorskip("librosa")


def truth(seconds, chords=(), **values):
    return Record(seconds, {k: Value(v, "made") for k, v in values.items()}, chords=[Chord(*c) for c in chords])


@pytest.mark.parametrize("bpm", [73.0, 96.5, 120.0, 141.0])
def test_tempo_of_a_click_track(synth, bpm):
    """Within one percent: finer than an autocorrelation at this hop can tell."""
    record = measure(synth.clicks(bpm), synth.rate)
    found = record.values["BPM"]
    assert tempo_match(found.value, bpm) == "same"
    assert found.value == pytest.approx(bpm, rel=0.01)
    assert found.confidence > 0.9
    assert found.source.startswith("librosa 0")
    # Beats stand on clicks.
    clicks = np.arange(0.25, 12, 60 / bpm)
    assert np.abs(np.array(record.beats)[:, None] - clicks).min(1).max() < 0.05


@pytest.mark.parametrize(("tonic", "mode"), [(0, "major"), (6, "major"), (9, "minor"), (3, "minor")])
def test_key_and_chords_of_cadences(synth, tonic, mode):
    samples, chords = synth.cadences(tonic, mode)
    record = measure(samples, synth.rate)
    assert key_match(record.values["Key"].value, name_pitch((tonic, mode))) == "same"
    assert 0.5 < record.values["Key"].confidence <= 1
    assert chord_overlap(record.chords, [Chord(*c) for c in chords]) > 0.85
    assert set(record.values["Theory"].value) >= {name_chord((tonic, mode)), name_chord(((tonic + 7) % 12, "major"))}
    assert record.chords[0].start == 0
    assert record.chords[-1].end == pytest.approx(len(samples) / synth.rate, abs=1e-3)
    assert all(a.end == b.start for a, b in zip(record.chords, record.chords[1:], strict=False))


def test_key_by_the_published_profiles():
    """C major's own profile, turned by n, is the key on n; and flat weights are no key."""
    for tonic in range(12):
        for mode, profile in module.PROFILES.items():
            best, sure = key_of(np.roll(profile, tonic))
            assert best == (tonic, mode)
            assert sure == pytest.approx(1)
    assert key_of(np.ones(12)) is None
    # Counts of the notes of God Save the Queen's first phrase in G: g g a f# g a, b b c b a g, a g f# g.
    counts = np.zeros(12)
    for note in (7, 7, 9, 6, 7, 9, 11, 11, 0, 11, 9, 7, 9, 7, 6, 7):
        counts[note] += 1
    assert key_of(counts)[0] == (7, "major")


def test_chords_take_single_odd_beats_out_and_leave_silence_empty():
    c, g = np.zeros(12), np.zeros(12)
    c[[0, 4, 7]], g[[7, 11, 2]] = 1, 1
    chroma = np.stack([c, c, 0.47 * c + 0.53 * g, c, c, g, g, g, 0 * c, 0 * c], 1)
    found = chords_of(chroma, 0.5, [n / 2 for n in range(11)])
    assert found == [Chord(0.0, 2.5, "C:maj"), Chord(2.5, 4.0, "G:maj"), Chord(4.0, 5.0, None)]


@pytest.mark.parametrize("samples", [np.zeros(22050 * 3, np.float32), np.ones(100, np.float32)])
def test_nothing_is_said_of_silence_and_of_a_moment(samples):
    record = measure(samples, 22050)
    assert (record.values, record.beats, record.chords) == ({}, [], [])


@pytest.mark.parametrize("beats", [[0.0, 0.0004, 1.0, 2.0, 2.9996], [0.01, 1.0, 2.0, 3.0]])
def test_beats_at_either_end_leave_no_chord_without_length(monkeypatch, synth, beats):
    """A record with one would be refused when it is read again."""
    monkeypatch.setattr(module, "tempo", lambda samples, rate: (60.0, beats, 1.0))
    chroma = np.random.default_rng(0).uniform(size=(12, 400)) * np.repeat([1, 0] * 200, 1)
    monkeypatch.setattr(module, "chroma_of", lambda samples, rate: chroma)
    record = measure(synth.notes([60], 3.0003), synth.rate)
    assert record.chords[0].start == 0
    assert record_from(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize("seconds", [0.5, 0.6, 1.0, 1.7])
def test_short_sounds(seconds):
    noise = np.random.default_rng(0).normal(size=int(22050 * seconds)).astype(np.float32)
    record = measure(noise, 22050)
    assert record_from(record.to_json()) == record


def test_a_held_note_has_no_tempo_to_speak_of_and_does_not_fail(synth):
    t = np.arange(22050 * 4) / 22050
    record = measure((0.3 * np.sin(2 * np.pi * 220 * t)).astype(np.float32), 22050)
    assert "BPM" not in record.values or record.values["BPM"].confidence is not None


@pytest.fixture
def song(synth, tmp_path):
    samples, _ = synth.cadences(2, "major", 2)
    soundfile.write(tmp_path / "song.wav", samples, synth.rate)
    return tmp_path / "song.wav"


def test_a_file_and_what_lies_beside_it(song):
    song.with_suffix(".txt").write_text(" so many words \n")
    song.with_suffix(".json").write_text(json.dumps({"Instruments": ["flute", "harp"], "BPM": 61, "Genre": "waltz"}))
    record = extract(song, ["librosa"])
    assert record.seconds == pytest.approx(8.0, abs=0.01)
    assert record.transcript == "so many words"
    assert record.values["Instruments"] == Value(["flute", "harp"], "user")
    assert record.values["BPM"] == Value(61, "user")
    assert record.values["Key"].value == "D major"
    assert record_from(json.loads(json.dumps(record.to_json()))) == record


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "song.json is not JSON"),
        ("[1]", "is no object of categories"),
        ('{"Tempo": 3}', "there is no category 'Tempo'"),
        ('{"Key": "G"}', "Key is a tonic with its mode"),
        ('{"BPM": "fast"}', "BPM is a number from 20 to 400"),
        ('{"Meter": "waltz"}', "Meter is a time signature"),
        ('{"Genre": []}', "Genre is a text or texts"),
    ],
)
def test_a_wrong_file_beside_it(song, content, words, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda samples, rate: Record(1.0))
    song.with_suffix(".json").write_text(content)
    with pytest.raises(BadDataError, match=words):
        extract(song)


def test_tools_that_are_not_there(song, monkeypatch):
    with pytest.raises(ConfigError, match="no tool 'aubio'; tools are librosa, madmom, essentia"):
        extract(song, ["aubio"])
    monkeypatch.setattr(module, "installed_tools", lambda: ["librosa"])
    with pytest.raises(ConfigError, match="madmom is not installed; there are librosa"):
        extract(song, ["madmom"])


def test_madmom_and_essentia_are_used_where_they_are(song, monkeypatch):
    """Stand-ins with the functions of the two packages that are called, as their documentation has them."""

    def fake(name, **members):
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        made.__version__ = "9"
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)

    class Activations:
        def __call__(self, path):
            assert path == str(song)
            return "activations"

    class Tracker:
        def __init__(self, beats_per_bar, fps):
            assert (beats_per_bar, fps) == ([3, 4], 100)

        def __call__(self, activations):
            assert activations == "activations"
            return np.array([[0.5 * n, n % 3 + 1] for n in range(9)])

    class KeyExtractor:
        def __call__(self, samples):
            assert len(samples) == pytest.approx(8 * 44100, abs=100)
            return "Bb", "minor", 0.8

    fake("madmom")
    fake("madmom.features")
    fake("madmom.features.downbeats", RNNDownBeatProcessor=Activations, DBNDownBeatTrackingProcessor=Tracker)
    fake("essentia")
    fake("essentia.standard", KeyExtractor=KeyExtractor)
    monkeypatch.setattr(module, "measure", lambda samples, rate: Record(1.0, {"BPM": Value(1.0, "librosa")}))
    values = extract(song).values
    assert values["BPM"] == Value(120.0, "madmom 9")
    assert values["Meter"] == Value("3/4", "madmom 9")
    assert values["Key"] == Value("B flat minor", "essentia 9", 0.8)
    assert extract(song, ["librosa"]).values == {"BPM": Value(1.0, "librosa")}


# ------------------------------------------------------------------ accuracy


@pytest.mark.parametrize(
    ("found", "match"), [(104, "same"), (95, "other"), (105, "other"), (51, "octave"), (299, "octave"), (150, "other")]
)
def test_tempo_within_four_percent_and_octaves_apart(found, match):
    assert tempo_match(found, 100) == match


@pytest.mark.parametrize(
    ("found", "right", "match"),
    [
        ("C major", "C major", "same"),
        ("B sharp major", "C major", "same"),
        ("G major", "C major", "fifth"),
        ("F major", "C major", "other"),
        ("A minor", "C major", "relative"),
        ("C major", "A minor", "relative"),
        ("C minor", "C major", "parallel"),
        ("E minor", "A minor", "fifth"),
        ("E minor", "C major", "other"),
    ],
)
def test_keys_as_mirex_has_them(found, right, match):
    """https://www.music-ir.org/mirex: 1, 0.5 for a perfect fifth, 0.3 relative, 0.2 parallel."""
    assert key_match(found, right) == match


def test_overlap_of_chords_by_hand():
    right = [Chord(0, 2, "C major"), Chord(2, 3, None), Chord(3, 5, "A sharp minor")]
    found = [Chord(0, 1, "C:maj"), Chord(1, 4, "B flat minor"), Chord(4, 6, "C major")]
    assert chord_overlap(found, right) == pytest.approx(2 / 4)
    assert chord_overlap(found, [Chord(0, 2, None)]) is None


def test_accuracy_counts_what_truth_knows():
    """Found by an extractor of our own: tempo right, an octave off, missing; key right, a fifth off."""
    guesses = {
        "a": truth(9, BPM=100.0, Key="C major"),
        "b": truth(9, BPM=50.0, Key="G major"),
        "c": truth(9),
    }
    pairs = [
        ("a", truth(9, BPM=100.0, Key="C major")),
        ("b", truth(9, BPM=100.0, Key="C major")),
        ("c", truth(9, [(0, 1, "C major")], BPM=100.0)),
    ]
    found = accuracy(pairs, extractor=lambda audio, rate: guesses[audio])
    assert found == {
        "tempo": 1 / 3,
        "tempo_or_octave": 2 / 3,
        "tempo_n": 3,
        "key": 0.5,
        "key_weighted": 0.75,
        "key_n": 2,
        "chords": 0.0,
        "chords_n": 1,
    }
    assert accuracy([]) == {}
