"""audio_qa_jsonl: a user's own questions about audio files."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from bestiary.shared.audio.files import read_audio, resample
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import Content, Example, Message
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.audio_qa_rows import Clip, Fault, Row, read_rows
from bestiary.shared.data.lazy import LazyExamples
from bestiary.shared.data.splits import SPLITS, split_of
from bestiary.shared.data.user_files import Header, NoHeader, audio_headers, first_faults, regular_file
from bestiary.shared.rl.protocols import Verifier
from bestiary.shared.rl.rewards.registry import make_verifier

SLACK_S = 1.0
"""How far a declared duration or end may be from the file's."""

RATES = (1000, 384_000)
"""Samples a second of a header that is believed."""

PARTS = (None, "sft", "think", "rl")

NUMBER = re.compile(r"\s*[-+]?\d[\d,]*(\.\d+)?\s*(bpm|beats?|bars?|s|seconds?|hz|khz|db)?\s*", re.IGNORECASE)
"""An answer that is a number, its unit perhaps behind it."""


class AudioQAJsonl:
    """Questions about audio from a file: ours, NVIDIA's JSON, or chat messages (see :mod:`.audio_qa_rows`).

    The whole file and the header of every audio file are checked before anything else is done, and one report says all
    that is wrong. No recording is on two sides: rows that share one, directly or through others, have one split, which
    is the one that any of them names, or else comes from the hash of the recording's path as seen from the file. Audio
    is read when an example is asked for; none is ever fetched.

    Parts: ``sft`` (the answer, behind its thoughts where the row has some and ``thoughts`` is set), ``think`` (only
    rows with thoughts, in the form ``<think>…</think><answer>…</answer>``), ``rl`` or none (the bare answer and a
    verifier).

    Args:
        path: a .jsonl or .json file.
        rate: samples a second that audio is resampled to.
        verifier: of questions that are neither a choice (``multiple_choice``) nor a description (task ``caption`` with
            meta: ``metadata``). None takes ``numeric`` where the answer is a number, else ``exact_text``.
        thoughts: whether the part ``sft`` shows thoughts.
        tagged: whether it has every answer in ``<answer>…</answer>``, where rewards and evaluations look for it.
        max_seconds: longest clip; a longer one is a fault.

    Raises:
        ConfigError: for an unknown verifier, a rate that no audio has, or a longest clip without length.
        MissingDataError, BadDataError: from :meth:`check`.
    """

    def __init__(
        self,
        path: str,
        rate: int = 16000,
        verifier: str | None = None,
        thoughts: bool = False,
        tagged: bool = False,
        max_seconds: float = 1200.0,
    ):
        if not isinstance(rate, int) or not RATES[0] <= rate <= RATES[1]:
            raise ConfigError(f"dataset.rate is a whole number of samples a second, {RATES[0]} or more, not {rate!r}")
        if isinstance(max_seconds, str) or not max_seconds > 0:
            raise ConfigError(f"dataset.max_seconds is a number of seconds above 0, not {max_seconds!r}")
        self.path, self.rate = Path(path).expanduser(), rate
        self.verifier, self.thoughts, self.tagged, self.max_seconds = verifier, thoughts, tagged, max_seconds
        self._verifiers: dict[str, Verifier] = {} if verifier is None else {verifier: make_verifier(verifier)}

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
        if not any(self._splits.values()):
            raise BadDataError(f"{self.path} has no rows")

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Row k of the training split, all of them once before any comes again."""
        rows = self._rows("train", part)
        if not rows:
            lost = " with thoughts: give rows think, or leave that stage out (recipe.run)" if part == "think" else ""
            raise BadDataError(f"{self.path}: no row is to train on{lost}")
        return self._example(rows[stream.shuffled(k, len(rows))], part)

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """The rows of ``val`` or ``test``; audio is read when one is looked at."""
        if split not in ("val", "test"):
            raise ConfigError(f"audio_qa_jsonl holds out val and test, not {split!r}")
        return _Rows(self, self._rows(split, part), part)

    def _rows(self, split: str, part: str | None) -> list[Row]:
        if part not in PARTS:
            raise ConfigError(f"audio_qa_jsonl has the parts sft, think and rl, not {part!r}")
        rows = self._splits[split]
        return [row for row in rows if row.think] if part == "think" else rows

    def _file(self) -> Path:
        return regular_file(self.path, "dataset.path", "a .jsonl or .json file of questions about audio")

    @cached_property
    def _splits(self) -> dict[str, list[Row]]:
        file = self._file()
        faults: list[Fault] = []
        rows: list[Row] = []
        for found in read_rows(file):
            (rows if isinstance(found, Row) else faults).append(found)  # type: ignore[arg-type]
        headers = audio_headers(path for row in rows for path in row.files)
        named: dict[str, str] = {}
        for row in rows:
            first = named.setdefault(row.id, row.place)
            if first != row.place:
                faults.append(Fault(row.place, "duplicate id", f"the id {row.id!r} is that of {first} too"))
            faults += self._faults(row, headers)
        sides = assign_splits(rows, file.parent)
        for row, names in zip(rows, sides, strict=True):
            if len(names) > 1:
                text = f"its recording is in {' and '.join(sorted(names))}, by this row or others: give it one split"
                faults.append(Fault(row.place, "recording in two splits", text))
        if faults:
            raise BadDataError(self._report(faults))
        splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
        for row, names in zip(rows, sides, strict=True):
            splits[next(iter(names))].append(row)
        return splits

    def _report(self, faults: Sequence[Fault]) -> str:
        kinds = Counter(fault.kind for fault in faults)
        counted = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        by_place = sorted(faults, key=lambda f: [int(n) for n in re.findall(r"\d+", f.place)])
        shown = first_faults([f"{fault.place}: {fault.text}" for fault in by_place])
        return f"{self.path}: {len({f.place for f in faults})} rows cannot be used ({counted}):\n{shown}"

    def _faults(self, row: Row, headers: Mapping[Path, Header | NoHeader]) -> Iterator[Fault]:
        for clip in row.clips:
            name = "an array" if clip.samples is not None else str(clip.path)
            header = headers[clip.path] if clip.samples is None else Header(len(clip.samples), clip.rate)
            if isinstance(header, NoHeader):
                yield Fault(row.place, header.kind, header.text)
                continue
            frames, rate = header
            if not RATES[0] <= rate <= RATES[1]:
                yield Fault(row.place, "rate", f"{name} claims {rate} samples a second")
                continue
            length = frames / rate
            end = length if clip.end is None else clip.end
            if frames <= 0:
                yield Fault(row.place, "empty audio", f"{name} has no samples")
            elif clip.start >= length or end > length + SLACK_S:
                text = f"{clip.start:g} to {end:g} s is asked for, and {name} has {length:.1f} s"
                yield Fault(row.place, "span", text)
            elif end - clip.start > self.max_seconds:
                text = f"{end - clip.start:.0f} s of {name}, more than max_seconds {self.max_seconds:g}"
                yield Fault(row.place, "too long", text)
            if row.rate is not None and row.rate != rate:
                yield Fault(row.place, "rate", f"{row.rate:g} samples a second are declared, and {name} has {rate}")
            # NVIDIA's duration is that of the file; a row with a span of its own may give the span's.
            declared = row.duration if len(row.clips) == 1 else None
            if declared is not None and all(abs(declared - d) > SLACK_S for d in (length, end - clip.start)):
                text = f"{declared:g} s are declared, and {name} has {length:.1f}: is it at another rate?"
                yield Fault(row.place, "duration", text)
        try:
            example = self._described(row)
            check = getattr(self._verifier(example["verifier"]), "check", None)
            if callable(check):
                check(example)
        except BadDataError as error:
            kind = "answer not among the options" if row.options else "answer"
            yield Fault(row.place, kind, " ".join(str(error).split())[:200])

    def _verifier(self, name: str) -> Verifier:
        if name not in self._verifiers:
            self._verifiers[name] = make_verifier(name)
        return self._verifiers[name]

    def _described(self, row: Row) -> Example:
        """The example without its chat: what a verifier reads."""
        meta: dict[str, Any] = {"task": row.task or "question", "metadata": as_record(row.meta)}
        if row.options:
            meta["options"] = row.options
            verifier = "multiple_choice"
        elif row.task == "caption" and meta["metadata"]:
            verifier = "metadata"
        else:
            verifier = self.verifier or ("numeric" if NUMBER.fullmatch(row.answer) else "exact_text")
        return {"id": row.id, "meta": meta, "answer": row.answer, "verifier": verifier}

    def _example(self, row: Row, part: str | None) -> Example:
        messages: list[Message] = []
        for role, pieces in row.turns:
            content = [self._audio(p) if isinstance(p, Clip) else Content(type="text", value=p) for p in pieces]
            messages.append({"role": role, "content": content})  # type: ignore[typeddict-item]
        example: Example = {**self._described(row), "messages": messages}
        if part in ("sft", "think"):
            del example["verifier"]
            if row.think and (part == "think" or self.thoughts):
                example["answer"] = f"<think>{row.think}</think><answer>{row.answer}</answer>"
            elif self.tagged:
                example["answer"] = f"<answer>{row.answer}</answer>"
        return example

    def _audio(self, clip: Clip) -> Content:
        if clip.samples is None:
            value = read_audio(clip.path, self.rate, clip.start, clip.end)
        else:
            value = resample(clip.samples, clip.rate, self.rate)
        return {"type": "audio", "value": value, "rate": self.rate, "key": self.key(clip)}

    def key(self, clip: Clip) -> str:
        """A name of what a clip holds: it changes whenever the file, its part or the rate does."""
        if clip.samples is not None:
            return f"{hashlib.sha256(clip.samples.tobytes()).hexdigest()}:{clip.rate}:{self.rate}"
        stat = clip.path.stat()
        return f"{clip.path}:{clip.start}-{clip.end}:{stat.st_mtime_ns}:{stat.st_size}:{self.rate}"


def as_record(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as the verifier ``metadata`` reads it: nothing empty, a key with its mode where that stands apart."""
    record = {name: value for name, value in meta.items() if value is not None and value != "" and value != []}
    names = {name.casefold(): name for name in record}
    if "key" in names and "mode" in names:
        mode, key = str(record.pop(names["mode"])), record[names["key"]]
        if isinstance(key, str) and mode.casefold() not in key.casefold():
            record[names["key"]] = f"{key} {mode}"
    return record


