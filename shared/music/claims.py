"""What a text claims about key, metre, tempo, instruments and chords, and whether the record of the piece agrees."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from bestiary.shared.music.records import TEMPO, Record, read_pitch
from bestiary.shared.rl.rewards.metadata import BPM, KEY, METER, plain

INSTRUMENTS = (
    *("accordion", "acoustic guitar", "bagpipes", "banjo", "bass guitar", "bassoon", "cello", "clarinet", "congas"),
    *("cymbals", "double bass", "drum machine", "drums", "electric guitar", "electric piano", "fiddle", "flute"),
    *("french horn", "guitar", "hammond organ", "harmonica", "harp", "harpsichord", "mandolin", "marimba", "oboe"),
    *("organ", "percussion", "piano", "recorder", "saxophone", "sitar", "strings", "synthesizer", "tabla", "timpani"),
    *("trombone", "trumpet", "tuba", "ukulele", "vibraphone", "viola", "violin", "xylophone"),
)
"""Names that are taken for instruments wherever they stand."""

STEP = re.compile(r"\n+|(?<=[.!?;])\s+(?=[^\s\d])|(?<=[.!?;])\s+(?=\d+[.)] )")
"""Where one step of a text ends and another begins: lines and sentences; a decimal point ends none."""

CHORD = re.compile(r"\b([A-G](?: (?:sharp|flat)|[#♯b♭])?:(?:maj|min)(?:or)?)\b")
HARMONY = re.compile(r"\b(?:chords?|triads?|progressions?|harmon\w+|cadences?)\b", re.IGNORECASE)
OF_KEY = re.compile(r"\b(?:key|tonality)\b[^.;:\d]{0,24}$", re.IGNORECASE)
ELSEWHERE = re.compile(r"\b(?:modulat\w+|relative|parallel|dominant|tonici\w+)\b", re.IGNORECASE)
DENIED = re.compile(
    r"\b(?:no|not|never|without|neither|nor|lacks?|rather than|instead of|\w+n't)\b(?:\W+\w+){0,2}\W*$", re.I
)
INTERVAL = re.compile(r"[ -](?:second|third|sixth|seventh|ninth|pentatonic|interval)s?\b", re.IGNORECASE)
ARTICLE = re.compile(r"(?!\s*(?:key|scale|chord|triad|tonality|is|and|or|with|in|at)\b)\s*[a-z]")
"""Behind "A minor" at the beginning of a sentence: "A minor change" names no key."""


class Claim(NamedTuple):
    """A claim that the record can judge.

    Attributes:
        category: of the record. start, end: where the value stands in the text. said: the value as it stands there.
        right: whether the record agrees.
    """

    category: str
    start: int
    end: int
    said: str
    right: bool


def steps(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence or line that holds anything; the number of an item goes with what follows."""
    edges = [0, *(edge for match in STEP.finditer(text) for edge in match.span()), len(text)]
    out: list[tuple[int, int]] = []
    number = None
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if re.fullmatch(r"\W*\d+\W*", text[start:end]):
            number = start if number is None else number
        elif text[start:end].strip():
            out.append((start if number is None else number, end))
            number = None
    return out


def claims(text: str, record: Record) -> list[Claim]:
    """All claims that the record can judge, in order.

    Values are found and compared by the rules of the verifier ``metadata``: a tempo within 4 %, a key by any spelling,
    a metre exactly. Where a sentence speaks of chords, ``C major`` is one, unless it is said to be the key. An
    instrument is right if its name holds, or is held by, one of the record ("guitar", "electric guitar"). What is
    denied ("no drums"), and keys in a sentence about modulation or relatives, are not judged.
    """
    found: list[Claim] = []
    for start, end in steps(text):
        for category, a, b, right in _step(text[start:end], record):
            if not DENIED.search(text[start : start + a]):
                found.append(Claim(category, start + a, start + b, text[start + a : start + b], right))
    return sorted(found, key=lambda claim: claim.start)


def _step(text: str, record: Record) -> Iterator[tuple[str, int, int, bool]]:
    """Category, start, end, and whether it is right, of the values in one sentence."""
    if "BPM" in record.values:
        bpm = float(record.values["BPM"].value)  # type: ignore[arg-type]
        for match in BPM.finditer(text):
            group = 1 if match[1] else 2
            if float(match[group]) >= 20:  # "tempo in 12/8" is none
                yield "BPM", *match.span(group), abs(float(match[group]) - bpm) <= TEMPO * bpm
    if "Meter" in record.values:
        metre = re.sub(r"\s", "", str(record.values["Meter"].value))
        for match in METER.finditer(text):
            yield "Meter", *match.span(), f"{match[1]}/{match[2]}" == metre
    yield from _pitches(text, record)
    if "Instruments" in record.values:
        yield from _instruments(text, record.texts("Instruments"))


def _pitches(text: str, record: Record) -> Iterator[tuple[str, int, int, bool]]:
    chords = {read_pitch(name) for name in record.texts("Theory")} - {None}
    key = read_pitch(record.texts("Key")[0]) if "Key" in record.values else None
    for match in CHORD.finditer(text):
        if chords:
            yield "Theory", *match.span(), read_pitch(match[1]) in chords
    about_chords, elsewhere = HARMONY.search(text), ELSEWHERE.search(text)
    for match in KEY.finditer(text):
        after = text[match.end() :]
        if INTERVAL.match(after) or (match.start() == 0 and match[1] == "A" and not match[2] and ARTICLE.match(after)):
            continue
        pitch = read_pitch(match[0])
        if about_chords and not OF_KEY.search(text[: match.start()]):
            if chords:
                yield "Theory", *match.span(), pitch in chords
        elif key is not None and not elsewhere:
            yield "Key", *match.span(), pitch == key


def _instruments(text: str, known: list[str]) -> Iterator[tuple[str, int, int, bool]]:
    own = [_singular(name) for name in known]
    taken: list[tuple[int, int]] = []
    for name in sorted(INSTRUMENTS, key=len, reverse=True):
        for match in re.finditer(rf"\b{re.escape(name.removesuffix('s'))}(?:s|es)?\b", text, re.IGNORECASE):
            if any(a < match.end() and match.start() < b for a, b in taken):
                continue
            taken.append(match.span())
            said = _singular(name)
            yield "Instruments", *match.span(), any(said <= other or other <= said for other in own)


def _singular(name: str) -> set[str]:
    return {word.removesuffix("s") for word in plain(name).split()}
