"""MMAU, MMAR and MMAU-Pro: multiple choice about audio; the music parts by default."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.data.music_benchmarks.benchmark import Benchmark, Item, listed
from bestiary.shared.data.music_benchmarks.records import AudioFolder, among, as_list, fields, first_file, read_records

PROMPT = "{question}\nChoose the correct option from the following options:\n{options}"
"""Ours: MMAU prescribes no wording. Options stand as ``(A) …``, one a line."""

OPEN, INSTRUCTIONS = "open", "instruction following"
"""MMAU-Pro's categories that are no multiple choice."""


class MMAU(Benchmark):
    """MMAU: 10,000 clips with questions of four options or so; the answers of the full test are kept secret.

    The layout is the public one: ``mmau-test-mini.json`` or ``mmau-test.json``, a list of ``{id, audio_id, question,
    choices, answer, dataset, task, split, category, sub-category, difficulty}`` whose ``audio_id`` is a path beside it.
    The field names were read in the public test-mini file. Scores depend on the version (the one of 15 May 2025
    changed a quarter of the questions) and on the wording; ``revision`` hashes the file.

    Paper: arXiv:2410.19168 (MMAU).

    Args:
        root: the folder.
        task: ``music``, ``sound``, ``speech``, or None for all.
        hidden: the file has no answers (the full test): items are asked and not scored. Scores come from the
            benchmark's own page, to which AudioQA's ``answers_file`` has what it needs, by id.
        prompt: with ``{question}`` and ``{options}``.
        audio, seed, rate, leave_out, request: see :class:`Benchmark`.
    """

    name = "mmau"
    column = "task"
    """The field that says whether an item is about music."""
    kept: tuple[str, ...] = ("task", "category", "sub_category", "difficulty", "dataset")
    """Fields that go into ``meta``."""
    files: tuple[str, ...] = ("mmau-test-mini.json", "mmau-test.json", "mmau*.json", "*.json", "*.jsonl", "*.parquet")
    names = {
        "id": ("id", "question_id"),
        "audio": ("audio_id", "audio_path", "audio", "path"),
        "question": ("question", "instruction"),
        "options": ("choices", "options"),
        "answer": ("answer", "correct_answer"),
        "task": ("task",),
        "category": ("category",),
        "sub_category": ("sub-category", "sub_category", "sub-cat"),
        "difficulty": ("difficulty",),
        "dataset": ("dataset",),
    }

    def __init__(
        self,
        root: str | Path,
        task: str | None = "music",
        hidden: bool = False,
        prompt: str = PROMPT,
        audio: str = "real",
        seed: int = 0,
        rate: int = 16000,
        leave_out: bool = False,
        request: str | None = None,
    ):
        super().__init__(root, prompt, audio, seed, rate, leave_out, request)
        self.task, self.hidden = task, hidden

    def source_file(self) -> Path | None:
        """The first of the public files that is there."""
        return first_file(self.root, self.files)

    def read(self, file: Path, audio: AudioFolder) -> list[Item]:
        """The items of the task."""
        needed = ("id", "audio", "question", "options", *(() if self.hidden else ("answer",)))
        items = []
        rows = fields(read_records(file), self.names, needed, file)
        for number, row in among(rows, self.column, self.task, file):
            item = self._item(str(row.get("id") or f"row {number}"), row, audio)
            if item is not None:
                items.append(item)
        return items

    def _item(self, name: str, row: dict[str, Any], audio: AudioFolder) -> Item | None:
        options, question = as_list(row.get("options")), str(row.get("question") or "").strip()
        clips = self.clip(audio, name, row.get("audio"))
        if clips is None:
            return None
        if not question:
            self.fault(name, "it asks nothing")
            return None
        meta = {
            "options": options,
            **{key: row[key] for key in self.kept if row.get(key)},
        }
        text = self.ask(question=question, options=listed(options))
        gold = row.get("answer")
        if self.hidden and not gold:
            return Item(name, clips, text, None, None, meta)
        letter = self.choice(name, options, gold)
        if letter is None:
            return None
        return Item(name, clips, text, letter, "multiple_choice", meta | {"answer_text": str(gold)})


class MMAR(MMAU):
    """MMAR: 1,000 questions that take reasoning about sounds, music, speech and their mixes; 206 are about music alone.

    The layout is the public one: ``MMAR-meta.json``, a list of ``{id, audio_path, question, choices, answer, modality,
    category, sub-category, language, source, url, timestamp}``, and the audio of its archive beside it. The field names
    were read in programs that read the public file. The benchmark's own score is MMAU's rule (its program is a changed
    copy of MMAU's).

    Paper: arXiv:2505.13032 (MMAR).
    Differs from paper: that a published music column is the modality ``music``, without the mixes, is our reading.

    Args:
        root: the folder.
        modality: ``music``, ``sound``, ``speech``, ``mix-music-speech``, ``mix-sound-music``, ``mix-sound-speech``,
            ``mix-sound-music-speech``, or None for all.
        prompt: with ``{question}`` and ``{options}``.
        audio, seed, rate, leave_out, request: see :class:`Benchmark`.
    """

    name = "mmar"
    column = "modality"
    kept = ("modality", "category", "sub_category", "language")
    files = ("MMAR-meta.json", "*MMAR*.json*", "*mmar*.json*", "*.json", "*.jsonl", "*.parquet")
    names = {
        "id": ("id",),
        "audio": ("audio_path", "audio"),
        "question": ("question",),
        "options": ("choices", "options"),
        "answer": ("answer",),
        "modality": ("modality",),
        "category": ("category",),
        "sub_category": ("sub-category", "sub_category"),
        "language": ("language",),
    }

    def __init__(
        self,
        root: str | Path,
        modality: str | None = "music",
        prompt: str = PROMPT,
        audio: str = "real",
        seed: int = 0,
        rate: int = 16000,
        leave_out: bool = False,
        request: str | None = None,
    ):
        super().__init__(root, modality, False, prompt, audio, seed, rate, leave_out, request)


