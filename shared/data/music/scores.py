"""Scores of music21's corpus as plain lists of notes, parsed once and kept.

Times are in quarter notes from the tune's first note; pitches are MIDI numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import MissingExtraError, require
from bestiary.shared.data.assets import data_root, locked
from bestiary.shared.data.music.pool import each

PARSER = 1
"""Raised whenever a parsed tune would come out otherwise."""

COLLECTIONS = {
    "bach": ("bach", "*.mxl", "German chorales"),
    "ryan": ("ryansMammoth", "*.abc", "American fiddle tunes"),
    "oneill": ("oneills1850", "*.abc", "Irish tunes"),
}
"""Collection to its folder in music21's corpus, the files, and the tradition. All are out of copyright; the Essen folk
songs, the corpus's largest collection, are left out because their licence is non-commercial."""

METRES = {
    "duple": ((2, 4), (4, 4), (2, 2), (4, 2)),
    "triple": ((3, 4), (3, 2)),
    "compound": ((6, 8), (9, 8), (12, 8), (6, 4)),
}
"""Class of metre to time signatures; tunes in others are left out."""

KINDS = ("reel", "jig", "hornpipe", "strathspey", "clog", "march", "waltz", "polka", "air", "fling", "quickstep")
LEAST_BARS = 8


@dataclass
class Tune:
    """One tune, or one chorale.

    Attributes:
        id: collection, file and number. collection: a key of :data:`COLLECTIONS`. title: as printed.
        kind: dance or form (``reel``, ``chorale``), or empty.
        sharps: of the printed key signature, flats negative.
        tonic, mode: of the declared key, where the source is to be trusted for it; else empty.
        beats, unit: the time signature.
        parts: of each voice its notes, ``[onset, duration, pitch]``.
        downbeats: onsets of whole bars. end: of the last note.
        form: letters of the sections, repeats written out (``AABB``); empty where there are no repeats.
    """

    id: str
    collection: str
    title: str
    kind: str
    sharps: int
    tonic: str
    mode: str
    beats: int
    unit: int
    parts: list[list[list[float]]]
    downbeats: list[float]
    end: float
    form: str = ""

    @property
    def metre(self) -> str:
        """``duple``, ``triple`` or ``compound``."""
        return next(name for name, signs in METRES.items() if (self.beats, self.unit) in signs)

    @property
    def felt_beat(self) -> float:
        """Quarters of the beat one would tap: three of the units in a compound metre, else one unit."""
        return 4 / self.unit * (3 if self.metre == "compound" else 1)

    @property
    def bar(self) -> float:
        """Quarters of a bar."""
        return self.beats * 4 / self.unit

    @property
    def tradition(self) -> str:
        """Where the music comes from."""
        return COLLECTIONS[self.collection][2]


@dataclass
class Scores:
    """All usable tunes, and why others are not.

    Attributes:
        tunes: sorted by id. rejected: reason to number. revision: of what they were parsed from and by.
    """

    tunes: list[Tune]
    rejected: Counter[str] = field(default_factory=Counter)
    revision: str = ""


def check_music21() -> None:
    """Raise MissingExtraError if music21 is not installed; it is not imported."""
    if find_spec("music21") is None:
        raise MissingExtraError("music21 is not installed. It comes with the extra 'audio': pip install -e '.[audio]'")


def scores_revision() -> str:
    """Version of music21, of the parser, and the collections; known without music21 too."""
    try:
        corpus = version("music21")
    except PackageNotFoundError:
        corpus = "absent"
    digest = hashlib.sha256(f"{corpus}|{PARSER}|{sorted(COLLECTIONS)}|{METRES}|{LEAST_BARS}".encode()).hexdigest()
    return f"music21-{corpus}-{digest[:8]}"


def load_scores(workers: int | None = None) -> Scores:
    """The tunes, from the cache, or parsed now (some four minutes of CPU time, once).

    Args:
        workers: processes that parse; None is one a core, 0 parses here.
    """
    check_music21()
    folder = data_root() / "music" / f"scores-{scores_revision()}"
    files = corpus_files()
    chunks = chunked(files)
    names = [folder / f"{number:03d}.json" for number in range(len(chunks))]
    if not all(name.is_file() for name in names):
        with locked(folder.name):
            folder.mkdir(parents=True, exist_ok=True)
            jobs = [(name, chunk) for name, chunk in zip(names, chunks, strict=True) if not name.is_file()]
            each(parse_chunk, jobs, workers, "reading scores")
    tunes: list[Tune] = []
    rejected: Counter[str] = Counter()
    for name in names:
        found = json.loads(name.read_text())
        tunes += [Tune(**values) for values in found["tunes"]]
        rejected.update(found["rejected"])
    kept = distinct(sorted(tunes, key=lambda tune: tune.id))
    rejected["same tune again"] += len(tunes) - len(kept)
    return Scores(kept, rejected, scores_revision())


def corpus_files() -> list[tuple[str, str]]:
    """(collection, path) of the files, in a fixed order."""
    spec = find_spec("music21")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(next(iter(spec.submodule_search_locations))) / "corpus"
    return [
        (name, str(path))
        for name, (folder, pattern, _) in COLLECTIONS.items()
        for path in sorted((root / folder).glob(pattern))
    ]


