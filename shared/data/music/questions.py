"""Questions about clips, in words: short answers, multiple choice, descriptions, and chains of thought."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bestiary.shared.data.music.clips import (
    CHORDS,
    INSTRUMENTS,
    MAJOR,
    METRE_NAMES,
    MINOR,
    SIGNATURES,
    TEMPI,
    TEXTURES,
    Clip,
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
    "entry": ("When does the {last} enter?",),
}
"""Task to the ways it is asked; training and held-out questions are asked alike."""

TIME_TASKS = ("first_instrument", "last_instrument", "first_half", "second_half", "entry")

OPTIONS: dict[str, list[str]] = {
    "instrument": list(INSTRUMENTS),
    "metre": list(METRE_NAMES),
    "key_signature": SIGNATURES,
    "key": [f"{tonic} {mode}" for mode, tonics in (("major", MAJOR), ("minor", MINOR)) for tonic in tonics],
    "tempo": list(TEMPI),
    "texture": list(TEXTURES.values()),
    "chord": [f"{tonic} {quality}" for tonic in MAJOR for quality in CHORDS.values()],
    "entry": [f"{second} seconds" for second in range(1, 31)],
    **dict.fromkeys(("first_instrument", "last_instrument", "first_half", "second_half"), list(INSTRUMENTS)),
}
"""Task to all its answers."""

DESCRIBE = ("Describe this music.", "Describe this music in full detail.")

VOCABULARY = {
    "Instruments": list(INSTRUMENTS),
    "Key signature": SIGNATURES,
    "Structure": list(TEXTURES.values()),
    "Genre": [*KINDS, "chorale"],
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


def ask(clip: Clip, task: str, rng: np.random.Generator) -> Asked:
    """A question of a task that the clip has a label for."""
    ways = QUESTIONS[task]
    text = ways[int(rng.integers(len(ways)))]
    return Asked(text.format(last=clip.labels.get("last_instrument", "")), clip.labels[task])


def ask_choice(clip: Clip, task: str, rng: np.random.Generator) -> Asked:
    """The same as a choice among at most four answers, in any order."""
    plain = ask(clip, task, rng)
    others = [option for option in OPTIONS[task] if option != plain.answer]
    picked = [others[int(i)] for i in rng.permutation(len(others))[: len(LETTERS) - 1]]
    order = [*picked, plain.answer]
    order = [order[int(i)] for i in rng.permutation(len(order))]
    options = dict(zip(LETTERS, order, strict=False))
    listed = " ".join(f"({letter}) {option}" for letter, option in options.items())
    return Asked(f"{plain.text} {listed}", next(k for k, v in options.items() if v == plain.answer), options)


def thoughts(clip: Clip) -> str:
    """A chain of thought from what is written in the score: instrument, metre, key signature; or who plays when."""
    labels = clip.labels
    if "entry" in labels:
        return f"first {labels['first_instrument']}, then {labels['last_instrument']} after {labels['entry']}"
    return f"instrument {labels['instrument']}, metre {labels['metre']}, key signature {labels['key_signature']}"


def thought(chain: str, answer: str) -> str:
    """An answer behind its thoughts, in the form that is rewarded."""
    return f"<think>{chain}</think><answer>{answer}</answer>"


def describe(clip: Clip, rng: np.random.Generator) -> str:
    """A description that names all of a clip's record."""
    record = clip.record
    named = f"A {record['Genre']}" if "Genre" in record else "A piece"
    key = f", the key is {record['Key']}" if "Key" in record else ""
    sentences = [
        f"{named} for {', '.join(record['Instruments'])} in {record['Structure']}.",
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
    texts: list[str] = [text for ways in QUESTIONS.values() for text in ways]
    texts += [option for options in OPTIONS.values() for option in options]
    texts += [value for values in VOCABULARY.values() for value in values]
    texts += [f"{beats}/{unit}" for signs in METRES.values() for beats, unit in signs]
    texts += [*DESCRIBE, *map(str, range(251)), *(f"({letter})" for letter in LETTERS), "bpm", "half-diminished"]
    example = Clip(
        [],
        0,
        "",
        "",
        {"instrument": "", "metre": "", "key_signature": "", "first_instrument": "", "last_instrument": ""},
        {"Genre": "", "Instruments": [""], "Structure": "", "Meter": "", "BPM": "", "Key signature": "", "Key": ""}
        | {"Theory": ""},
    )
    texts += [thoughts(example), thought("", "")]
    texts += [describe(example, np.random.default_rng(0)), "A piece for"]
    example.labels["entry"] = "1 seconds"
    texts.append(thoughts(example))
    found = {piece for text in texts for piece in re.findall(r"</?\w+>|\w+|[^\w\s]", text)}
    return sorted(found - {"{", "}"})


def chance() -> dict[str, float]:
    """Accuracy of guessing at random, by task."""
    return {task: 1 / len(options) for task, options in OPTIONS.items() if task != "entry"}


def majority(answers: Sequence[str]) -> float:
    """Accuracy of always giving the commonest answer."""
    return max(answers.count(answer) for answer in set(answers)) / len(answers) if answers else 0.0
