"""MuChoMusic, and RUListening's harder variant of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.core.streams import derive_seed
from bestiary.shared.data.music_benchmarks.benchmark import Benchmark, Clip, Item, listed
from bestiary.shared.data.music_benchmarks.records import (
    AudioFolder,
    Row,
    as_list,
    fields,
    first_file,
    read_records,
)

PROMPT = "Question: {question}\nOptions: {options}\nThe correct answer is:"
"""MuChoMusic's own, without in-context examples; options stand as ``(A) …`` on one line."""

RUL_PROMPT = (
    "Provide your best guess of this question. Think step by step.\n\nQuestion: {question}\n\nOptions: {options}\n\n"
    "Write out your guess in the format of [[Letter]], such as [[A]], [[B]], [[C]], [[D]]."
)
"""RUListening's own, of its evaluation that leaves one distractor out."""


class MuChoMusic(Benchmark):
    """MuChoMusic: 1,187 questions of four options about 644 tracks of MusicCaps and Song Describer.

    Two public layouts are read, field names as in the benchmark's programs: the file that its ``prepare_prompts.py``
    writes, a list of ``{id, prompt, answers, answer_orders, dataset, genre, reasoning, knowledge, audio_path}`` where
    the right answer is the one whose order is 0; and ``muchomusic.csv`` with ``question, correct_answer,
    distractor_1_answer …, dataset, dataset_identifier, genre, music_knowledge, music_reasoning``, whose options are put
    in an order here, by row and seed. Audio is found by path, or by the track's identifier anywhere below the folder.

    Paper: arXiv:2408.01337 (MuChoMusic).

    Args:
        root: the folder.
        prompt: with ``{question}`` and ``{options}``.
        audio, seed, rate, leave_out, request: see :class:`Benchmark`.
    """

    name = "muchomusic"
    names = {
        "id": ("id", "question_id"),
        "track": ("dataset_identifier", "id"),
        "question": ("question",),
        "prompt": ("prompt",),
        "answers": ("answers", "options", "choices"),
        "orders": ("answer_orders", "order"),
        "gold": ("correct_answer", "answer"),
        "distractor_1": ("distractor_1_answer", "distractor_1"),
        "distractor_2": ("distractor_2_answer", "distractor_2"),
        "distractor_3": ("distractor_3_answer", "distractor_3"),
        "audio": ("audio_path", "audio"),
        "dataset": ("dataset",),
        "genre": ("genre",),
        "knowledge": ("knowledge", "music_knowledge"),
        "reasoning": ("reasoning", "music_reasoning"),
    }

    def __init__(
        self,
        root: str | Path,
        prompt: str = PROMPT,
        audio: str = "real",
        seed: int = 0,
        rate: int = 16000,
        leave_out: bool = False,
        request: str | None = None,
    ):
        super().__init__(root, prompt, audio, seed, rate, leave_out, request)

    def source_file(self) -> Path | None:
        """The questions."""
        here = ("muchomusic.json", "muchomusic.csv", "data/muchomusic.csv", "*.json", "*.jsonl", "*.parquet")
        return first_file(self.root, here)

    def read(self, file: Path, audio: AudioFolder) -> list[Item]:
        """All items."""
        records = read_records(file)
        shuffled = any("answers" in row or "answer_orders" in row for row in records[:1])
        needed = ("answers", "orders") if shuffled else ("question", "gold", "distractor_1")
        items = []
        for number, row in enumerate(fields(records, self.names, needed, file), 1):
            track = str(row.get("track") or f"row {number}")
            name = f"{number}-{track}"  # a track has several questions, and ids are the tracks'
            question = str(row.get("question") or _asked(row.get("prompt")) or "").strip()
            options, gold = _as_shuffled(row) if shuffled else self._shuffled(name, row)
            if not question:
                self.fault(name, "it asks nothing")
                continue
            letter = self.choice(name, options, gold)
            clips = self.clip(audio, name, row["audio"]) if row.get("audio") else self._track(audio, name, track)
            if letter is None or clips is None:
                continue
            meta = {"options": options, "answer_text": gold, "track": track}
            meta |= {key: row[key] for key in ("dataset", "genre") if row.get(key)}
            meta |= {key: as_list(row[key]) for key in ("knowledge", "reasoning") if row.get(key)}
            meta["kind"] = "+".join(key for key in ("knowledge", "reasoning") if meta.get(key)) or "none"
            text = self.ask(question=question, options=listed(options, " "))
            items.append(Item(name, clips, text, letter, "multiple_choice", meta))
        return items

    def _shuffled(self, name: str, row: Row) -> tuple[list[str], str | None]:
        gold = row.get("gold")
        options = [str(v) for v in (gold, *(row.get(f"distractor_{at}") for at in (1, 2, 3))) if v]
        return _in_order(options, "muchomusic", name, self.seed), gold

    def _track(self, audio: AudioFolder, name: str, track: str) -> tuple[Clip, ...] | None:
        """Song Describer's files are ``NUMBER.2min.mp3``, MusicCaps' ``[YOUTUBE]-[START-END].wav`` or a bare id."""
        track = track.removesuffix(".json")
        for wanted in dict.fromkeys((track, track.rpartition("_")[0])):
            if not wanted:
                continue
            found = audio.find(wanted) or audio.find(f"{wanted}.2min.mp3") or audio.starting(f"[{wanted}]")
            if found is not None:
                return (Clip(found),)
        return self.clip(audio, name, track)


