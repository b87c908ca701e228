"""Questions about clips, in words: short answers, multiple choice, descriptions, and chains of thought."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.data.music.clips import (
    CHORDS,
    FLAT,
    INSTRUMENTS,
    MAJOR,
    METRE_NAMES,
    MINOR,
    SHARP,
    SIGNATURES,
    TEMPI,
    TEXTURES,
    Clip,
    chord_name,
    shortest_entry,
)
from bestiary.shared.data.music.scores import KINDS, METRES

QUESTIONS: dict[str, tuple[str, ...]] = {
    "instrument": ("Which instrument plays?", "What instrument is heard?"),
    "metre": ("What is the metre?", "Is the metre duple, triple or compound?"),
    "key_signature": ("What is the key signature?", "How many sharps or flats has the key signature?"),
    "key": ("What is the key?", "In which key is this music?"),
    "tempo": ("What is the tempo?", "Is the tempo slow, medium or fast?"),
    "texture": ("How many voices are heard?", "How many voices are there?"),
    "chord": ("Which chord comes first?", "What is the first chord?"),
    "first_instrument": ("Which instrument plays first?",),
    "last_instrument": ("Which instrument plays last?",),
    "first_half": ("What is heard in the first half?",),
    "second_half": ("What is heard in the second half?",),
    "entry": ("When does the {entering} enter?",),
}
"""Task to the ways it is asked; training and held-out questions are asked alike."""

TIME_TASKS = ("first_instrument", "last_instrument", "first_half", "second_half", "entry")

CHORD_NAMES = sorted({f"{root} {quality}" for root in (*SHARP, *FLAT) for quality in CHORDS.values()})

ANSWERS: dict[str, list[str]] = {
    "instrument": list(INSTRUMENTS),
    "metre": list(METRE_NAMES),
    "key_signature": SIGNATURES,
    "key": [f"{tonic} {mode}" for mode, tonics in (("major", MAJOR), ("minor", MINOR)) for tonic in tonics],
    "tempo": list(TEMPI),
    "texture": list(TEXTURES.values()),
    **{task: list(INSTRUMENTS) for task in TIME_TASKS if task != "entry"},
}
"""Task to all its answers, where they are the same for every clip; see :func:`answers`."""

DESCRIBE = ("Describe this music.", "Describe this music in full detail.")

VOCABULARY = {
    "Instruments": list(INSTRUMENTS),
    "Key signature": SIGNATURES,
    "Structure": list(TEXTURES.values()),
    "Genre": [*KINDS, "chorale"],
    "Theory": CHORD_NAMES,
}
"""Category of a description to all its values: naming them all is not describing."""

LETTERS = "ABCD"


class Asked(NamedTuple):
    """A question about a clip.

    Attributes:
        text: what is asked. answer: the right answer, bare. options: texts by letter, where it is a choice.
    """

    text: str
    answer: str
    options: dict[str, str] | None = None


def answers(clip: Clip, task: str) -> list[str]:
    """All answers that a question of this task could have about a clip; no two of them mean the same."""
    if task == "chord":
        fifths = clip.classes["key_signature"]
        return [chord_name((root, quality), fifths) for root in range(12) for quality in CHORDS.values()]
    if task == "entry":
        least = shortest_entry(clip.seconds)
        return [f"{second} seconds" for second in range(least, int(clip.seconds - least) + 1)]
    return ANSWERS[task]


def ask(clip: Clip, task: str, rng: np.random.Generator) -> Asked:
    """A question of a task that the clip has a label for."""
    ways = QUESTIONS[task]
    text = ways[int(rng.integers(len(ways)))]
    return Asked(text.format(entering=clip.entering), clip.labels[task])


def ask_choice(clip: Clip, task: str, rng: np.random.Generator) -> Asked:
    """The same as a choice among at most four answers, in any order.

    Where a clip has several instruments, all are among the options: that one of them is heard is not the answer.
    """
    plain = ask(clip, task, rng)
    others = [option for option in answers(clip, task) if option != plain.answer]
    others = [others[int(i)] for i in rng.permutation(len(others))]
    heard = {name for name, _ in clip.entries}
    picked = sorted(others, key=lambda option: option not in heard)[: len(LETTERS) - 1]
    order = [*picked, plain.answer]
    order = [order[int(i)] for i in rng.permutation(len(order))]
    options = dict(zip(LETTERS, order, strict=False))
    listed = " ".join(f"({letter}) {option}" for letter, option in options.items())
    return Asked(f"{plain.text} {listed}", next(k for k, v in options.items() if v == plain.answer), options)


def thoughts(clip: Clip) -> str:
    """A chain of thought from what is written in the score: instrument, metre, key signature; or who plays when."""
    if clip.entries:
        later = [f"then {name} after {second} seconds" for name, second in clip.entries[1:]]
        return ", ".join([f"first {clip.entries[0][0]}", *later])
    labels = clip.labels
    return f"instrument {labels['instrument']}, metre {labels['metre']}, key signature {labels['key_signature']}"


def thought(chain: str, answer: str) -> str:
    """An answer behind its thoughts, in the form that is rewarded."""
    return f"<think>{chain}</think><answer>{answer}</answer>"


def describe(clip: Clip, rng: np.random.Generator) -> str:
    """A description that names all of a clip's record."""
    record = clip.record
    named = record.get("Genre", "piece")
    key = f", the key is {record['Key']}" if "Key" in record else ""
    sentences = [
        f"The {named} is for {', '.join(record['Instruments'])} in {record['Structure']}.",
        f"The metre is {clip.labels['metre']}, {record['Meter']}, and the tempo {record['BPM']} bpm.",
        f"The key signature has {record['Key signature']}{key}.",
    ]
    if "Theory" in record:
        sentences.append(f"The first chord is {record['Theory']}.")
    if rng.random() < 0.5:
        sentences[1], sentences[2] = sentences[2], sentences[1]
    return " ".join(sentences)


