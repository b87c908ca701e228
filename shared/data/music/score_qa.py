"""score_qa: questions about clips that are rendered from real scores, so that every answer is exact."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from bestiary.shared.core.build import nearest
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Content, Example
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream, derive_seed
from bestiary.shared.data.lazy import LazyExamples
from bestiary.shared.data.music.clips import (
    CLIPS,
    INSTRUMENTS,
    METRE_NAMES,
    SIGNATURES,
    TEMPI,
    TEXTURES,
    Clip,
    ClipMaker,
)
from bestiary.shared.data.music.questions import (
    DESCRIBE,
    QUESTIONS,
    TIME_TASKS,
    VOCABULARY,
    ask,
    ask_choice,
    describe,
    thought,
    thoughts,
)
from bestiary.shared.data.music.render import check_renderer, renderer_revision
from bestiary.shared.data.music.scores import check_music21, parse_scores, scores_revision
from bestiary.shared.data.music.store import ClipStore, maker

STAGES = ("attributes", "sft", "think", "rl")
KINDS = ("questions", "choice", "captions", "time")

CLASSES: dict[str, list[str]] = {
    "instrument": list(INSTRUMENTS),
    "metre": list(METRE_NAMES),
    "key_signature": SIGNATURES,
    "tempo": list(TEMPI),
    "texture": list(TEXTURES.values()),
}
"""Attributes that supervised heads can learn, and their classes in order."""


class ScoreQA:
    """Chorales of Bach, American fiddle tunes and Irish tunes, played by eight instruments, and questions about them.

    A part is ``STAGE`` or ``STAGE/KIND``. Stages: ``attributes`` (a clip and the numbers of its labels), ``sft`` (the
    bare answer), ``think`` (a chain of thought from the score, then the answer in its tags), ``rl`` (the bare answer
    and the verifier that scores one). Kinds: ``questions``, ``choice`` (of four), ``captions``, ``time`` (clips of two
    or three instruments, and when each plays). Without a kind, training draws from all that ``kinds`` gives a weight,
    and questions are held out.

    Splits are by tune. Held-out examples are every asked question of every held-out clip. A question is asked of the
    clips for which its answer is known: ``key`` of those whose source declares one, ``chord`` of chorales that begin
    with a triad or seventh chord.

    Args:
        train_clips, held_out_clips: different clips for training, and of each held-out split.
        seconds: length of a clip. time_seconds: of one of several instruments.
        rate: samples a second.
        tasks: what questions ask about: instrument, metre, key_signature, key, tempo, texture, chord.
        kinds: weights of the kinds in training.
        seed: of the clips; it is not the run's, which draws from them.
        workers: processes that parse scores and render; None is one a core.
        soundfont: an .sf2 file with the programs of :data:`~bestiary.shared.data.music.clips.INSTRUMENTS`, to hear the
            same music with other timbres; None is the asset ``timgm6mb``.

    Raises:
        ConfigError: for tasks or kinds that are not there, or numbers that cannot be.
    """

    def __init__(
        self,
        train_clips: int = 6400,
        held_out_clips: int = 480,
        seconds: float = 6.0,
        time_seconds: float = 12.0,
        rate: int = 16000,
        tasks: Sequence[str] = ("instrument", "metre", "key_signature"),
        kinds: Mapping[str, float] | None = None,
        seed: int = 0,
        workers: int | None = None,
        soundfont: str | None = None,
    ):
        for name, value in (("train_clips", train_clips), ("held_out_clips", held_out_clips), ("rate", rate)):
            if value < 1:
                raise ConfigError(f"score_qa: {name} must be 1 or more, not {value}")
        if not 1 <= seconds <= 600 or not 4 <= time_seconds <= 600:
            raise ConfigError("score_qa: seconds must be between 1 and 600, and time_seconds between 4 and 600")
        self.tasks = list(tasks)
        known = [task for task in QUESTIONS if task not in TIME_TASKS]
        if not self.tasks:
            raise ConfigError(f"score_qa: tasks names none; there are: {', '.join(known)}")
        for task in self.tasks:
            if task not in known:
                raise ConfigError(f"score_qa has no task {task!r}{nearest(task, known)}; there are: {', '.join(known)}")
        self.kinds = dict(kinds or {"questions": 1.0})
        if set(self.kinds) - set(KINDS) or min(self.kinds.values()) < 0 or not sum(self.kinds.values()):
            raise ConfigError(f"score_qa: kinds gives weights to some of {', '.join(KINDS)}, not {self.kinds}")
        self.counts = {"train": train_clips, "val": held_out_clips, "test": held_out_clips}
        self.rate, self.workers, self.soundfont = rate, workers, soundfont
        self.options = {"seconds": float(seconds), "time_seconds": float(time_seconds), "seed": seed}
        self._made: dict[tuple[str, str, int], Clip] = {}
        self._stores: dict[tuple[str, str], ClipStore] = {}
        self._makers: dict[str, ClipMaker] = {}

    @cached_property
    def revision(self) -> str:
        """Of the scores, the sound and the held-out questions."""
        sound = renderer_revision(self.soundfont)
        parts = f"{CLIPS}|{sound}|{self.options}|{self.rate}|{self.counts['test']}|{self.tasks}"
        return f"score_qa-2-{scores_revision()}-{hashlib.sha256(parts.encode()).hexdigest()[:8]}"

    def spec(self) -> DataSpec:
        """Chat with audio."""
        return DataSpec(task="chat", modalities=("audio",))

    def check(self) -> None:
        """Raise an error that says what is missing: music21, the soundfont, or the synthesiser."""
        check_music21()
        check_renderer(self.soundfont)

    def prepare(self) -> None:
        """Parse the scores and render the clips of one instrument; otherwise it is done when the first is asked for."""
        for split in self.counts:
            self.store("clip", split).render()

    def store(self, kind: str, split: str) -> ClipStore:
        """The rendered clips (``clip`` or ``time_clip``) of a split."""
        key = kind, split
        if key not in self._stores:
            other = "seconds" if kind == "time_clip" else "time_seconds"
            options = {name: value for name, value in self.options.items() if name != other}
            self._stores[key] = ClipStore(
                kind, split, self.counts[split], self.rate, options, self.workers, self.soundfont
            )
        return self._stores[key]

    def clip(self, kind: str, split: str, number: int) -> Clip:
        """What is true of clip ``number``, without its notes."""
        key = kind, split, number
        if key not in self._made:
            if split not in self._makers:
                parse_scores(self.workers)
                self._makers[split] = maker(split, self.options)
            self._made[key] = replace(getattr(self._makers[split], kind)(number), notes=[])
        return self._made[key]

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Sample k: all clips once before any comes again, each with a question drawn for it.

        Where none of the questions has a known answer, the next clip of which one has takes its place.
        """
        stage, kind = self._part(part)
        rng = stream.rng(k, "question")
        if stage == "attributes":
            kind = "questions"
        elif kind is None:
            names = list(self.kinds)
            weights = np.array([self.kinds[name] for name in names])
            kind = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        count = self.counts["train"]
        first = stream.shuffled(k, count)
        for step in range(count):
            number = (first + step) % count
            clip = self.clip("time_clip" if kind == "time" else "clip", "train", number)
            tasks = self.asked(clip, stage, kind)
            if tasks:
                task = tasks[int(rng.integers(len(tasks)))]
                return self._example("train", number, clip, stage, kind, task, rng)
        raise ConfigError(f"score_qa: of {count} clips none has a known answer to {', '.join(self.tasks)}; make more")

    def asked(self, clip: Clip, stage: str, kind: str) -> list[str]:
        """The tasks that are asked of a clip; of one that is described, or classified, a single one: ``caption``."""
        if stage == "attributes" or kind == "captions":
            return ["caption"]
        return [task for task in (TIME_TASKS if kind == "time" else self.tasks) if task in clip.labels]

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """Every asked question of every clip of ``val`` or ``test``, or one description of each; read lazily."""
        if split not in ("val", "test"):
            raise ConfigError(f"score_qa holds out val and test, not {split!r}")
        stage, kind = self._part(part)
        return HeldOut(self, split, stage, "questions" if stage == "attributes" else kind or "questions")

    def _part(self, part: str | None) -> tuple[str, str | None]:
        stage, _, kind = (part or "rl").partition("/")
        if stage not in STAGES or kind not in ("", *KINDS):
            raise ConfigError(
                f"score_qa has no part {part!r}: a part is {', '.join(STAGES)}, alone or with /{', /'.join(KINDS)}"
            )
        return stage, kind or None

    def _example(
        self, split: str, number: int, clip: Clip, stage: str, kind: str, task: str, rng: np.random.Generator
    ) -> Example:
        store = self.store("time_clip" if kind == "time" else "clip", split)
        audio: Content = {
            "type": "audio",
            "value": store[number],
            "rate": self.rate,
            "key": f"score_qa/{store.key}/{number}",
        }
        meta: dict[str, Any] = {"tune": clip.tune, "tradition": clip.tradition, "classes": clip.classes}
        name = f"{split}-{number}"
        if stage == "attributes":
            return Example(id=name, messages=[{"role": "user", "content": [audio]}], answer="", meta=meta)
        if kind == "captions":
            text, answer = DESCRIBE[int(rng.integers(len(DESCRIBE)))], describe(clip, rng)
            meta |= {"task": task, "metadata": clip.record, "vocabulary": VOCABULARY}
            verifier = "metadata"
        else:
            asked = (ask_choice if kind == "choice" else ask)(clip, task, rng)
            text, answer, verifier = asked.text, asked.answer, "exact_text"
            meta |= {"task": task, "metadata": clip.record}
            if asked.options is not None:
                meta["options"], verifier = asked.options, "multiple_choice"
        messages: Any = [{"role": "user", "content": [audio, {"type": "text", "value": text}]}]
        name = f"{name}-{meta['task']}{'-choice' if kind == 'choice' else ''}"
        if stage == "rl":
            return Example(id=name, messages=messages, answer=answer, verifier=verifier, meta=meta)
        if stage == "think":
            answer = thought(thoughts(clip), answer)
        return Example(id=f"{stage}-{name}", messages=messages, answer=answer, meta=meta)


class HeldOut(LazyExamples):
    """Held-out examples, made when they are asked for.

    Args:
        source: the data set. split, stage, kind: which.
    """

    def __init__(self, source: ScoreQA, split: str, stage: str, kind: str):
        self.source, self.split, self.stage, self.kind = source, split, stage, kind

    @cached_property
    def _rows(self) -> list[tuple[int, str]]:
        """(clip, task) of each example."""
        rows = []
        for number in range(self.source.counts[self.split]):
            clip = self.source.clip(self._clips, self.split, number)
            rows += [(number, task) for task in self.source.asked(clip, self.stage, self.kind)]
        return rows

    @property
    def _clips(self) -> str:
        return "time_clip" if self.kind == "time" else "clip"

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, at: int) -> Example:
        number, task = self._rows[at]
        clip = self.source.clip(self._clips, self.split, number)
        rng = np.random.default_rng(derive_seed("held-out", self.split, self.kind, task, number))
        return self.source._example(self.split, number, clip, self.stage, self.kind, task, rng)