class RULMuChoMusic(Benchmark):
    """RUListening: MuChoMusic's questions with four distractors that a language model cannot rule out unheard.

    Each question is asked four times, every time without another distractor, its options in an order by question, turn
    and seed: a *fold*. AudioQA's matcher ``rul`` reads the answers; accuracy is the mean over folds, and ``vote`` that
    of what most folds of a question answered, which is the authors' own number. Chance is 25 %.

    The layout is the public one: ``RUL-MuchoMusic.json``, a map from ids to ``{question, correct_answer, distractors,
    caption, PI}``, and an audio file ``ID.mp3`` of each anywhere below the folder. The field names were read there.

    Paper: arXiv:2504.00369 (RUListening).

    Args:
        root: the folder.
        prompt: with ``{question}`` and ``{options}``.
        audio, seed, rate, leave_out, request: see :class:`Benchmark`.
    """

    name = "rul_muchomusic"
    names = {
        "id": ("id", "question_id"),
        "question": ("question",),
        "gold": ("correct_answer", "answer"),
        "distractors": ("distractors",),
        "audio": ("audio_path", "audio"),
        "perceptual_index": ("PI", "perceptual_index"),
    }

    def __init__(
        self,
        root: str | Path,
        prompt: str = RUL_PROMPT,
        audio: str = "real",
        seed: int = 0,
        rate: int = 16000,
        leave_out: bool = False,
        request: str | None = None,
    ):
        super().__init__(root, prompt, audio, seed, rate, leave_out, request)

    def source_file(self) -> Path | None:
        """The questions."""
        return first_file(self.root, ("RUL-MuchoMusic.json", "*RUL*.json", "*.json", "*.jsonl", "*.parquet"))

    def read(self, file: Path, audio: AudioFolder) -> list[Item]:
        """All folds of all questions."""
        items = []
        rows = fields(read_records(file), self.names, ("id", "question", "gold", "distractors"), file)
        for number, row in enumerate(rows, 1):
            name = str(row["id"] if row.get("id") is not None else f"row {number}")
            question, gold = str(row.get("question") or "").strip(), row.get("gold")
            distractors = as_list(row.get("distractors"))
            clips = self.clip(audio, name, str(row.get("audio") or name))
            if clips is None:
                continue
            if not question or len(distractors) < 2:
                self.fault(name, f"it has {len(distractors)} distractors" if question else "it asks nothing")
                continue
            for left in range(len(distractors)):
                fold = self._fold(name, question, gold, distractors, left, clips, row)
                if fold is None:  # and so are the others
                    break
                items.append(fold)
        return items

    def _fold(
        self, name: str, question: str, gold: Any, distractors: list[str], left: int, clips: tuple[Clip, ...], row: Row
    ) -> Item | None:
        kept = [text for at, text in enumerate(distractors) if at != left]
        options = _in_order([str(gold), *kept], self.name, name, left, self.seed)
        letter = self.choice(name, options, gold)
        if letter is None:
            return None
        meta = {"options": options, "answer_text": gold, "item": name, "fold": left}
        if row.get("perceptual_index") is not None:
            meta["perceptual_index"] = float(row["perceptual_index"])
        text = self.ask(question=question, options=listed(options, " "))
        return Item(f"{name}-{left}", clips, text, letter, "multiple_choice", meta)


def _in_order(options: list[str], *parts: int | str) -> list[str]:
    rng = np.random.default_rng(derive_seed("order-of-options", *parts))
    return [options[i] for i in rng.permutation(len(options))]


def _as_shuffled(row: Row) -> tuple[list[str], str | None]:
    options, orders = as_list(row.get("answers")), as_list(row.get("orders"))
    gold = options[orders.index("0")] if "0" in orders and len(orders) == len(options) else None
    return options, gold


def _asked(prompt: Any) -> str | None:
    """The question of a whole prompt; examples may stand before it."""
    _, begin, rest = str(prompt or "").rpartition("Question:")
    question, end, _ = rest.partition("Options:")
    return question.strip() if begin and end else None