def chunked(files: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Files in pieces of work of like length: one of O'Neill's holds as many tunes as forty others."""
    out: list[list[tuple[str, str]]] = []
    for collection, path in files:
        if not out or out[-1][0][0] != collection or len(out[-1]) >= (1 if collection == "oneill" else 40):
            out.append([])
        out[-1].append((collection, path))
    return out


def distinct(tunes: Sequence[Tune]) -> list[Tune]:
    """Without tunes that have the title or the notes of one before: a tune must not be on both sides of a split."""
    titles: set[str] = set()
    melodies: set[str] = set()
    out = []
    for tune in tunes:
        title = plain_title(tune.title) if tune.collection != "bach" else tune.id
        first = tune.parts[0][:24]
        # Intervals and rhythm of the opening: the same melody in another key is the same tune.
        steps = [(round(b[0] - a[0], 3), b[2] - a[2]) for a, b in zip(first, first[1:], strict=False)]
        melody = hashlib.sha256(repr(steps).encode()).hexdigest()
        if title in titles or melody in melodies:
            continue
        titles.add(title)
        melodies.add(melody)
        out.append(tune)
    return out


def plain_title(title: str) -> str:
    """A title without the dance behind its dash, articles, case and punctuation."""
    words = re.findall(r"[a-z]+", title.split("--")[0].casefold().replace("'", ""))
    return " ".join(word for word in words if word not in ("the", "a", *KINDS, *(f"{kind}s" for kind in KINDS)))


def parse_chunk(job: tuple[Path, list[tuple[str, str]]]) -> None:
    """Parse some files and write their tunes, aside and then renamed."""
    file, sources = job
    tunes, rejected = [], Counter()
    for collection, path in sources:
        for name, score in read_file(collection, path):
            found = score if isinstance(score, str) else tune_of(collection, name, score)
            if isinstance(found, str):
                rejected[found] += 1
            else:
                tunes.append(asdict(found))
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(json.dumps({"tunes": tunes, "rejected": rejected}))
    os.replace(aside, file)


def read_file(collection: str, path: str) -> Iterator[tuple[str, Any]]:
    """(id, music21 score) of each tune of a file; a reason in place of a score that cannot be read."""
    converter: Any = require("music21.converter", "audio")
    stem = f"{collection}/{Path(path).stem}"
    try:
        parsed = converter.parse(path)
    except Exception:  # music21 has no common error for files it cannot make sense of
        yield stem, "unreadable"
        return
    scores = list(parsed.scores) if parsed.__class__.__name__ == "Opus" else [parsed]
    for number, score in enumerate(scores):
        yield (f"{stem}#{number}" if len(scores) > 1 else stem), score


def tune_of(collection: str, name: str, score: Any) -> Tune | str:
    """A tune, or why it is not usable."""
    parts = list(score.parts)
    if collection == "bach" and len(parts) != 4:
        return "not in four parts"
    if not parts:
        return "no notes"
    flat = [part.flatten() for part in parts]
    metres = {(sign.numerator, sign.denominator) for part in flat for sign in part.getElementsByClass("TimeSignature")}
    if len(metres) != 1:
        return "no metre, or several"
    beats, unit = metres.pop()
    if not any((beats, unit) in signs for signs in METRES.values()):
        return f"metre {beats}/{unit}"
    signatures = {sign.sharps for part in flat for sign in part.getElementsByClass("KeySignature")}
    if len(signatures) != 1:
        return "no key signature, or several"
    sharps = signatures.pop()
    if not -6 <= sharps <= 6:
        return "more than six sharps or flats"
    bars = [bar for bar in parts[0].getElementsByClass("Measure") if bar.duration.quarterLength]
    whole = beats * 4 / unit
    downbeats = [float(bar.offset) for bar in bars if not bar.paddingLeft and abs(bar.duration.quarterLength - whole) < 1e-6]
    if len(downbeats) < LEAST_BARS:
        return "too short"
    notes = [notes_of(part.stripTies()) for part in parts]
    if not all(notes):
        return "no notes"
    tonic, mode = declared_key(flat[0]) if collection != "bach" else ("", "")
    title = str(getattr(score.metadata, "title", None) or name)
    kind = "chorale" if collection == "bach" else kind_of(title)
    end = max(note[0] + note[1] for part in notes for note in part)
    return Tune(
        name, collection, title, kind, sharps, tonic, mode, beats, unit, notes, downbeats, end, form_of(bars)
    )


def notes_of(part: Any) -> list[list[float]]:
    """``[onset, duration, pitch]`` of a part, grace notes left out; of a chord its highest note."""
    found = []
    for note in part.flatten().notes:
        if not note.isChord and not hasattr(note, "pitch"):
            continue  # a chord symbol
        length = float(note.duration.quarterLength)
        if length > 0:
            found.append([round(float(note.offset), 6), round(length, 6), int(max(p.midi for p in note.pitches))])
    return sorted(found)


def declared_key(part: Any) -> tuple[str, str]:
    """Tonic and mode of the key that the source declares (ABC's ``K:``); empty for modes other than major and minor."""
    key = part.getElementsByClass("Key").first()
    if key is None or key.mode not in ("major", "minor"):
        return "", ""
    return key.tonic.name.replace("-", "b"), key.mode


def kind_of(title: str) -> str:
    """The dance that a title names, or an empty string."""
    words = set(re.findall(r"[a-z]+", title.casefold()))
    return next((kind for kind in KINDS if kind in words or f"{kind}s" in words), "")


def form_of(bars: Sequence[Any]) -> str:
    """Letters of a tune's sections by its repeat signs; empty where there are none."""
    letters, begun, any_repeat = "", 0, False
    for at, bar in enumerate(bars):
        right, left = getattr(bar, "rightBarline", None), getattr(bar, "leftBarline", None)
        ends = getattr(right, "direction", None) == "end"
        starts = getattr(left, "direction", None) == "start"
        if starts and at > begun:
            letters += _letter(letters)
            begun, any_repeat = at, True
        if ends:
            letters += _letter(letters) * 2
            begun, any_repeat = at + 1, True
    if begun < len(bars) and any_repeat:
        letters += _letter(letters)
    return letters


def _letter(letters: str) -> str:
    return chr(ord("A") + len(set(letters)) % 26)