def words() -> list[str]:
    """Every word, number and sign that questions, answers and thoughts are made of, for a tokenizer of whole words."""
    labels = {"instrument": "piano", "metre": "duple", "key_signature": "1 sharp"}
    record = {
        "Instruments": ["piano"],
        "Structure": "one voice",
        "Meter": "2/4",
        "BPM": "90",
        "Key signature": "1 sharp",
    }
    full = Clip([], 0, "", "", labels, {**record, "Key": "G major", "Theory": "G major", "Genre": "air"})
    plain = Clip([], 0, "", "", labels, record)
    several = Clip([], 0, "", "", {}, entries=[("piano", 0), ("flute", 3)])
    rng = np.random.default_rng(0)
    texts = [way.format(entering="piano") for ways in QUESTIONS.values() for way in ways]
    texts += [answer for values in (*ANSWERS.values(), *VOCABULARY.values()) for answer in values]
    texts += [f"{beats}/{unit}" for signs in METRES.values() for beats, unit in signs]
    texts += [*DESCRIBE, *map(str, range(251)), *(f"({letter})" for letter in LETTERS), "seconds"]
    texts += [thoughts(full), thoughts(several), thought("", ""), describe(full, rng), describe(plain, rng)]
    return sorted({piece for text in texts for piece in re.findall(r"</?\w+>|\w+|[^\w\s]", text)})


def chance(clip: Clip, task: str, choice: bool = False) -> float:
    """Accuracy of a random guess at a question about a clip."""
    count = len(answers(clip, task))
    return 1 / (min(len(LETTERS), count) if choice else count)


def baselines(clips: Sequence[Clip], task: str) -> dict[str, float]:
    """Accuracies on a task without listening, over the clips that have a label for it.

    Returns:
        ``chance``: of a random guess; ``majority``: of always giving these clips' commonest answer; ``texture``: of
        giving the commonest answer among the clips of as many voices, which shows what that alone gives away.

    Raises:
        BadDataError: if no clip has a label for it.
    """
    known = [clip for clip in clips if task in clip.labels]
    if not known:
        raise BadDataError(f"none of {len(clips)} clips has a label for {task!r}")
    return {
        "chance": float(np.mean([chance(clip, task) for clip in known])),
        "majority": _best_guess([(clip.labels[task], "") for clip in known]),
        "texture": _best_guess([(clip.labels[task], clip.labels.get("texture", "")) for clip in known]),
    }


def _best_guess(pairs: Sequence[tuple[str, str]]) -> float:
    """Accuracy of the best fixed answer to each cue; pairs are (answer, cue)."""
    hits = sum(max(Counter(a for a, c in pairs if c == cue).values()) for cue in {c for _, c in pairs})
    return hits / len(pairs)
