"""Which clips there are, what is played in each, and what is true of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bestiary.shared.core.streams import derive_seed
from bestiary.shared.data.music.render import Note
from bestiary.shared.data.music.scores import METRES, Tune
from bestiary.shared.data.splits import split_of

INSTRUMENTS = {
    "piano": 0,
    "harpsichord": 6,
    "organ": 19,
    "guitar": 24,
    "violin": 40,
    "strings": 48,
    "trumpet": 56,
    "flute": 73,
}
"""Name to its program of General MIDI."""

SIGNATURES = ["no sharps", *(f"{n} sharp{'s' * (n > 1)}" for n in range(1, 7)), "5 flats", "4 flats", "3 flats", "2 flats", "1 flat"]
"""The twelve key signatures by their number of sharps modulo 12; six sharps stand for six flats too."""

MAJOR = ["C", "G", "D", "A", "E", "B", "F#", "Db", "Ab", "Eb", "Bb", "F"]
MINOR = ["A", "E", "B", "F#", "C#", "G#", "D#", "Bb", "F", "C", "G", "D"]
"""Tonics by the same number."""

TEMPI = {"slow": (70, 89), "medium": (90, 109), "fast": (110, 130)}
"""Felt beats a minute, both ends included."""

TEXTURES = {1: "one voice", 4: "four voices"}
METRE_NAMES = tuple(METRES)
CHORDS = {
    (0, 4, 7): "major",
    (0, 3, 7): "minor",
    (0, 3, 6): "diminished",
    (0, 4, 7, 10): "dominant seventh",
    (0, 4, 7, 11): "major seventh",
    (0, 3, 7, 10): "minor seventh",
    (0, 3, 6, 10): "half-diminished seventh",
}
ACCENT, PLAIN = 110, 70
"""Velocity of the notes of a downbeat and of the others. That downbeats are this plain is a simplification."""

CHORALE_SHARE = 0.3
"""Share of four-part chorales among clips of a metre that has any."""


@dataclass
class Clip:
    """A clip before it is played.

    Attributes:
        notes: what is played. seconds: its length. tune: id of the tune (of the first, where there are two).
        tradition: where it comes from. labels: what is true of it, by task.
        record: metadata by category, as a description names them. classes: numbers of the labels for supervised heads.
    """

    notes: list[Note]
    seconds: float
    tune: str
    tradition: str
    labels: dict[str, str]
    record: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)


def split_tunes(tunes: Sequence[Tune]) -> dict[str, list[Tune]]:
    """Tunes of ``train``, ``val`` and ``test``, by the hash of their id: a tune is on one side alone."""
    out: dict[str, list[Tune]] = {"train": [], "val": [], "test": []}
    for tune in tunes:
        out[split_of(tune.id)].append(tune)
    return out


class ClipMaker:
    """Clip number n of a split: a function of these arguments and n.

    The class of metre is drawn first, then one of its tunes, so that the classes are equally frequent. Key, instrument
    and tempo are drawn apart from the tune, so none of them can be guessed from the others; the tempo is that of the
    felt beat, so that a jig is no faster than a waltz.

    Args:
        tunes: of the split.
        split: its name.
        seconds: length of a clip.
        time_seconds: length of a clip of two instruments.
        seed: of the draws.
    """

    def __init__(self, tunes: Sequence[Tune], split: str, seconds: float = 6.0, time_seconds: float = 12.0, seed: int = 0):
        self.split, self.seconds, self.time_seconds, self.seed = split, seconds, time_seconds, seed
        self.pools: dict[str, tuple[list[Tune], list[Tune]]] = {}
        for metre in METRE_NAMES:
            here = [tune for tune in tunes if tune.metre == metre]
            self.pools[metre] = ([t for t in here if len(t.parts) == 1], [t for t in here if len(t.parts) > 1])

    def clip(self, number: int) -> Clip:
        """A clip of one tune on one instrument."""
        rng = np.random.default_rng(derive_seed(self.seed, "clip", self.split, number))
        tune = self._tune(rng)
        program = list(INSTRUMENTS)[int(rng.integers(len(INSTRUMENTS)))]
        tempo, shift = int(rng.integers(70, 131)), int(rng.integers(-5, 7))
        start = self._start(tune, tempo, self.seconds, rng)
        notes = play(tune, program, tempo, shift, start, self.seconds)
        return described(tune, program, tempo, shift, notes, self.seconds)

    def time_clip(self, number: int) -> Clip:
        """A clip of two tunes on two instruments, one after the other; the second enters at a whole second."""
        rng = np.random.default_rng(derive_seed(self.seed, "time", self.split, number))
        first, second = rng.choice(len(INSTRUMENTS), 2, replace=False)
        names = [list(INSTRUMENTS)[int(i)] for i in (first, second)]
        change = int(rng.integers(round(self.time_seconds / 4), round(self.time_seconds * 3 / 4) + 1))
        notes: list[Note] = []
        tunes = []
        for name, begin, end in ((names[0], 0.0, change), (names[1], float(change), self.time_seconds)):
            tune = self._tune(rng)
            tempo, shift = int(rng.integers(70, 131)), int(rng.integers(-5, 7))
            start = self._start(tune, tempo, end - begin, rng)
            played = play(tune, name, tempo, shift, start, end - begin)
            notes += [note._replace(start=note.start + begin) for note in played]
            tunes.append(tune)
        labels = {"first_instrument": names[0], "last_instrument": names[1], "entry": f"{change} seconds"}
        if change <= self.time_seconds / 2:
            labels["second_half"] = names[1]
        if change >= self.time_seconds / 2:
            labels["first_half"] = names[0]
        return Clip(notes, self.time_seconds, tunes[0].id, tunes[0].tradition, labels)

    def _tune(self, rng: np.random.Generator) -> Tune:
        full = [metre for metre in METRE_NAMES if any(self.pools[metre])]
        one, four = self.pools[full[int(rng.integers(len(full)))]]
        pool = four if four and (not one or rng.random() < CHORALE_SHARE) else one
        return pool[int(rng.integers(len(pool)))]

    @staticmethod
    def _start(tune: Tune, tempo: int, seconds: float, rng: np.random.Generator) -> float:
        """A downbeat from which the tune lasts as long as the clip; the first one where it is shorter."""
        needed = seconds * tempo / 60 * tune.felt_beat
        long_enough = [at for at in tune.downbeats if at + needed <= tune.end]
        return long_enough[int(rng.integers(len(long_enough)))] if long_enough else tune.downbeats[0]


def play(tune: Tune, instrument: str, tempo: int, shift: int, start: float, seconds: float) -> list[Note]:
    """The notes of a clip, from a downbeat on; a tune that is over begins again at its first downbeat.

    A note is held for nine tenths of its length, so that one that is repeated is heard to be struck again.

    Args:
        tune: what is played. instrument: a name of :data:`INSTRUMENTS`. tempo: felt beats a minute.
        shift: semitones. start: quarters. seconds: length.
    """
    second = 60 / (tempo * tune.felt_beat)  # of a quarter
    out: list[Note] = []
    begin, at = start, 0.0
    while at < seconds:
        for part in tune.parts:
            for onset, length, pitch in part[bisect_left(part, [begin - 1e-6]) :]:
                time = at + (onset - begin) * second
                if time >= seconds:
                    break
                velocity = ACCENT if on_downbeat(tune, onset) else PLAIN
                out.append(Note(time, length * second * 0.9, int(pitch) + shift, velocity, INSTRUMENTS[instrument]))
        at += (tune.end - begin) * second
        begin = tune.downbeats[0]
    return sorted(out)


def on_downbeat(tune: Tune, onset: float) -> bool:
    """Whether a bar begins there."""
    place = bisect_left(tune.downbeats, onset - 1e-6)
    return place < len(tune.downbeats) and abs(tune.downbeats[place] - onset) < 1e-6


def described(tune: Tune, instrument: str, tempo: int, shift: int, notes: list[Note], seconds: float) -> Clip:
    """A clip with all that is true of it."""
    fifths = (tune.sharps + 7 * shift) % 12
    speed = next(name for name, (low, high) in TEMPI.items() if low <= tempo <= high)
    labels = {
        "instrument": instrument,
        "metre": tune.metre,
        "key_signature": SIGNATURES[fifths],
        "tempo": speed,
        "texture": TEXTURES[len(tune.parts)],
    }
    record: dict[str, Any] = {
        "Instruments": [instrument],
        "Meter": f"{tune.beats}/{tune.unit}",
        "Key signature": SIGNATURES[fifths],
        "BPM": str(tempo),
        "Structure": TEXTURES[len(tune.parts)],
    }
    if tune.mode:
        tonic = (MAJOR if tune.mode == "major" else MINOR)[fifths]
        record["Key"] = labels["key"] = f"{tonic} {tune.mode}"
    if tune.kind:
        record["Genre"] = tune.kind
    first = chord_at(notes, 0.0)
    if len(tune.parts) > 1 and first is not None:
        record["Theory"] = labels["chord"] = chord_name(first, fifths)
    classes = {
        "instrument": list(INSTRUMENTS).index(instrument),
        "metre": METRE_NAMES.index(tune.metre),
        "key_signature": fifths,
        "tempo": list(TEMPI).index(speed),
        "texture": list(TEXTURES).index(len(tune.parts)),
    }
    return Clip(notes, seconds, tune.id, tune.tradition, labels, record, classes)


def chord_at(notes: Sequence[Note], time: float) -> tuple[int, str] | None:
    """(pitch class of the root, quality) of what sounds at a time, if it is a triad or a seventh chord."""
    sounding = {note.pitch % 12 for note in notes if note.start <= time + 1e-6 < note.start + note.duration}
    for root in sorted(sounding):
        shape = tuple(sorted((pitch - root) % 12 for pitch in sounding))
        if shape in CHORDS:
            return root, CHORDS[shape]
    return None


def chord_name(chord: tuple[int, str], fifths: int) -> str:
    """A chord in words, its root spelt as the key signature would have it."""
    sharp, flat = "C C# D D# E F F# G G# A A# B".split(), "C Db D Eb E F Gb G Ab A Bb B".split()
    return f"{(sharp if fifths <= 6 else flat)[chord[0]]} {chord[1]}"
