"""Which clips there are, what is played in each, and what is true of it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.streams import derive_seed
from bestiary.shared.data.music.render import Note
from bestiary.shared.data.music.scores import METRES, Tune
from bestiary.shared.data.splits import split_of

CLIPS = 2
"""Raised whenever a clip of the same number would have other notes."""

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

SIGNATURES = ["no sharps", "1 sharp", *(f"{n} sharps" for n in range(2, 7)), *(f"{n} flats" for n in (5, 4, 3, 2))]
SIGNATURES += ["1 flat"]
"""The twelve key signatures by their number of sharps modulo 12; six sharps stand for six flats too."""

# Sharps and flats are words: who compares answers without punctuation would take F# for F.
MAJOR = ["C", "G", "D", "A", "E", "B", "F sharp", "D flat", "A flat", "E flat", "B flat", "F"]
MINOR = ["A", "E", "B", "F sharp", "C sharp", "G sharp", "D sharp", "B flat", "F", "C", "G", "D"]
"""Tonics by the same number."""

SHARP = ["C", "C sharp", "D", "D sharp", "E", "F", "F sharp", "G", "G sharp", "A", "A sharp", "B"]
FLAT = ["C", "D flat", "D", "E flat", "E", "F", "G flat", "G", "A flat", "A", "B flat", "B"]
"""Names of the twelve notes, where the key signature has sharps, and where it has flats."""

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

CHORALE_SHARE = 0.15
"""Share of four-part chorales among clips of a metre that has any. It is about their share of the tunes: compound metre
has none, so that more of them would let the metre be guessed from the number of voices."""


@dataclass
class Clip:
    """A clip before it is played.

    Attributes:
        notes: what is played. seconds: its length. tune: id of the tune, or of each, joined by ``+``.
        tradition: where it (the first one) comes from. labels: what is true of the clip, by task.
        record: metadata by category, as a description names them. classes: numbers of the labels for supervised heads.
        entries: instruments in the order in which they enter, each with its second, where there are several.
        entering: the one of them that the task ``entry`` asks about.
    """

    notes: list[Note]
    seconds: float
    tune: str
    tradition: str
    labels: dict[str, str]
    record: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    entries: list[tuple[str, int]] = field(default_factory=list)
    entering: str = ""


def split_tunes(tunes: Sequence[Tune]) -> dict[str, list[Tune]]:
    """Tunes of ``train``, ``val`` and ``test``, by the hash of their family: a melody is on one side alone."""
    out: dict[str, list[Tune]] = {"train": [], "val": [], "test": []}
    for tune in tunes:
        out[split_of(tune.family or tune.id)].append(tune)
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
        time_seconds: length of a clip of several instruments.
        seed: of the draws.

    Raises:
        BadDataError: if there are no tunes.
    """

    def __init__(
        self, tunes: Sequence[Tune], split: str, seconds: float = 6.0, time_seconds: float = 12.0, seed: int = 0
    ):
        if not tunes:
            raise BadDataError(f"no tune of these scores is in the split {split!r}")
        self.split, self.seconds, self.time_seconds, self.seed = split, seconds, time_seconds, seed
        self.pools: list[tuple[list[Tune], list[Tune]]] = []
        for metre in METRE_NAMES:
            here = [tune for tune in tunes if tune.metre == metre]
            if here:
                self.pools.append(([t for t in here if len(t.parts) == 1], [t for t in here if len(t.parts) > 1]))

    def clip(self, number: int) -> Clip:
        """A clip of one tune on one instrument."""
        rng = np.random.default_rng(derive_seed(self.seed, "clip", self.split, number))
        tune = self._tune(rng)
        instrument = list(INSTRUMENTS)[int(rng.integers(len(INSTRUMENTS)))]
        tempo, shift, notes = self._play(tune, instrument, self.seconds, rng)
        return described(tune, instrument, tempo, shift, notes, self.seconds)

    def time_clip(self, number: int) -> Clip:
        """A clip of two or three tunes, each on another instrument, one after the other, entering at whole seconds."""
        rng = np.random.default_rng(derive_seed(self.seed, "time", self.split, number))
        starts = [0, *self._changes(rng)]
        order = rng.permutation(len(INSTRUMENTS))[: len(starts)]
        entries = [(list(INSTRUMENTS)[int(i)], start) for i, start in zip(order, starts, strict=True)]
        notes: list[Note] = []
        tunes = []
        for (instrument, begin), end in zip(entries, [*starts[1:], self.time_seconds], strict=True):
            tune = self._tune(rng)
            _, _, played = self._play(tune, instrument, end - begin, rng)
            notes += [note._replace(start=note.start + begin) for note in played]
            tunes.append(tune)
        entering, second = entries[1 + int(rng.integers(len(entries) - 1))]
        labels = {"first_instrument": entries[0][0], "last_instrument": entries[-1][0], "entry": f"{second} seconds"}
        if starts[1] >= self.time_seconds / 2:
            labels["first_half"] = entries[0][0]
        if starts[-1] <= self.time_seconds / 2:
            labels["second_half"] = entries[-1][0]
        names = " + ".join(tune.id for tune in tunes)
        return Clip(notes, self.time_seconds, names, tunes[0].tradition, labels, entries=entries, entering=entering)

    def _changes(self, rng: np.random.Generator) -> list[int]:
        """The seconds at which an instrument enters, one or two; each plays a quarter of the clip or more."""
        least = shortest_entry(self.time_seconds)
        latest = int(self.time_seconds - least)
        if latest < 2 * least or rng.random() < 0.5:
            return [int(rng.integers(least, latest + 1))]
        pairs = [(a, b) for a in range(least, latest + 1) for b in range(a + least, latest + 1)]
        return list(pairs[int(rng.integers(len(pairs)))])

    def _tune(self, rng: np.random.Generator) -> Tune:
        one, four = self.pools[int(rng.integers(len(self.pools)))]
        pool = four if four and (not one or rng.random() < CHORALE_SHARE) else one
        return pool[int(rng.integers(len(pool)))]

    @staticmethod
    def _play(tune: Tune, instrument: str, seconds: float, rng: np.random.Generator) -> tuple[int, int, list[Note]]:
        """Tempo, transposition and notes, from a bar from which the tune lasts as long, or else the first."""
        tempo, shift = int(rng.integers(70, 131)), int(rng.integers(-5, 7))
        needed = seconds * tempo / 60 * tune.felt_beat
        starts = [at for at in tune.bars if at + needed <= tune.end] or tune.bars[:1]
        start = starts[int(rng.integers(len(starts)))]
        return tempo, shift, play(tune, instrument, tempo, shift, start, seconds)


