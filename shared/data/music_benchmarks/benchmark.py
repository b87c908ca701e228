"""What the readers of published benchmarks share: all rows are checked first, and audio is read item by item."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bestiary.shared.audio.files import read_audio
from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.core.examples import Example
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.audio_controls import MODES, controlled
from bestiary.shared.data.lazy import LazyExamples
from bestiary.shared.data.music_benchmarks.records import AudioFolder
from bestiary.shared.data.user_files import NoHeader, audio_headers, first_faults

LETTERS = "ABCDEFGHIJ"
"""Of options, in order; the verifiers know no others."""


@dataclass(frozen=True)
class Clip:
    """A file, or a part of it in seconds."""

    path: Path
    start: float = 0.0
    end: float | None = None

    @property
    def key(self) -> str:
        """What tells it apart from other clips."""
        return str(self.path) if self.end is None else f"{self.path}#{self.start:g}-{self.end:g}"


@dataclass(frozen=True)
class Item:
    """One question, its audio not yet read.

    Attributes:
        id: unique within the benchmark.
        clips: what is heard, in order.
        text: what is asked.
        answer: the gold answer; a letter where there are options; None where it is kept secret.
        verifier: what scores it, or None: then it is asked, and not scored.
        meta: ``options`` (texts in order), ``answer_text``, and what the benchmark says of the item.
        part: of the benchmark.
    """

    id: str
    clips: tuple[Clip, ...]
    text: str
    answer: str | None
    verifier: str | None
    meta: dict[str, Any] = field(default_factory=dict)
    part: str | None = None


class Benchmark:
    """Base of the readers. A subclass gives ``name``, ``parts``, :meth:`source_file` and :meth:`read`.

    There is a ``test`` split and nothing to train on. The whole file is checked before anything is asked, and one
    message lists its faults.

    Args:
        root: the folder that the user has filled.
        prompt: what is asked, with the fields in braces that the reader fills in.
        audio: ``real``; or a control (:mod:`bestiary.shared.data.audio_controls`): ``silent`` or ``swapped``.
        seed: of the swap, and of any order of options that is not the benchmark's own.
        rate: of the samples that a model gets, in Hz.
        leave_out: leave items with faults out instead of refusing; their number becomes part of ``revision``.
        request: what to say when the folder is not there: where the data is, under which licence, how it is laid out.

    Raises:
        ConfigError: for an ``audio`` that is not there, a prompt without a field that it needs, or no rate.
    """

    name = ""
    asks: tuple[str, ...] = ("question", "options")
    """What a prompt needs in braces."""
    parts: tuple[str, ...] = ()

    def __init__(
        self,
        root: str | Path,
        prompt: str,
        audio: str = "real",
        seed: int = 0,
        rate: int = 16000,
        leave_out: bool = False,
        request: str | None = None,
    ):
        if audio not in MODES:
            raise ConfigError(f"dataset.audio is {', '.join(MODES)}, not {audio!r}")
        if not isinstance(rate, int) or rate < 1:
            raise ConfigError(f"dataset.rate is a whole number of samples a second, not {rate!r}")
        lost = [name for name in self.asks if f"{{{name}}}" not in prompt]
        if lost:
            raise ConfigError(f"{self.name}: dataset.prompt needs {{{'}, {'.join(lost)}}} in it: {prompt!r}")
        self.root, self.prompt, self.audio, self.seed = Path(root).expanduser(), prompt, audio, seed
        self.rate, self.leave_out, self._request = rate, leave_out, request
        self._faults: list[str] = []

    def source_file(self) -> Path | None:
        """The file with the questions (or the folder, where there are only clips), or None where there is none."""
        raise NotImplementedError

    def read(self, file: Path, audio: AudioFolder) -> list[Item]:
        """Its items; what is wrong with a row is told to :meth:`fault`, and the row left out."""
        raise NotImplementedError

    def hashed_files(self) -> list[Path]:
        """The files that ``revision`` is a hash of."""
        return [self._file]

    def hashed(self) -> Iterator[bytes]:
        """What ``revision`` is a hash of: names and contents of :meth:`hashed_files`."""
        for file in self.hashed_files():
            yield file.name.encode() + b"\0" + file.read_bytes()

    def fault(self, where: str, what: str) -> None:
        """Note what is wrong with a row."""
        self._faults.append(f"{where}: {what}")

    def ask(self, **values: str) -> str:
        """The prompt, filled in. Braces in values are text."""
        text = self.prompt
        for at, name in enumerate(values):
            text = text.replace(f"{{{name}}}", f"\0{at}\0")
        for at, value in enumerate(values.values()):
            text = text.replace(f"\0{at}\0", value)
        return text

    @cached_property
    def revision(self) -> str:
        """Name and hash of the questions, what was left out of them, and the control in place of the audio."""
        digest = hashlib.sha256()
        for piece in self.hashed():
            digest.update(piece)
        without = f"-without{len(self._faults)}" if self._items and self._faults else ""
        return f"{self.name}-{digest.hexdigest()[:16]}{without}" + ("" if self.audio == "real" else f"-{self.audio}")

    def spec(self) -> DataSpec:
        """Chat with audio; it reads nothing."""
        return DataSpec(task="chat", modalities=("audio",))

    def check(self) -> None:
        """Read and check all questions, and that each has its audio file.

        Raises:
            MissingDataError: if the folder or the file with the questions is not there.
            BadDataError: with one report of all that is wrong.
        """
        _ = self._items

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """There is none."""
        raise ConfigError(
            f"{self.name} is to test on, never to train on: evaluate a finished run with "
            f"python tools/eval_model.py checkpoint=RUN dataset={self.name}"
        )

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """The items as ``test``, audio read when one is asked for; ``val`` is empty."""
        if part is not None and part not in self.parts:
            raise ConfigError(f"{self.name} has {', '.join(self.parts) or 'no parts'}; part={part!r} was asked for")
        if split not in ("val", "test"):
            raise ConfigError(f"{self.name} holds out test, and nothing as val, not {split!r}")
        if split == "val":
            return []
        items = [item for item in self._items if part in (None, item.part)]
        return controlled(Items(items, self.rate), self.audio, self.seed) if items else []

    @property
    def _file(self) -> Path:
        if self.root.is_file():
            raise BadDataError(f"{self.root} is a file: set dataset.root to the folder that {self.name} is in")
        file = self.source_file() if self.root.is_dir() else None
        if file is None:
            general = f"{self.root}: {self.name} is not there (dataset.root), and it cannot be fetched for you."
            raise MissingDataError((self._request or general).strip().replace("{root}", str(self.root)))
        return file

    @cached_property
    def _items(self) -> list[Item]:
        file = self._file
        self._faults = []
        try:
            rows = self.read(file, AudioFolder(self.root))
        except BadDataError as error:
            hint = f"Is {self.root} the folder of {self.name}, and its files whole? What to get:"
            raise BadDataError(f"{error}\n{hint} conf/dataset/{self.name}.yaml") from error
        total = len(rows) + len(self._faults)
        lost = self._without_audio(rows)
        items, seen = [], set()
        for item in rows:
            if item.id in seen:
                self.fault(item.id, "this id stands there twice")
            elif told := next((lost[clip] for clip in item.clips if clip in lost), None):
                self.fault(item.id, told)
            else:
                items.append(item)
            seen.add(item.id)
        report = f"{file}: {len(self._faults)} faults in {total} rows:\n{first_faults(self._faults)}\n"
        if self._faults and not self.leave_out:
            hint = "Mend them, or leave such rows out with dataset.leave_out=true (scores are then of the rest)."
            raise BadDataError(report + hint)
        if not items:
            left = f"{file} has no item that can be used and fits dataset's settings"
            raise BadDataError(f"{report}None is left without them." if self._faults else left)
        return items

    @staticmethod
    def _without_audio(items: Sequence[Item]) -> dict[Clip, str]:
        """Clips that nothing can be heard of, and why, by the headers of their files."""
        clips = list(dict.fromkeys(clip for item in items for clip in item.clips))
        headers = audio_headers(clip.path for clip in clips)
        lost = {}
        for clip in clips:
            header = headers[clip.path]
            if isinstance(header, NoHeader):
                there = clip.path.is_file() and clip.path.stat().st_size
                lost[clip] = header.text if there else f"its audio {clip.path} is empty or not there"
            elif clip.start * header.rate >= header.frames:
                seconds = header.frames / header.rate
                lost[clip] = f"it begins at {clip.start:g} s, and its audio {clip.path} has {seconds:g} s"
        return lost

    # ------------------------------------------------------------------ for subclasses

    def clip(self, audio: AudioFolder, where: str, path: Any) -> tuple[Clip, ...] | None:
        """The clip of a path; None, and a fault, where it is not there."""
        if path and not isinstance(path, str):
            self.fault(where, f"its audio is no path but a {type(path).__name__}: unpack the files and name them")
            return None
        found = audio.find(path) if path else None
        if found is None:
            self.fault(where, f"there is no audio file {path!r} below {self.root}" if path else "no audio is named")
            return None
        return (Clip(found),)

    def choice(self, where: str, options: Sequence[str], gold: Any) -> str | None:
        """The letter of the gold option; None, and a fault, where there is none or not one."""
        gold = "" if gold is None else str(gold)
        if not 2 <= len(options) <= len(LETTERS):
            self.fault(where, f"it has {len(options)} options, and 2 to {len(LETTERS)} can be asked")
            return None
        if not gold:
            self.fault(where, "it has no answer")
            return None
        for same in (str.strip, _plain):  # as it stands first: Cm7 is not CM7
            found = [letter for letter, option in zip(LETTERS, options, strict=False) if same(option) == same(gold)]
            if len(found) == 1:
                return found[0]
        self.fault(where, f"its answer {gold[:60]!r} is not exactly one of its options")
        return None


class Items(LazyExamples):
    """Items as examples; audio is read when one is asked for.

    Args:
        items: the items.
        rate: Hz.
    """

    def __init__(self, items: Sequence[Item], rate: int):
        self.items, self.rate = items, rate

    @property
    def audio_keys(self) -> list[tuple[str, ...]]:
        """Of each item, the keys of its clips; no audio is read for it."""
        return [tuple(clip.key for clip in item.clips) for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def example(self, at: int) -> Example:
        item = self.items[at]
        content: list[Any] = [
            {
                "type": "audio",
                "value": read_audio(clip.path, self.rate, clip.start, clip.end),
                "rate": self.rate,
                "key": clip.key,
            }
            for clip in item.clips
        ]
        content.append({"type": "text", "value": item.text})
        example = Example(id=item.id, messages=[{"role": "user", "content": content}], meta=dict(item.meta))
        if item.answer is not None:
            example["answer"] = item.answer
        if item.verifier is not None:
            example["verifier"] = item.verifier
        return example


def listed(options: Sequence[str], between: str = "\n") -> str:
    """Options as ``(A) first``, ``(B) second`` …"""
    return between.join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
