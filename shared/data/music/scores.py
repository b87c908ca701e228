"""Scores of music21's corpus as plain lists of notes, parsed once and kept.

Times are in quarter notes from the tune's first note; pitches are MIDI numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import MissingExtraError, require
from bestiary.shared.data.assets import data_root, locked
from bestiary.shared.data.music.pool import each

PARSER = 2
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
SHARED = 24
"""Intervals in a row that two melodies have in common, whatever their rhythm, if they are of one family."""


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
        bars: onsets of the longest run of whole bars, one right after the other. Clips are made of these, so that the
            metre of a clip is never broken by an upbeat, or by an odd bar at a repeat.
        family: id of the first tune that shares a stretch of melody, see :func:`families`; a split keeps it together.
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
    bars: list[float]
    family: str = ""

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
    def end(self) -> float:
        """Where the run of bars ends."""
        return self.bars[-1] + self.bar

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


def parsed_files() -> list[Path]:
    """The files that hold the parsed tunes of each part of the corpus, whether they are there or not."""
    folder = data_root() / "music" / f"scores-{scores_revision()}"
    return [folder / f"{number:03d}.json" for number in range(len(chunked(corpus_files())))]


def scores_are_read() -> bool:
    """Whether all scores were parsed on this machine before."""
    return all(name.is_file() for name in parsed_files())


def parse_scores(workers: int | None = None) -> list[Path]:
    """The files with parsed tunes; those that are missing are made now (two minutes of CPU time for all, once).

    Args:
        workers: processes that parse; None is one a core, 0 parses here.
    """
    check_music21()
    names = parsed_files()
    if not scores_are_read():
        folder, chunks = names[0].parent, chunked(corpus_files())
        with locked(folder.name):
            folder.mkdir(parents=True, exist_ok=True)
            jobs = [(name, chunk) for name, chunk in zip(names, chunks, strict=True) if not name.is_file()]
            each(parse_chunk, jobs, workers, "reading scores")
    return names


def load_scores(workers: int | None = None) -> Scores:
    """The tunes; see :func:`parse_scores`."""
    tunes: list[Tune] = []
    rejected: Counter[str] = Counter()
    for name in parse_scores(workers):
        found = json.loads(name.read_text())
        tunes += [Tune(**values) for values in found["tunes"]]
        rejected.update(found["rejected"])
    kept = distinct(sorted(tunes, key=lambda tune: tune.id))
    rejected["same tune again"] += len(tunes) - len(kept)
    family = families(kept)
    for tune in kept:
        tune.family = family[tune.id]
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
    """Without tunes that have the title or the opening notes of one before."""
    titles: set[str] = set()
    melodies: set[str] = set()
    out = []
    for tune in tunes:
        title = plain_title(tune.title) if tune.collection != "bach" else tune.id
        # Also from the first bar on: an upbeat more or less does not make another tune.
        openings = {opening(tune.parts[0]), opening([note for note in tune.parts[0] if note[0] >= tune.bars[0]])}
        if title in titles or openings & melodies:
            continue
        titles.add(title)
        melodies |= openings
        out.append(tune)
    return out


def opening(notes: Sequence[Sequence[float]], count: int = 24) -> str:
    """Intervals and rhythm of the first notes: the same melody in another key is the same tune."""
    steps = [(round(b[0] - a[0], 3), b[2] - a[2]) for a, b in pairwise(notes[:count])]
    return hashlib.sha256(repr(steps).encode()).hexdigest()


def families(tunes: Sequence[Tune]) -> dict[str, str]:
    """Id of each tune to that of its family's first: those that share ``SHARED`` steps of melody anywhere, in any key.

    They are versions of one tune, and chorales on one hymn: who has heard one knows the other.
    """
    parent = {tune.id: tune.id for tune in tunes}

    def first(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    seen: dict[bytes, str] = {}
    for tune in tunes:
        melody = bytes(max(0, min(255, int(b[2] - a[2]) + 128)) for a, b in pairwise(tune.parts[0]))
        for at in range(len(melody) - SHARED + 1):
            a, b = sorted((first(tune.id), first(seen.setdefault(melody[at : at + SHARED], tune.id))))
            parent[b] = a
    return {name: first(name) for name in parent}


def plain_title(title: str) -> str:
    """A title without the dance behind its dash, articles, case and punctuation."""
    words = re.findall(r"[a-z]+", title.split("--")[0].casefold().replace("'", ""))
    return " ".join(word for word in words if word not in ("the", "a", *KINDS, *(f"{kind}s" for kind in KINDS)))


def parse_chunk(job: tuple[Path, list[tuple[str, str]]]) -> None:
    """Parse some files and write their tunes, aside and then renamed."""
    file, sources = job
    tunes, rejected = [], Counter()
    for collection, path in sources:
        for name, score, fields in read_file(collection, path):
            found = score if isinstance(score, str) else tune_of(collection, name, score, fields)
            if isinstance(found, str):
                rejected[found] += 1
            else:
                tunes.append(asdict(found))
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(json.dumps({"tunes": tunes, "rejected": rejected}))
    os.replace(aside, file)


def read_file(collection: str, path: str) -> Iterator[tuple[str, Any, dict[str, list[str]]]]:
    """(id, music21 score, ABC's fields) of each tune of a file; a reason in place of a score that cannot be read."""
    converter: Any = require("music21.converter", "audio")
    stem = f"{collection}/{Path(path).stem}"
    try:
        parsed = converter.parse(path)
    except Exception:  # music21 has no common error for files it cannot make sense of
        yield stem, "unreadable", {}
        return
    # latin-1 reads any byte, and the fields that count are ASCII.
    fields = abc_fields(Path(path).read_text(encoding="latin-1")) if path.endswith(".abc") else {}
    scores = list(parsed.scores) if parsed.__class__.__name__ == "Opus" else [parsed]
    for number, score in enumerate(scores):
        own = fields.get(str(getattr(score.metadata, "number", None)).strip(), {})
        if len(scores) == 1 and len(fields) == 1:
            own = next(iter(fields.values()))
        yield (f"{stem}#{number}" if len(scores) > 1 else stem), score, own


def abc_fields(text: str) -> dict[str, dict[str, list[str]]]:
    """Of each tune of an ABC file, by its number, the values of its fields ``K``, ``M`` and ``R``, inline ones too."""
    out: dict[str, dict[str, list[str]]] = {}
    for block in re.split(r"(?m)^(?=X:)", text):
        number = re.match(r"X:\s*(\d+)", block)
        if number is None:
            continue
        found = out.setdefault(number[1], {})
        for line, value, inline, other in re.findall(r"(?m)^([KMR]):([^%\n]*)|\[([KM]):([^\]]*)\]", block):
            found.setdefault(line or inline, []).append((value or other).strip())
    return out


def tune_of(collection: str, name: str, score: Any, fields: Mapping[str, Sequence[str]] | None = None) -> Tune | str:
    """A tune, or why it is not usable.

    Args:
        collection, name: of the tune. score: music21's.
        fields: of :func:`abc_fields`. music21 keeps only the first key and metre of an ABC tune and loses the dance.
    """
    fields = fields or {}
    parts = list(score.parts)
    if collection == "bach" and len(parts) != 4:
        return "not in four parts"
    if not parts:
        return "no notes"
    flat = [part.flatten() for part in parts]
    metres = {(sign.numerator, sign.denominator) for part in flat for sign in part.getElementsByClass("TimeSignature")}
    if len(metres) != 1 or len(set(fields.get("M", ()))) > 1:
        return "no metre, or several"
    beats, unit = metres.pop()
    if not any((beats, unit) in signs for signs in METRES.values()):
        return f"metre {beats}/{unit}"
    signatures = {sign.sharps for part in flat for sign in part.getElementsByClass("KeySignature")}
    if len(signatures) != 1 or len(set(fields.get("K", ()))) > 1:
        return "no key signature, or several"
    sharps = signatures.pop()
    if not -6 <= sharps <= 6:
        return "more than six sharps or flats"
    measures = [bar for bar in parts[0].getElementsByClass("Measure") if bar.duration.quarterLength]
    bars = whole_bars([(float(m.offset), float(m.duration.quarterLength)) for m in measures], beats * 4 / unit)
    if len(bars) < LEAST_BARS:
        return "too short"
    notes = [notes_of(part.stripTies()) for part in parts]
    if not all(notes):
        return "no notes"
    tonic, mode = declared_key(flat[0]) if collection != "bach" else ("", "")
    title = str(getattr(score.metadata, "title", None) or name)
    kind = "chorale" if collection == "bach" else kind_of(" ".join(fields.get("R", ()))) or kind_of(title)
    return Tune(name, collection, title, kind, sharps, tonic, mode, beats, unit, notes, bars)


def whole_bars(measures: Sequence[tuple[float, float]], whole: float) -> list[float]:
    """Onsets of the longest run of whole bars.

    A bar that a repeat sign divides is printed as two measures; it is one bar.

    Args:
        measures: onset and length of each, in quarters. whole: length of a bar.
    """
    runs: list[list[float]] = [[]]
    at, held = 0, 1e-6
    while at < len(measures):
        onset, length = measures[at]
        after = at + 1
        while length < whole - held and after < len(measures) and length + measures[after][1] < whole + held:
            length += measures[after][1]
            after += 1
        if abs(length - whole) < held:
            runs[-1].append(onset)
        else:  # an upbeat, or an odd bar
            runs.append([])
        at = after
    return max(runs, key=len)


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
    """The dance that a title or ABC's field ``R`` names, or an empty string."""
    words = set(re.findall(r"[a-z]+", title.casefold().replace("slipjig", "jig")))
    return next((kind for kind in KINDS if kind in words or f"{kind}s" in words), "")
