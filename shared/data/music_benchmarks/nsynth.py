"""NSynth: single notes, and what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bestiary.shared.core.build import nearest
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.data.music_benchmarks.benchmark import Benchmark, Item
from bestiary.shared.data.music_benchmarks.records import AudioFolder, fields, first_file, read_records

SOURCES = ("acoustic", "electronic", "synthetic")
FAMILIES = (
    "bass", "brass", "flute", "guitar", "keyboard", "mallet", "organ", "reed", "string", "synth_lead", "vocal",
)  # fmt: skip
"""The test notes have none of synth_lead; it is an option all the same."""
PITCHES = range(128)

PROMPTS = {
    "source": "What is the source of the sound of this music note? Choose one of: acoustic, electronic, synthetic.",
    "instrument": (
        "To which family does the instrument of this music note belong? Choose one of: bass, brass, flute, guitar, "
        "keyboard, mallet, organ, reed, string, synth lead, vocal."
    ),
    "pitch": "What is the pitch of this music note as a MIDI number, from 0 to 127? Answer with the number alone.",
}
"""Ours, by task: NSynth prescribes none, and published scores of language models do not name theirs."""


class NSynth(Benchmark):
    """NSynth's 4,096 test notes of four seconds; each task is a part of its own.

    The tasks are ``source`` (three answers), ``instrument`` (eleven families) and ``pitch`` (a MIDI number). The layout
    is the public one: ``examples.json``, a map from notes to ``{instrument_source_str, instrument_family_str, pitch,
    instrument_str, velocity, qualities_str …}``, and ``audio/NOTE.wav``, in the folder or in ``nsynth-test`` below it.

    Paper: arXiv:1704.01279 (NSynth).

    Args:
        root: the folder.
        tasks: which of them.
        prompts: task to what is asked, in place of :data:`PROMPTS`.
        audio, seed, rate, leave_out, request: see :class:`Benchmark`.

    Raises:
        ConfigError: for a task that is not there.
    """

    name = "nsynth"
    asks = ()
    parts = tuple(PROMPTS)
    names = {
        "id": ("note_str", "id"),
        "source": ("instrument_source_str",),
        "instrument": ("instrument_family_str",),
        "pitch": ("pitch",),
        "instrument_name": ("instrument_str",),
        "velocity": ("velocity",),
    }

    def __init__(
        self,
        root: str | Path,
        tasks: Sequence[str] = ("source", "instrument", "pitch"),
        prompts: Mapping[str, str] | None = None,
        audio: str = "real",
        seed: int = 0,
        rate: int = 16000,
        leave_out: bool = False,
        request: str | None = None,
    ):
        self.prompts = PROMPTS | dict(prompts or {})
        super().__init__(root, "\n".join(self.prompts.values()), audio, seed, rate, leave_out, request)
        for task in (*tasks, *self.prompts):
            if task not in PROMPTS:
                raise ConfigError(f"nsynth has no task {task!r}{nearest(task, PROMPTS)}; {', '.join(PROMPTS)}")
        self.tasks = tuple(tasks)

    def source_file(self) -> Path | None:
        """The labels of the notes."""
        return first_file(self.root, ("examples.json", "nsynth-test/examples.json"))

    def read(self, file: Path, audio: AudioFolder) -> list[Item]:
        """All notes, with each task."""
        items = []
        notes = AudioFolder(file.parent / "audio")
        for row in fields(read_records(file), self.names, ("id", *self.tasks), file):
            name = str(row["id"])
            clips = self.clip(notes, name, f"{name}.wav")
            if clips is None:
                continue
            meta = {key: row[key] for key in ("instrument_name", "velocity") if row.get(key) is not None}
            for task in self.tasks:
                labels = {"source": SOURCES, "instrument": FAMILIES}.get(task)
                value = row.get(task)
                if value not in (PITCHES if labels is None else labels):
                    what = "a MIDI number" if labels is None else f"one of {', '.join(labels)}"
                    self.fault(name, f"its {task} {value!r} is not {what}")
                    continue
                more: dict[str, Any] = {"task": task} if labels is None else {"task": task, "labels": list(labels)}
                verifier = "numeric" if labels is None else "exact_text"
                answer = str(value).replace("_", " ")
                items.append(Item(f"{name}-{task}", clips, self.prompts[task], answer, verifier, meta | more, task))
        return items
