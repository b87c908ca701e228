"""Descriptions, questions and thoughts about a piece: by a language model, or from templates without one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np

from bestiary.shared.core.streams import derive_seed
from bestiary.shared.music import prompts
from bestiary.shared.music.claims import INSTRUMENTS
from bestiary.shared.music.records import MODES, Record, name_chord, name_pitch, read_pitch
from bestiary.shared.rl.rewards.extract import after_think, last_fence

T = TypeVar("T")

Complete = Callable[[str], str]
"""A language model: prompt to answer."""

DESCRIBE = "Describe this music in full detail."
CHOICES = 4
METRES = ("2/4", "3/4", "4/4", "6/8", "9/8", "5/4")


@dataclass
class Item:
    """A description (``task`` caption) or a question (its skill), with its answer; ``options`` of a choice."""

    task: str
    question: str
    answer: str
    options: list[str] = field(default_factory=list)
    think: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass
class Written:
    """What was written of a piece, and how many answers were of no use, by reason."""

    items: list[Item] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


# ---------------------------------------------------------------------------------------------- by a language model


class ModelWriter:
    """Writes with a language model: one description, and questions of five skills.

    An answer that is not the JSON asked for is asked for once more, then dropped and counted.

    Args:
        complete: the model. questions: how many it is asked for; 0 for none.
    """

    def __init__(self, complete: Complete, questions: int = 5):
        self.complete, self.questions = complete, questions

    def __call__(self, record: Record, captions: Sequence[str], name: str) -> Written:
        """Write about a piece.

        Args:
            record: what is known. captions: initial captions, one a segment. name: of the piece.
        """
        out = Written()
        facts = facts_of(record, captions)
        aspects = "\n".join(f"- {text}" for text in prompts.ASPECTS.values())
        text = ask_json(self.complete, prompts.CAPTION.format(facts=facts, aspects=aspects), _caption)
        if text is None:
            out.dropped["caption: not the JSON asked for"] += 1
        else:
            out.items.append(Item("caption", DESCRIBE, text))
        if self.questions:
            skills = "\n".join(f"- {key}: {text}" for key, text in prompts.SKILLS.items())
            names = "|".join(prompts.SKILLS)
            prompt = prompts.QUESTIONS.format(facts=facts, skills=skills, skill_names=names, count=self.questions)
            found = ask_json(self.complete, prompt, _questions)
            if found is None:
                out.dropped["questions: not the JSON asked for"] += 1
            else:
                items, bad = found
                out.items += shuffled(items[: self.questions], name)
                out.dropped.update({"question: not in the form asked for": bad} if bad else {})
        return out


def shuffled(items: list[Item], name: str) -> list[Item]:
    """Items whose options stand in an order that is a function of the piece's name: models put the right one first."""
    rng = np.random.default_rng(derive_seed("music-qa", "options", name))
    for item in items:
        item.options = [item.options[int(n)] for n in rng.permutation(len(item.options))]
    return items


def write_thoughts(complete: Complete, record: Record, item: Item, captions: Sequence[str] = ()) -> str | None:
    """A chain of thought that leads to an item's answer, one step a line; None where the model gives none."""
    prompt = prompts.THOUGHTS.format(facts=facts_of(record, captions), question=_asked(item), answer=item.answer)
    return ask_json(complete, prompt, _steps)


def ask_json(complete: Complete, prompt: str, parse: Callable[[Any], T]) -> T | None:
    """What ``parse`` makes of the model's JSON; asked twice at most, None if both answers are refused.

    The answer is JSON, after thoughts and in one code fence perhaps; ``parse`` raises ValueError, KeyError or TypeError
    for anything but what was asked for.
    """
    for _ in range(2):
        text = after_think(complete(prompt)).strip()
        fenced = last_fence(text, ("json",)) if text.startswith("```") else None
        try:
            return parse(json.loads(text if fenced is None else fenced))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return None


def facts_of(record: Record, captions: Sequence[str]) -> str:
    """A record and initial captions as a prompt tells them."""
    lines = []
    for category in record.metadata():
        value = record.values[category]
        sure = "" if value.confidence is None else f", confidence {value.confidence:.2f}"
        lines.append(f"- {category}: {', '.join(record.texts(category))} ({value.source}{sure})")
    if record.chords:
        moves = " ".join(f"{chord.start:.1f}s {chord.name or 'none'}" for chord in record.chords[:200])
        lines.append(f"- Chords and when they begin: {moves}")
    if record.transcript:
        lines.append(f"- Words: {record.transcript[:4000]}")
    lines += [f"- Heard in part {n}: {text}" for n, text in enumerate(captions, 1)]
    return prompts.FACTS.format(seconds=record.seconds, facts="\n".join(lines) or "- nothing")


def _caption(value: Any) -> str:
    text = _text(value["caption"])
    if set(value) != {"caption"}:
        raise ValueError("other keys")
    return text


def _questions(value: Any) -> tuple[list[Item], int]:
    """Good questions, and how many were not in the form asked for; ValueError where none is."""
    entries = _list(value["questions"])
    items = []
    for entry in entries:
        try:
            options = [_text(option) for option in _list(entry["options"])]
            item = Item(entry["skill"], _text(entry["question"]), _text(entry["answer"]), options)
        except (ValueError, KeyError, TypeError):
            continue
        distinct = {" ".join(option.casefold().split()) for option in options}
        if item.task in prompts.SKILLS and item.answer in options and len(options) == len(distinct) == CHOICES:
            items.append(item)
    if not items:
        raise ValueError("no question")
    return items, len(entries) - len(items)


