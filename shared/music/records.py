"""The record of a piece: what is known of it, by category, and who says so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.rl.rewards.metadata import KEY, METER, NOTES, SIGNS, plain

CATEGORIES = (
    "Genre",
    "BPM",
    "Key",
    "Meter",
    "Structure",
    "Instruments",
    "Vocal character",
    "Lyric themes",
    "Theory",
    "Mix notes",
    "Dynamics",
)
"""The categories of a record. Paper: arXiv:2511.10289, section on GRPO. ``Theory`` holds the chords."""

TONICS = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
"""Names of the twelve notes. Sharps and flats are words: who leaves punctuation out would take F# for F."""

MODES = ("major", "minor")

TEMPO = 0.04
"""Share by which a tempo may be off and still be right: MIREX's, and the verifier ``metadata``'s."""

Pitch = tuple[int, str]
"""Tonic or root, 0 to 11 from C, and ``major`` or ``minor``."""


@dataclass(frozen=True)
class Value:
    """What is known of one category.

    Attributes:
        value: a text, a number (``BPM``), or texts. source: the tool that says so, or ``user``.
        confidence: 0 to 1 as the tool means it, or None where it gives none.
    """

    value: str | float | list[str]
    source: str
    confidence: float | None = None


@dataclass(frozen=True)
class Chord:
    """A chord that sounds from ``start`` to ``end`` seconds; ``name`` None is no chord."""

    start: float
    end: float
    name: str | None


@dataclass
class Record:
    """What is known of one piece.

    Attributes:
        seconds: its length. values: by category, those that are known.
        beats: seconds of its beats. chords: one after the other. transcript: its words, or None.
    """

    seconds: float
    values: dict[str, Value] = field(default_factory=dict)
    beats: list[float] = field(default_factory=list)
    chords: list[Chord] = field(default_factory=list)
    transcript: str | None = None

    def metadata(self) -> dict[str, Any]:
        """Category to value: what the verifier ``metadata`` reads."""
        return {name: self.values[name].value for name in CATEGORIES if name in self.values}

    def texts(self, category: str) -> list[str]:
        """Values of a category as texts; none where it is not known."""
        found = self.values.get(category)
        if found is None:
            return []
        return [str(v) for v in found.value] if isinstance(found.value, list) else [say(found.value)]

    def to_json(self) -> dict[str, Any]:
        """Plain data; :func:`record_from` reads it."""
        return asdict(self)


def say(value: str | float) -> str:
    """A number without a fraction that is zero."""
    return f"{value:g}" if isinstance(value, int | float) else value


def record_from(data: Mapping[str, Any], where: str = "record") -> Record:
    """The record of plain data, checked.

    Args:
        data: as :meth:`Record.to_json` gives it. where: for messages.

    Raises:
        BadDataError: for a key or category that does not exist, or a value that has not the form of its category.
    """
    try:
        values = {name: Value(**value) for name, value in dict(data.get("values") or {}).items()}
        chords = [Chord(**chord) for chord in data.get("chords") or []]
        record = Record(
            values=values, chords=chords, **{k: v for k, v in data.items() if k not in ("values", "chords")}
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise BadDataError(f"{where}: no record of a piece: {error}") from error
    if not _number(record.seconds) or record.seconds < 0:
        raise BadDataError(f"{where}: seconds is {record.seconds!r}")
    for name, value in record.values.items():
        check_value(name, value, where)
    for chord in record.chords:
        if not (0 <= chord.start < chord.end) or (chord.name is not None and read_pitch(chord.name) is None):
            raise BadDataError(
                f"{where}: {chord} is no chord: a start, a later end, and a name such as 'A:min' or none"
            )
    return record


def check_value(category: str, value: Value, where: str) -> None:
    """Raise BadDataError where a value has not the form of its category."""
    if category not in CATEGORIES:
        raise BadDataError(f"{where}: there is no category {category!r}; there are {', '.join(CATEGORIES)}")
    found = value.value
    if category == "BPM":
        good, form = _number(found) and 20 <= float(found) <= 400, "a number from 20 to 400"  # type: ignore[arg-type]
    elif category == "Key":
        good, form = (
            isinstance(found, str) and read_pitch(found) is not None,
            "a tonic with its mode, such as 'E flat major'",
        )
    elif category == "Meter":
        good, form = isinstance(found, str) and METER.fullmatch(found) is not None, "a time signature, such as '6/8'"
    else:
        texts = found if isinstance(found, list) else [found]
        good, form = bool(texts) and all(isinstance(t, str) and plain(t).strip() for t in texts), "a text or texts"
    if not good:
        raise BadDataError(f"{where}: {category} is {form}, not {found!r}")
    sure = value.confidence
    if sure is not None and not (_number(sure) and 0 <= sure <= 1):
        raise BadDataError(f"{where}: the confidence of {category} is from 0 to 1, not {sure!r}")


def read_pitch(text: str) -> Pitch | None:
    """A key or a chord by its name, (0, "major") of ``C major`` or ``C:maj``, in the spellings of :data:`KEY`."""
    match = KEY.fullmatch(text.strip().replace(":", " "))
    if match is None:
        return None
    note, sign, mode = match.groups()
    minor = mode == "m" or mode.casefold().startswith("min")
    return (NOTES[note] + SIGNS.get((sign or "").casefold(), 0)) % 12, MODES[minor]


def name_pitch(pitch: Pitch) -> str:
    """``E flat minor`` of (3, "minor")."""
    return f"{TONICS[pitch[0]]} {pitch[1]}"


def name_chord(pitch: Pitch) -> str:
    """``E flat:min`` of (3, "minor"), nearly in the notation of Harte et al. (ISMIR 2005).

    The colon keeps chords apart from keys: a description that names five chords as ``C major`` names five keys.
    """
    return f"{TONICS[pitch[0]]}:{pitch[1][:3]}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
