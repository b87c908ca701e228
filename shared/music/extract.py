"""Tempo, beats, key and chords of audio, by librosa; by madmom and essentia where they are installed."""

from __future__ import annotations

import importlib.util
import itertools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.audio.files import duration, read_audio
from bestiary.shared.core.errors import BadDataError, ConfigError, require
from bestiary.shared.music.records import MODES, Chord, Pitch, Record, Value, check_value, name_chord, name_pitch

RATE = 22050
HOP = 512
TOOLS = ("librosa", "madmom", "essentia")

PROFILES = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
"""How well each note fits a key whose tonic is the first, by listeners' ratings. Krumhansl & Kessler 1982."""

TRIADS: dict[str, tuple[int, ...]] = {"major": (0, 4, 7), "minor": (0, 3, 7)}
STAY = 0.7
"""Chance that a chord goes on at the next beat: ours; it takes single odd beats out."""

SHARPNESS = 12.0
"""How much likelier a beat is under a template that fits it better by one: ours."""

QUIET = 1e-4
"""Root mean square of a beat below which there is nothing to hear."""


def installed_tools() -> list[str]:
    """Those of :data:`TOOLS` that are on this machine."""
    return [name for name in TOOLS if importlib.util.find_spec(name) is not None]


def check_tools(tools: Sequence[str] | None) -> list[str]:
    """These tools, each once and in the order of :data:`TOOLS`; None is all that are installed.

    Raises:
        ConfigError: for a tool that is unknown or not installed.
    """
    there = installed_tools()
    for name in tools or ():
        if name not in TOOLS:
            raise ConfigError(f"there is no tool {name!r}; tools are {', '.join(TOOLS)}, and librosa is always used")
        if name not in there:
            raise ConfigError(f"{name} is not installed; there are {', '.join(there) or 'none'}")
    return [name for name in there if tools is None or name in tools]


def extract(path: Path | str, tools: Sequence[str] | None = None) -> Record:
    """The record of an audio file.

    Beats, tempo and metre are madmom's where it is used, the key essentia's; all else is librosa's, by the functions
    below. Each value names its tool. ``NAME.txt`` beside the audio is its transcript; ``NAME.json`` maps categories
    (:data:`~bestiary.shared.music.records.CATEGORIES`) to what the user knows, which comes before what is measured.

    Paper: arXiv:2511.10289, stage 2 of MF-Skills. Differs from paper: there chords are Chordino's and lyrics
    Parakeet's; metre and instruments are not measured by librosa, so they are known from madmom or the user alone.

    Args:
        path: the file.
        tools: those to use; None is all that are installed.

    Raises:
        BadDataError: if it is no audio, or a file beside it cannot be used.
        ConfigError: for a tool that is unknown or not installed.
    """
    path = Path(path)
    wanted = check_tools(tools)
    record = measure(read_audio(path, RATE), RATE)
    record.seconds = duration(path)
    if "madmom" in wanted:
        _madmom(path, record)
    if "essentia" in wanted:
        _essentia(path, record)
    beside = path.with_suffix(".txt")
    if beside.is_file():
        record.transcript = _text(beside) or None
    _known(path.with_suffix(".json"), record)
    return record


def measure(samples: np.ndarray, rate: int) -> Record:
    """The record of (N,) samples by librosa alone; what cannot be told (silence, no pulse) is left out."""
    librosa: Any = require("librosa", "audio")
    record = Record(seconds=len(samples) / rate)
    if len(samples) < rate // 2 or float(np.sqrt(np.mean(np.square(samples)))) < QUIET:
        return record
    source = f"librosa {librosa.__version__}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # librosa warns of windows longer than a short clip, which is fine
        found = tempo(samples, rate)
        chroma = chroma_of(samples, rate)
    if found is not None:
        bpm, beats, sure = found
        record.values["BPM"] = Value(round(bpm, 1), source, round(sure, 3))
        record.beats = [round(b, 3) for b in beats]
    best = key_of(chroma.mean(1))
    if best is not None:
        record.values["Key"] = Value(name_pitch(best[0]), f"Krumhansl-Schmuckler on {source}", round(best[1], 3))
    # A beat at either end would leave a chord of no length.
    edges = [b for b in record.beats if 0.05 < b < record.seconds - 0.05]
    if len(edges) < 2:
        edges = list(np.arange(0.5, record.seconds, 0.5))
    record.chords = chords_of(chroma, HOP / rate, [0.0, *edges, record.seconds])
    names = list(dict.fromkeys(chord.name for chord in record.chords if chord.name))
    if names:
        record.values["Theory"] = Value(names, f"triads on {source}")
    return record


def tempo(samples: np.ndarray, rate: int) -> tuple[float, list[float], float] | None:
    """Beats a minute, seconds of the beats, and the share of beats that are as far apart as most; None without four.

    The tempo is the slope through the beats: an autocorrelation's own steps are as wide as 5 %.
    """
    librosa: Any = require("librosa", "audio")
    _, beats = librosa.beat.beat_track(y=samples, sr=rate, hop_length=HOP, units="time")
    if len(beats) < 4:
        return None
    gaps = np.diff(beats)
    usual = float(np.median(gaps))
    sure = float(np.mean(np.abs(gaps - usual) <= 0.1 * usual))
    # The slope of beats that a gap splits is none; the median stands then.
    slope = float(np.polyfit(np.arange(len(beats)), beats, 1)[0])
    period = slope if abs(slope - usual) <= 0.05 * usual else usual
    return 60 / period, [float(b) for b in beats], sure


