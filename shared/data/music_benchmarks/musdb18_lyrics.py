"""Lyrics of MUSDB18's songs, to be written down from the mix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bestiary.shared.audio.files import SUFFIXES
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.data.music_benchmarks.benchmark import Benchmark, Clip, Item
from bestiary.shared.data.music_benchmarks.records import AudioFolder, Row, fields, first_file, read_records

PROMPT = "Write down the words that are sung in this music, and nothing else."
"""Ours: neither NVIDIA's nor OpenMOSS's is published."""

LINE = re.compile(r"(\d+):(\d{1,2}(?:\.\d+)?)\s+(\d+):(\d{1,2}(?:\.\d+)?)\s+([a-d])\s*(.*)")
"""A line of the lyrics extension: begin and end in minutes and seconds, the category of the singing, the words."""


class MUSDB18Lyrics(Benchmark):
    """MUSDB18's English mixes with lyrics in segments; the answer is what is sung, scored by ErrorRate.

    Lyrics are read from the first of these that is there: ``lyrics.csv``, ``.json`` or ``.jsonl`` with ``name, start,
    end, text`` (seconds); MUSDB-ALT's ``test.jsonl`` with ``name, text, lines: [{start, end, text}]``; the public
    lyrics extension, ``lyrics-transcripts/test/NAME.txt`` with lines ``MM:SS MM:SS CATEGORY words`` (those with a star
    were rejected by its makers and are left out). Field names and lines are as programs read that use the public files.
    Mixes are ``NAME/mixture.wav`` (MUSDB18-HQ, also below ``test``) or ``NAME.wav``, ``.flac`` …; the stem files
    ``.stem.mp4`` are not read: convert them, or take MUSDB18-HQ.

    Which segments, song by song or line by line, a published error rate is of is often not said; ``unit`` is ours.

    Args:
        root: the folder.
        unit: ``segment`` asks for each segment alone, ``song`` for all words of a whole mix.
        categories: of the lyrics extension, those that count: for example ``[a]``; None for all.
        prompt: what is asked.
        audio, seed, rate, leave_out, request: see :class:`Benchmark`.

    Raises:
        ConfigError: for another unit.
    """

    name = "musdb18_lyrics"
    asks = ()
    names = {
        "name": ("name", "track", "song", "title"),
        "start": ("start", "begin", "start_time"),
        "end": ("end", "end_time"),
        "text": ("text", "lyrics", "words"),
        "lines": ("lines", "segments"),
        "category": ("category", "vocals"),
    }

    def __init__(
        self,
        root: str | Path,
        unit: str = "segment",
        categories: list[str] | None = None,
        prompt: str = PROMPT,
        audio: str = "real",
        seed: int = 0,
        rate: int = 16000,
        leave_out: bool = False,
        request: str | None = None,
    ):
        super().__init__(root, prompt, audio, seed, rate, leave_out, request)
        if unit not in ("segment", "song"):
            raise ConfigError(f"musdb18_lyrics: unit is segment or song, not {unit!r}")
        self.unit, self.categories = unit, categories

    def source_file(self) -> Path | None:
        """The lyrics, or the first file of those of the extension."""
        own = ("lyrics.csv", "lyrics.jsonl", "lyrics.json", "test.jsonl", "data/test.jsonl")
        extension = ("lyrics-transcripts/test/*.txt", "lyrics_transcripts/test/*.txt")
        return first_file(self.root, (*own, *extension))

    def hashed_files(self) -> list[Path]:
        """All files with lyrics."""
        file = self._file
        return sorted(file.parent.glob("*.txt")) if file.suffix == ".txt" else [file]

    def read(self, file: Path, audio: AudioFolder) -> list[Item]:
        """All segments, or all songs."""
        songs: dict[str, list[Row]] = {}
        for row in self._extension(file.parent) if file.suffix == ".txt" else self._records(file):
            songs.setdefault(str(row["name"]), []).append(row)
        items = []
        for name, rows in songs.items():
            mix = self._mix(name)
            if mix is None:
                self.fault(
                    name, f"there is no mix {name}/mixture.wav, test/{name}/mixture.wav or {name}.wav … in the folder"
                )
                continue
            if self.unit == "song":
                text = "\n".join(row["text"] for row in rows if row["text"])
                if not text:
                    self.fault(name, "it has no words")
                    continue
                items.append(Item(name, (Clip(mix),), self.prompt, text, None, {"song": name, "segments": len(rows)}))
                continue
            items += [
                item for at, row in enumerate(rows) if (item := self._segment(f"{name}-{at}", row, mix)) is not None
            ]
        return items

    def _segment(self, where: str, row: Row, mix: Path) -> Item | None:
        try:
            start, end = float(row["start"]), float(row["end"])
        except (TypeError, ValueError, KeyError):
            start, end = 0.0, 0.0
        if not row["text"] or not 0 <= start < end:
            told = f"{row.get('start')} to {row.get('end')}"
            self.fault(where, f"it is no stretch of time ({told})" if row["text"] else "it has no words")
            return None
        meta = {"song": str(row["name"])} | ({"category": row["category"]} if row.get("category") else {})
        return Item(where, (Clip(mix, start, end),), self.prompt, row["text"], None, meta)

    def _records(self, file: Path) -> list[Row]:
        records = read_records(file)
        nested = any("lines" in row or "segments" in row for row in records)
        rows = fields(records, self.names, ("name", "lines") if nested else ("name", "start", "end", "text"), file)
        if nested:
            listed = [(row["name"], row["lines"]) for row in rows if isinstance(row["lines"], list)]
            rows = [{**line, "name": name} for name, lines in listed for line in lines]
            rows = fields(rows, self.names, ("name", "start", "end", "text"), file)
        return [{**row, "text": " ".join(str(row.get("text") or "").split())} for row in rows if self._counts(row)]

    def _extension(self, folder: Path) -> list[Row]:
        rows: list[Row] = []
        for file in sorted(folder.glob("*.txt")):
            try:
                lines = file.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, ValueError) as error:
                raise BadDataError(f"{file} cannot be read as text: {error}") from error
            for number, line in enumerate(lines, 1):
                if not line.strip() or line.startswith("*"):
                    continue
                found = LINE.fullmatch(line.strip())
                if found is None:
                    self.fault(f"{file.name}, line {number}", f"it is not 'MM:SS MM:SS a words': {line[:60]!r}")
                    continue
                times = [int(found[at]) * 60 + float(found[at + 1]) for at in (1, 3)]
                row: dict[str, Any] = {"name": file.stem, "start": times[0], "end": times[1], "category": found[5]}
                # A segment without words is one that nobody could make out.
                if found[6].strip() and self._counts(row):
                    rows.append(row | {"text": found[6].strip()})
        return rows

    def _counts(self, row: Row) -> bool:
        return self.categories is None or row.get("category") in self.categories

    def _mix(self, name: str) -> Path | None:
        folders = (self.root, self.root / "test", self.root / "mixes", self.root / "audio")
        for folder in folders:
            for ending in SUFFIXES:
                for path in (folder / name / f"mixture{ending}", folder / f"{name}{ending}"):
                    if path.is_file():
                        return path
        return None
