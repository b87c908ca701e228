"""How right the extractors are, against records that are exact.

python -m bestiary.shared.music.accuracy                     # score_qa's 480 clips of val; writes docs/benchmarks/
python -m bestiary.shared.music.accuracy --clips 256 --seconds 30
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.audio.files import resample
from bestiary.shared.core.command_line import short_answers
from bestiary.shared.core.errors import ConfigError, require
from bestiary.shared.core.runs import environment
from bestiary.shared.data.music.clips import TEXTURES, Clip, chord_at
from bestiary.shared.data.music.score_qa import ScoreQA
from bestiary.shared.data.music.store import maker
from bestiary.shared.music.extract import RATE, measure
from bestiary.shared.music.records import MODES, TEMPO, Chord, Record, Value, name_chord, read_pitch
from bestiary.shared.testing import bench

SECONDS = 6.0
"""Length of a clip of score_qa as it comes."""

OCTAVES = (1 / 3, 1 / 2, 2, 3)

WEIGHTS = {"same": 1.0, "fifth": 0.5, "relative": 0.3, "parallel": 0.2, "other": 0.0}
"""MIREX's weights of a key by how it stands to the right one."""


def tempo_match(found: float, truth: float) -> str:
    """``same``, ``octave`` (half, double, a third or three times the right tempo), or ``other``."""
    if abs(found - truth) <= TEMPO * truth:
        return "same"
    return "octave" if any(abs(found - f * truth) <= TEMPO * f * truth for f in OCTAVES) else "other"


def key_match(found: str, truth: str) -> str:
    """How a key stands to the right one, a key of :data:`WEIGHTS`.

    A fifth is a key of the same mode whose tonic is a fifth above the right one, as in MIREX's audio key task.
    """
    (tonic, mode), (right, its) = _pitch(found), _pitch(truth)
    if mode == its:
        return {0: "same", 7: "fifth"}.get((tonic - right) % 12, "other")
    if tonic == right:
        return "parallel"
    # The relative minor's tonic is a minor third below.
    return "relative" if (tonic - right) % 12 == (9 if its == "major" else 3) else "other"


def chord_overlap(found: Sequence[Chord], truth: Sequence[Chord]) -> float | None:
    """The share of the time that has a chord in truth in which the same one is found; None where there is no such time.

    Enharmonic names are the same. Time in which truth has no chord is left out.
    """
    total = sum(t.end - t.start for t in truth if t.name)
    if not total:
        return None
    hit = 0.0
    for right in truth:
        for guess in found:
            if right.name and guess.name and _pitch(guess.name) == _pitch(right.name):
                hit += max(0.0, min(right.end, guess.end) - max(right.start, guess.start))
    return hit / total


def accuracy(
    pairs: Iterable[tuple[Any, Record]], rate: int = RATE, extractor: Callable[[Any, int], Record] = measure
) -> dict[str, float]:
    """Accuracies over clips whose truth is known.

    Args:
        pairs: (audio, truth); audio is what the extractor takes, (N,) samples for the default one. What the truth does
            not know is not counted.
        rate: samples a second.
        extractor: (audio, rate) to the record found.

    Returns:
        ``tempo`` and ``tempo_or_octave``, ``key`` and ``key_weighted`` (MIREX), ``chords`` (mean over clips), each
        where any truth has it, and the numbers of clips behind them (``tempo_n``, ``key_n``, ``chords_n``). What is
        not found counts as wrong.
    """
    tempos: list[str] = []
    keys: list[str] = []
    overlaps: list[float] = []
    for audio, truth in pairs:
        found = extractor(audio, rate)
        guess, right = found.values.get("BPM"), truth.values.get("BPM")
        if right is not None:
            tempos.append("other" if guess is None else tempo_match(float(guess.value), float(right.value)))  # type: ignore[arg-type]
        guess, right = found.values.get("Key"), truth.values.get("Key")
        if right is not None:
            keys.append("other" if guess is None else key_match(str(guess.value), str(right.value)))
        overlap = chord_overlap(found.chords, truth.chords)
        if overlap is not None:
            overlaps.append(overlap)
    out: dict[str, float] = {}
    if tempos:
        out["tempo"] = tempos.count("same") / len(tempos)
        out["tempo_or_octave"] = sum(match != "other" for match in tempos) / len(tempos)
        out["tempo_n"] = len(tempos)
    if keys:
        out["key"] = keys.count("same") / len(keys)
        out["key_weighted"] = float(np.mean([WEIGHTS[match] for match in keys]))
        out["key_n"] = len(keys)
    if overlaps:
        out["chords"] = float(np.mean(overlaps))
        out["chords_n"] = len(overlaps)
    return out