def chroma_of(samples: np.ndarray, rate: int) -> np.ndarray:
    """(12, T) energy of each note from C, in steps of :data:`HOP` samples; quiet frames are 0.

    What drums leave in the spectrum is taken out first.
    """
    librosa: Any = require("librosa", "audio")
    harmonic = librosa.effects.harmonic(samples, margin=2.0)
    chroma = librosa.feature.chroma_cqt(y=harmonic, sr=rate, hop_length=HOP, norm=None)
    loud = librosa.feature.rms(y=harmonic, frame_length=2048, hop_length=HOP)[0]
    count = min(chroma.shape[1], len(loud))
    return np.where(loud[None, :count] > QUIET, chroma[:, :count], 0.0)


def key_of(profile: np.ndarray) -> tuple[Pitch, float] | None:
    """The key whose profile correlates best with (12,) weights of the notes, and that correlation; None of nothing.

    Krumhansl, Cognitive Foundations of Musical Pitch (1990), the Krumhansl-Schmuckler algorithm.
    """
    if float(np.ptp(profile)) <= 1e-9:
        return None
    scores: dict[Pitch, float] = {}
    for mode in MODES:
        for tonic in range(12):
            scores[tonic, mode] = float(np.corrcoef(np.roll(PROFILES[mode], tonic), profile)[0, 1])
    best = max(scores, key=lambda pitch: scores[pitch])
    return best, max(0.0, min(1.0, scores[best]))


def chords_of(chroma: np.ndarray, step: float, edges: Sequence[float]) -> list[Chord]:
    """Chords between edges (beats), joined where they are the same.

    Each span's mean chroma is compared with 24 triads by cosine, and the likeliest sequence of chords is taken, in
    which a chord goes on with chance :data:`STAY`. A span where nothing sounds has none.

    Args:
        chroma: (12, T). step: seconds of a frame. edges: rising seconds.
    """
    librosa: Any = require("librosa", "audio")
    pitches: list[Pitch] = [(root, mode) for mode in MODES for root in range(12)]
    spans = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    means = []
    for start, end in spans:
        first = min(round(start / step), chroma.shape[1] - 1)
        means.append(chroma[:, first : max(first + 1, round(end / step))].mean(1))
    if not means:
        return []
    levels = np.linalg.norm(means, axis=1)
    likely = np.full((24, len(spans)), 1 / 24)
    for at, (mean, level) in enumerate(zip(means, levels, strict=True)):
        if level > 0:
            fits = np.array([sum(mean[(root + n) % 12] for n in TRIADS[mode]) for root, mode in pitches])
            powers = np.exp(SHARPNESS * fits / (np.sqrt(3) * level))
            likely[:, at] = powers / powers.sum()
    states = librosa.sequence.viterbi_discriminative(likely, librosa.sequence.transition_loop(24, STAY))
    out: list[Chord] = []
    for (start, end), state, level in zip(spans, states, levels, strict=True):
        name = name_chord(pitches[int(state)]) if level > 0 else None
        if out and out[-1].name == name:
            out[-1] = Chord(out[-1].start, round(end, 3), name)
        else:
            out.append(Chord(round(start, 3), round(end, 3), name))
    return out


def _madmom(path: Path, record: Record) -> None:
    """Beats, tempo and metre by madmom's downbeat tracker (3 or 4 beats in a bar; 6/8 is not told from them)."""
    madmom: Any = require("madmom", "audio")
    downbeats: Any = require("madmom.features.downbeats", "audio")
    source = f"madmom {madmom.__version__}"
    activations = downbeats.RNNDownBeatProcessor()(str(path))
    found = np.asarray(downbeats.DBNDownBeatTrackingProcessor(beats_per_bar=[3, 4], fps=100)(activations))
    if len(found) < 4:
        return
    record.beats = [round(float(b), 3) for b in found[:, 0]]
    record.values["BPM"] = Value(round(60 / float(np.median(np.diff(found[:, 0]))), 1), source)
    record.values["Meter"] = Value(f"{int(found[:, 1].max())}/4", source)


def _essentia(path: Path, record: Record) -> None:
    """The key by essentia's KeyExtractor, which wants 44.1 kHz."""
    standard: Any = require("essentia.standard", "audio")
    essentia: Any = require("essentia", "audio")
    note, mode, strength = standard.KeyExtractor()(read_audio(path, 44100))
    spelled = note.replace("#", " sharp").replace("b", " flat")
    sure = round(min(1.0, max(0.0, float(strength))), 3)
    record.values["Key"] = Value(f"{spelled} {mode}", f"essentia {essentia.__version__}", sure)


def _known(path: Path, record: Record) -> None:
    """What the user knows, over what was measured."""
    if not path.is_file():
        return
    try:
        known = json.loads(_text(path))
        json.dumps(known, ensure_ascii=False).encode()  # half a character could not be written again
    except (ValueError, RecursionError) as error:
        raise BadDataError(f"{path} is not JSON: {error}") from error
    if not isinstance(known, dict):
        raise BadDataError(f"{path} is no object of categories and values")
    for category, value in known.items():
        found = Value(value, "user")
        check_value(category, found, str(path))
        record.values[category] = found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path} is not UTF-8") from error
