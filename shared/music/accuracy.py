"""How right the extractors are, against records that are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bestiary.shared.music.extract import measure
from bestiary.shared.music.records import TEMPO, Chord, Record, read_pitch

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
    pairs: Iterable[tuple[Any, Record]], rate: int = 22050, extractor: Callable[[Any, int], Record] = measure
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