def _pitch(name: str) -> tuple[int, str]:
    pitch = read_pitch(name)
    if pitch is None:
        raise ValueError(f"{name!r} is no key or chord such as 'A minor'")
    return pitch


# ---------------------------------------------------------------------------------------------- on score_qa's clips


def truth_of(clip: Clip) -> Record:
    """What is true of a clip of several voices or one: its tempo, its key where the source declares one, its triads.

    A triad sounds from one onset to the next; where the notes are no major or minor triad, no chord is known.
    """
    record = Record(clip.seconds, {"BPM": Value(float(clip.record["BPM"]), "score")})
    if "Key" in clip.record:
        record.values["Key"] = Value(clip.record["Key"], "score")
    onsets = sorted({round(note.start, 6) for note in clip.notes if note.start < clip.seconds})
    for start, end in itertools.pairwise([*onsets, clip.seconds]):
        found = chord_at(clip.notes, start)
        if found is not None and found[1] in MODES:
            record.chords.append(Chord(start, end, name_chord(found)))
    return record


def constant(truths: Sequence[Record]) -> dict[str, float]:
    """The accuracies of the best answer that is the same for every clip: what they are to be compared with."""
    tempos = [float(t.values["BPM"].value) for t in truths]  # type: ignore[arg-type]
    best = max(Counter(tempo_match(guess, t) for t in tempos)["same"] for guess in np.arange(20.0, 400.0, 0.25))
    keys = Counter(read_pitch(str(t.values["Key"].value)) for t in truths if "Key" in t.values)
    sung = Counter[Any]()
    for chord in (chord for t in truths for chord in t.chords):
        sung[read_pitch(str(chord.name))] += chord.end - chord.start  # type: ignore[assignment]
    out = {"tempo": best / len(tempos)}
    if keys:
        out["key"] = max(keys.values()) / sum(keys.values())
    if sung:
        out["chords"] = max(sung.values()) / sum(sung.values())
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Score :func:`~bestiary.shared.music.extract.measure` on held-out clips, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=480, help="the first so many of val")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of a clip")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), metavar="DIR")
    given = parser.parse_args(arguments)
    with short_answers():
        if given.clips < 1:
            raise ConfigError(f"--clips is 1 or more, not {given.clips}")
        result = scored(given.clips, given.seconds)
        for row in result["rows"]:
            print(
                "  ".join(
                    f"{name} {value if isinstance(value, str | int) else f'{value:.3f}'}" for name, value in row.items()
                )
            )
        length = "" if given.seconds == SECONDS else f"_{given.seconds:g}s"
        bench.save(result, given.out, f"extractors{length}")


def scored(count: int, seconds: float) -> dict[str, Any]:
    """The accuracies over the first clips of ``val``, over those of one voice and of four, and what a constant gets."""
    librosa: Any = require("librosa", "audio")
    data = ScoreQA(held_out_clips=count, seconds=seconds)
    data.check()
    store = data.store("clip", "val")
    store.render()
    clips = maker("val", data.options)
    voices: list[str] = []
    pairs: list[tuple[Any, Record]] = []
    measure(np.random.default_rng(0).normal(size=RATE).astype(np.float32), RATE)  # compiled before the clock runs
    began = time.process_time()
    for number in range(count):
        clip = clips.clip(number)
        voices.append(clip.record["Structure"])
        pairs.append((measure(resample(store[number], data.rate, RATE), RATE), truth_of(clip)))
    cpu = time.process_time() - began
    rows: list[dict[str, Any]] = []
    for name in ("all", *TEXTURES.values()):
        here = [pair for pair, voice in zip(pairs, voices, strict=True) if name in ("all", voice)]
        if here:
            numbers = accuracy(here, extractor=lambda found, rate: found)
            rows.append({"clips": name, "n": len(here), **{key: round(value, 4) for key, value in numbers.items()}})
    rows.append({"clips": "all", "by": "the best constant", "n": count})
    rows[-1] |= {key: round(value, 4) for key, value in constant([truth for _, truth in pairs]).items()}
    return {
        "what": "tempo, key and chords by librosa against the scores that the clips were rendered from",
        **environment(),
        "librosa": librosa.__version__,
        "processor": bench.processor(),
        "data": {"name": data.revision, "split": "val", "seconds": seconds, "rate": data.rate},
        "cpu_s_a_clip": round(cpu / count, 3),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