def shortest_entry(time_seconds: float) -> int:
    """The least whole seconds that an instrument plays in a clip of several."""
    return max(2, math.ceil(time_seconds / 4))


def play(tune: Tune, instrument: str, tempo: int, shift: int, start: float, seconds: float) -> list[Note]:
    """The notes of a clip, from the beginning of a bar on: an upbeat to it is left out.

    What is over begins again at the first of the tune's whole bars, so that bars are regular however long the clip is.
    A note is held for nine tenths of its length, so that one that is repeated is heard to be struck again.

    Args:
        tune: what is played. instrument: a name of :data:`INSTRUMENTS`. tempo: felt beats a minute.
        shift: semitones. start: quarters, one of the tune's bars. seconds: length.
    """
    second = 60 / (tempo * tune.felt_beat)  # of a quarter
    out: list[Note] = []
    begin, at = start, 0.0
    while at < seconds:
        for part in tune.parts:
            for onset, length, pitch in part[bisect_left(part, [begin - 1e-6]) :]:
                time = at + (onset - begin) * second
                if time >= seconds or onset > tune.end - 1e-6:
                    break
                velocity = ACCENT if on_downbeat(tune, onset) else PLAIN
                held = min(length, tune.end - onset) * second * 0.9
                out.append(Note(time, held, int(pitch) + shift, velocity, INSTRUMENTS[instrument]))
        at += (tune.end - begin) * second
        begin = tune.bars[0]
    return sorted(out)


def on_downbeat(tune: Tune, onset: float) -> bool:
    """Whether one of the tune's whole bars begins there."""
    bars = (onset - tune.bars[0]) / tune.bar
    return abs(bars - round(bars)) < 1e-6


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
    return f"{(SHARP if fifths <= 6 else FLAT)[chord[0]]} {chord[1]}"
