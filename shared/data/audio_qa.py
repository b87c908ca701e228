"""audio_qa_jsonl: a user's own questions about audio files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from bestiary.shared.audio.files import duration, read_audio
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import Content, Example, Message
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.audio_qa_rows import Clip, Row, first_audio, read_rows
from bestiary.shared.data.splits import SPLITS, split_of
from bestiary.shared.data.user_files import regular_file

SHOWN = 20
"""Faults that a report lists."""

SLACK_S = 1.0
"""How far a declared duration may be from the file's."""

PARTS = (None, "sft", "think", "rl")


class AudioQAJsonl:
    """Questions about audio from a file: ours, NVIDIA's JSON, or chat messages (:mod:`~bestiary.shared.data.audio_qa_rows`).

    The whole file and the header of every audio file are checked before anything else is done, and one report says all
    that is wrong. Rows without a split are split by the hash of their (first) audio file, so that no recording is on two
    sides. Audio is read when an example is asked for.

    Parts: ``sft`` (the answer, behind its thoughts where the row has some and ``thoughts`` is set), ``think`` (rows with
    thoughts alone, in the form ``<think>…</think><answer>…</answer>``), ``rl`` or none (the bare answer and a verifier).

    Args:
        path: a .jsonl or .json file.
        rate: samples a second that audio is resampled to.
        verifier: of questions without options; those with options have ``multiple_choice``, and descriptions (task
            ``caption``, with meta) ``metadata``.
        thoughts: whether the part ``sft`` shows thoughts.
        max_seconds: longest clip; a longer one is a fault.

    Raises:
        MissingDataError, BadDataError: from :meth:`check`.
    """

    def __init__(
        self,
        path: str,
        rate: int = 16000,
        verifier: str = "exact_text",
        thoughts: bool = False,
        max_seconds: float = 1200.0,
    ):
        self.path, self.rate = Path(path).expanduser(), rate
        self.verifier, self.thoughts, self.max_seconds = verifier, thoughts, max_seconds

    @cached_property
    def revision(self) -> str:
        """Name and sha256 of the file."""
        return f"{self.path.name}-{hashlib.sha256(self._file().read_bytes()).hexdigest()[:16]}"

    def spec(self) -> DataSpec:
        """Chat with audio; it reads nothing."""
        return DataSpec(task="chat", modalities=("audio",))

    def check(self) -> None:
        """Check every row and every audio file.

        Raises:
            MissingDataError: if the file is not there.
            BadDataError: with one report of all that is wrong.
        """
        if not self._splits["train"] and not self._splits["test"] and not self._splits["val"]:
            raise BadDataError(f"{self.path} has no rows")

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Row k of the training split, all of them once before any comes again."""
        rows = self._rows("train", part)
        if not rows:
            raise BadDataError(f"{self.path}: no row is to train on{' with thoughts' if part == 'think' else ''}")
        return self._example(rows[stream.shuffled(k, len(rows))], part)

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """The rows of ``val`` or ``test``; audio is read when one is looked at."""
        if split not in ("val", "test"):
            raise ConfigError(f"audio_qa_jsonl holds out val and test, not {split!r}")
        return _Lazy(self, self._rows(split, part), part)

    def _rows(self, split: str, part: str | None) -> list[Row]:
        if part not in PARTS:
            raise ConfigError(f"audio_qa_jsonl has the parts sft, think and rl, not {part!r}")
        rows = self._splits[split]
        return [row for row in rows if row.think] if part == "think" else rows

    def _file(self) -> Path:
        return regular_file(self.path, "dataset.path", "a .jsonl or .json file of questions about audio")

    @cached_property
    def _splits(self) -> dict[str, list[Row]]:
        splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
        faults: list[tuple[str, str]] = []
        rows: list[Row] = []
        for row in read_rows(self._file()):
            if isinstance(row, Row):
                rows.append(row)
            else:
                faults.append(row)
        lengths = self._lengths(rows)
        seen: dict[str, str] = {}
        for row in rows:
            found = self._faults(row, lengths)
            first = seen.setdefault(row.id, row.place)
            if first != row.place:
                found.append(f"the id {row.id!r} is that of {first} too")
            if found:
                faults.append((row.place, "; ".join(found)))
                continue
            audio = first_audio(row.turns)
            splits[row.split or split_of(str(audio) if audio else row.id)].append(row)
        if faults:
            kinds = Counter(text.split(":")[0].split("'")[0][:40].strip() for _, text in faults)
            counted = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(5))
            shown = "\n".join(f"  {place}: {text}" for place, text in faults[:SHOWN])
            more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
            total = len(rows) + sum(1 for place, _ in faults if place not in {row.place for row in rows})
            raise BadDataError(
                f"{self.path}: {len(faults)} of {total} rows cannot be used ({counted}):\n{shown}{more}"
            )
        return splits

    @staticmethod
    def _lengths(rows: Sequence[Row]) -> dict[Path, float | str]:
        """Seconds of each audio file, or what is wrong with it."""
        paths = list(dict.fromkeys(clip.path for row in rows for clip in row.clips))

        def look(path: Path) -> float | str:
            try:
                return duration(path)
            except BadDataError as error:
                return str(error)

        with ThreadPoolExecutor(8) as pool:
            return dict(zip(paths, pool.map(look, paths), strict=True))

    def _faults(self, row: Row, lengths: dict[Path, float | str]) -> list[str]:
        found = []
        for clip in row.clips:
            length = lengths[clip.path]
            if isinstance(length, str):
                found.append(f"audio: {length}")
                continue
            end = length if clip.end is None else clip.end
            if length <= 0:
                found.append(f"audio: {clip.path} has no samples")
            elif clip.start >= length or end > length + SLACK_S:
                found.append(f"audio: {clip.start:g} to {end:g} s is asked for, and {clip.path} has {length:.1f} s")
            elif end - clip.start > self.max_seconds:
                found.append(f"audio: {end - clip.start:.0f} s, more than max_seconds {self.max_seconds:g}")
            elif row.duration is not None and len(row.clips) == 1 and abs(row.duration - length) > SLACK_S:
                found.append(f"duration: {row.duration:g} s is declared, and {clip.path} has {length:.1f}: another rate?")
        return found

    def _example(self, row: Row, part: str | None) -> Example:
        messages: list[Message] = []
        for role, pieces in row.turns:
            content = [self._audio(p) if isinstance(p, Clip) else Content(type="text", value=p) for p in pieces]
            messages.append({"role": role, "content": content})  # type: ignore[typeddict-item]
        meta: dict[str, Any] = {"task": row.task or "question", "metadata": row.meta}
        if row.options:
            meta["options"] = row.options
        example: Example = {"id": row.id, "messages": messages, "meta": meta}
        if part in ("sft", "think"):
            show = row.think and (part == "think" or self.thoughts)
            example["answer"] = f"<think>{row.think}</think><answer>{row.answer}</answer>" if show else row.answer
            return example
        caption = row.task == "caption" and row.meta
        verifier = "multiple_choice" if row.options else "metadata" if caption else self.verifier
        return {**example, "answer": row.answer, "verifier": verifier}

    def _audio(self, clip: Clip) -> Content:
        stat = clip.path.stat()
        return {
            "type": "audio",
            "value": read_audio(clip.path, self.rate, clip.start, clip.end),
            "rate": self.rate,
            "key": f"{clip.path}:{clip.start}-{clip.end}:{stat.st_mtime_ns}:{stat.st_size}:{self.rate}",
        }


class _Lazy(Sequence[Example]):
    """Examples of rows, made when they are asked for."""

    def __init__(self, source: AudioQAJsonl, rows: Sequence[Row], part: str | None):
        self._source, self._chosen, self._part = source, rows, part

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._source._example(self._chosen[index], self._part)