def _steps(value: Any) -> str:
    found = [" ".join(_text(step).split()) for step in _list(value["steps"])]
    if not found:
        raise ValueError("no steps")
    # Every step ends as a sentence does, so that the check splits them where the model did.
    return "\n".join(step if step[-1] in ".!?;" else f"{step}." for step in found)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("no text")
    value.encode()  # a ValueError where it holds half a character, which no file takes
    return value.strip()


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("no list")
    return value


def _asked(item: Item) -> str:
    listed = " ".join(f"({chr(65 + n)}) {option}" for n, option in enumerate(item.options))
    return f"{item.question} {listed}".strip()


# ---------------------------------------------------------------------------------------------- from templates


class TemplateWriter:
    """Writes from the record alone: a description that names all of it, and choices with near wrong answers.

    Args:
        questions: how many at most.
    """

    def __init__(self, questions: int = 8):
        self.questions = questions

    def __call__(self, record: Record, captions: Sequence[str], name: str) -> Written:
        """Write about a piece; the order of options is a function of its name."""
        rng = np.random.default_rng(derive_seed("music-qa", name))
        items = [Item("caption", DESCRIBE, text)] if (text := describe(record)) else []
        return Written([*items, *shuffled(_template_questions(record, rng)[: self.questions], name)])


SENTENCES = {
    "Genre": "The genre is {}.",
    "Instruments": "It is played by {}.",
    "BPM": "The tempo is {} bpm.",
    "Meter": "The metre is {}.",
    "Key": "The key is {}.",
    "Theory": "The chords are {}.",
    "Structure": "The form is {}.",
    "Dynamics": "The dynamics are {}.",
    "Vocal character": "The voice is {}.",
    "Lyric themes": "The words are about {}.",
    "Mix notes": "The mix is {}.",
}
"""How a description says each category."""


def describe(record: Record) -> str:
    """A sentence for each category that is known."""
    known = record.metadata()
    return " ".join(form.format(", ".join(record.texts(name))) for name, form in SENTENCES.items() if name in known)


def template_thoughts(record: Record) -> str:
    """A short chain from the record: what any answer about the piece can begin with."""
    names = ("Instruments", "BPM", "Meter", "Key", "Theory")
    return "\n".join(SENTENCES[name].format(", ".join(record.texts(name))) for name in names if name in record.values)


def _template_questions(record: Record, rng: np.random.Generator) -> list[Item]:
    out: list[Item] = []

    def ask(skill: str, question: str, answer: str, others: Sequence[str]) -> None:
        wrong = list(dict.fromkeys(o for o in others if o != answer))[: CHOICES - 1]
        if len(wrong) == CHOICES - 1:
            out.append(Item(skill, question, answer, [answer, *wrong]))

    key = read_pitch(record.texts("Key")[0]) if "Key" in record.values else None
    if key is not None:
        # Any others: of the right key's neighbours alone, it would be the one that is a neighbour of all.
        keys = [(tonic, mode) for tonic in range(12) for mode in MODES]
        others = [name_pitch(keys[int(n)]) for n in rng.permutation(24)]
        ask("attribute", "What is the key?", name_pitch(key), others)
    if "BPM" in record.values:
        bpm = float(record.values["BPM"].value)  # type: ignore[arg-type]
        # The right one may be the slowest, the fastest or between: the middle is no better guess.
        rank = int(rng.integers(CHOICES))
        speeds = [f"{bpm * 1.25 ** (n - rank):.0f} bpm" for n in range(CHOICES) if n != rank]
        ask("attribute", "What is the tempo?", f"{bpm:.0f} bpm", speeds)
    if "Meter" in record.values:
        others = [METRES[int(n)] for n in rng.permutation(len(METRES))]
        ask("attribute", "What is the time signature?", record.texts("Meter")[0], others)
    if "Instruments" in record.values:
        heard = [name.casefold() for name in record.texts("Instruments")]
        others = [n for n in INSTRUMENTS if not any(n.rstrip("s") in h or h.rstrip("s") in n for h in heard)]
        others = [others[int(n)] for n in rng.permutation(len(others))]
        ask("attribute", "Which of these instruments is heard?", record.texts("Instruments")[0], others)
    _chord_questions(record, rng, ask)
    words = (record.transcript or "").split()
    if len(words) >= 16:
        starts = [int(n) for n in 4 + rng.permutation(len(words) - 7)]
        phrases = [" ".join(words[n : n + 4]) for n in starts]
        ask("lyrics", "With which of these words do the lyrics begin?", " ".join(words[:4]), phrases)
    return out


def _chord_questions(record: Record, rng: np.random.Generator, ask: Callable[..., None]) -> None:
    sounding = [chord for chord in record.chords if chord.name]
    if not sounding:
        return
    totals: Counter[str] = Counter()
    for chord in sounding:
        totals[str(chord.name)] += chord.end - chord.start  # type: ignore[assignment]
    names = [name for name, _ in totals.most_common()]
    absent = [name_chord((root, mode)) for root in range(12) for mode in MODES]
    absent = [absent[int(n)] for n in rng.permutation(24) if absent[int(n)] not in totals]
    first = str(sounding[0].name)
    ask("harmony", "Which chord comes first?", first, [*names, *absent])
    if len(names) > 1 and totals[names[0]] >= 1.5 * totals[names[1]]:
        ask("structure", "Which of these chords is heard longest in all?", names[0], [*names, *absent])
    held = [chord for chord in sounding if chord.end - chord.start >= 1.5]
    if len(held) > 1:
        chord = held[int(rng.integers(1, len(held)))]
        middle = (chord.start + chord.end) / 2
        ask("temporal", f"Which chord sounds {middle:.1f} seconds after the start?", str(chord.name), [*names, *absent])