def assign_splits(rows: Sequence[Row], root: Path) -> list[set[str]]:
    """For each row the splits of all rows that share a recording with it, through others too; one, if they agree.

    Args:
        rows: the rows. root: recordings are hashed by their paths from here, so that a folder can be moved.
    """
    parent: dict[str, str] = {}

    def top(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    groups = []
    for row in rows:
        names = [f"file {os.path.relpath(path, root)}" for path in row.files] or [f"row {row.id}"]
        for other in names[1:]:
            low, high = sorted((top(names[0]), top(other)))
            parent[high] = low  # the first name in order stands for all
        groups.append(names[0])
    stated: dict[str, set[str]] = {}
    for row, name in zip(rows, groups, strict=True):
        if row.split is not None:
            stated.setdefault(top(name), set()).add(row.split)
    return [stated.get(top(name)) or {split_of(top(name))} for name in groups]


class _Rows(LazyExamples):
    """Examples of rows, made when they are asked for."""

    def __init__(self, source: AudioQAJsonl, rows: Sequence[Row], part: str | None):
        self._source, self._chosen, self._part = source, rows, part

    def __len__(self) -> int:
        return len(self._chosen)

    def example(self, at: int) -> Example:
        return self._source._example(self._chosen[at], self._part)

    @property
    def audio_keys(self) -> list[list[str]]:
        """For each example the keys of its clips, in order; nothing is read."""
        return [[self._source.key(clip) for clip in row.clips] for row in self._chosen]