class MMAUPro(Benchmark):
    """MMAU-Pro: 5,305 items of 49 skills; multiple choice of up to ten options, open questions, instructions.

    The layout is the public one: ``test.parquet`` (or json, jsonl) with ``id, audio_path, question, answer, choices,
    category, sub-cat, length_type, perceptual_skills, reasoning_skills`` and more, and the audio of its ``data.zip``
    beside it. ``audio_path`` may name several clips. The field names were read in programs that read the public file.

    The benchmark scores a choice by the option whose embedding (NV-Embed-v2) is nearest to the answer, and open answers
    by a judge (Qwen2.5-7B-Instruct). Neither is done here: choices are read by a matcher, open items are asked and not
    scored.

    Paper: arXiv:2508.13992 (MMAU-Pro).
    Differs from paper: see above. That its music column is the category ``music`` is our reading.

    Args:
        root: the folder.
        category: as the file has it, ``music`` for example; None for all.
        forms: which items: ``closed`` (a choice), ``open``, ``instructions``.
        prompt: with ``{question}`` and ``{options}``; open questions and instructions are asked bare.
        audio, seed, rate, leave_out, request: see :class:`Benchmark`.
    """

    name = "mmau_pro"
    parts = ("closed", "open", "instructions")
    names = {
        "id": ("id", "question_id"),
        "audio": ("audio_path", "audio_id", "audio_paths", "audio"),
        "question": ("question",),
        "options": ("choices", "options"),
        "answer": ("answer",),
        "category": ("category",),
        "sub_category": ("sub-cat", "sub-category", "sub_category"),
        "length": ("length_type",),
        "perceptual_skills": ("perceptual_skills",),
        "reasoning_skills": ("reasoning_skills",),
    }

    def __init__(
        self,
        root: str | Path,
        category: str | None = "music",
        forms: Sequence[str] = ("closed",),
        prompt: str = PROMPT,
        audio: str = "real",
        seed: int = 0,
        rate: int = 16000,
        leave_out: bool = False,
        request: str | None = None,
    ):
        super().__init__(root, prompt, audio, seed, rate, leave_out, request)
        self.category, self.forms = category, tuple(forms)
        if not self.forms or set(self.forms) - set(self.parts):
            raise ConfigError(f"mmau_pro: forms are some of {', '.join(self.parts)}, not {list(forms)}")

    def source_file(self) -> Path | None:
        """The first of the files that may be it."""
        return first_file(self.root, ("test.parquet", "*.parquet", "test.json*", "*.jsonl", "*.json"))

    def read(self, file: Path, audio: AudioFolder) -> list[Item]:
        """The items of the category and the forms."""
        items = []
        needed = ("id", "audio", "question", "options", "answer", "category")
        rows = fields(read_records(file), self.names, needed, file)
        for number, row in among(rows, "category", self.category, file):
            category = str(row.get("category") or "")
            options = as_list(row.get("options"))
            form = "open" if category == OPEN or len(options) < 2 else "closed"
            form = "instructions" if category == INSTRUCTIONS else form
            if form not in self.forms:
                continue
            item = self._item(str(row.get("id") or f"row {number}"), row, form, options, audio)
            if item is not None:
                items.append(item)
        return items

    def _item(self, name: str, row: dict[str, Any], form: str, options: list[str], audio: AudioFolder) -> Item | None:
        found = [self.clip(audio, name, path) for path in as_list(row.get("audio")) or [""]]
        if None in found:
            return None
        clips = tuple(clip for one in found for clip in one or ())
        kept = ("category", "sub_category", "length")
        meta: dict[str, Any] = {"form": form} | {key: row[key] for key in kept if row.get(key)}
        for key in ("perceptual_skills", "reasoning_skills"):
            meta |= {key: as_list(row[key])} if row.get(key) else {}
        question, gold = str(row.get("question") or "").strip(), row.get("answer")
        if form != "closed":
            return Item(name, clips, question, None if gold is None else str(gold), None, meta, form)
        letter = self.choice(name, options, gold)
        if letter is None:
            return None
        meta |= {"options": options, "answer_text": str(gold)}
        text = self.ask(question=question, options=listed(options))
        return Item(name, clips, text, letter, "multiple_choice", meta, form)
