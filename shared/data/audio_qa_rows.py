"""Rows of a user's questions about audio, from any of the layouts in use, as one kind of row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.data.splits import SPLITS
from bestiary.shared.language.chat_templates import ROLES

SOUND = re.compile(r"<sound(?:-(\d+))?>\n?")
"""NVIDIA's place of a clip: ``<sound>`` for the only one, ``<sound-1>`` and so on for several."""

KEYS = {"id", "audio", "start", "end", "question", "answer", "options", "task", "meta", "split", "think", "duration"}
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


@dataclass
class Clip:
    """A reference to audio: a file, and the part of it in seconds."""

    path: Path
    start: float = 0.0
    end: float | None = None


Turn = tuple[str, list[str | Clip]]
"""Role, and texts and clips in order."""


@dataclass
class Row:
    """One question with its answer.

    Attributes:
        id: its name. place: where it stands in the file. turns: the chat without its last answer.
        answer: the last answer. think: the thoughts before it. options: of a choice. task: what is asked about.
        meta: what is known of the clip. split: ``train``, ``val``, ``test``, or None for the hash of its audio.
        duration: seconds that the file says its audio has.
    """

    id: str
    place: str
    turns: list[Turn]
    answer: str
    think: str | None = None
    options: list[str] = field(default_factory=list)
    task: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    duration: float | None = None

    @property
    def clips(self) -> list[Clip]:
        """Its audio, in order."""
        return [piece for _, pieces in self.turns for piece in pieces if isinstance(piece, Clip)]


def read_rows(file: Path) -> Iterator[Row | tuple[str, str]]:
    """Rows of a file; (place, what is wrong) where one cannot be read.

    A ``.jsonl`` has an object a line; a ``.json`` a list of them, or NVIDIA's evaluation layout (``dataset_path``,
    ``split_path``, ``data``). What kind of object each is, its keys say: ``conversations`` (NVIDIA), ``messages`` (chat
    messages with content of type audio and text), or ``audio`` and ``question`` (ours).

    Raises:
        BadDataError: if the file is neither.
    """
    if file.suffix == ".jsonl":
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except ValueError as error:
                    yield f"line {number}", f"not JSON: {error}"
                    continue
                yield _row(value, f"line {number}", file.parent)
        return
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadDataError(f"{file} is not JSON: {error}") from error
    if isinstance(whole, list):
        for number, value in enumerate(whole, 1):
            yield _row(value, f"entry {number}", file.parent)
    elif isinstance(whole, dict) and isinstance(whole.get("data"), dict):
        yield from _evaluation(whole, file.parent)
    else:
        raise BadDataError(f"{file} is neither a list of questions nor an object with dataset_path and data")


def _evaluation(whole: dict[str, Any], beside: Path) -> Iterator[Row | tuple[str, str]]:
    """NVIDIA's evaluation layout: ``data`` maps numbers to name, prompt and output."""
    root = beside / str(whole.get("dataset_path") or "") / str(whole.get("split_path") or "")
    split = whole.get("split")
    for number, entry in whole["data"].items():
        place = f"data {number}"
        try:
            values = {"id": str(number), "audio": entry["name"], "question": entry["prompt"], "answer": entry["output"]}
        except (KeyError, TypeError):
            yield place, "it has no name, prompt and output"
            continue
        values |= {"task": whole.get("flamingo_task"), "split": split if split in SPLITS else "test"}
        yield _row(values, place, root)


def _row(value: Any, place: str, root: Path) -> Row | tuple[str, str]:
    try:
        if not isinstance(value, Mapping):
            raise ValueError("it is no object")
        if "conversations" in value:
            return _conversation(value, place, root)
        if "messages" in value:
            return _chat(value, place, root)
        return _question(value, place, root)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return place, " ".join(str(error).split())[:200] or type(error).__name__


def _question(value: Mapping[str, Any], place: str, root: Path) -> Row:
    """Our layout."""
    unknown = sorted(set(value) - KEYS)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; what is your own goes into meta")
    question = _text(value, "question")
    paths = value.get("audio") or []
    paths = [paths] if isinstance(paths, str) else list(paths)
    start, end = _number(value, "start") or 0.0, _number(value, "end")
    if start < 0 or (end is not None and end <= start):
        raise ValueError(f"start {start:g} and end {end} leave nothing to hear")
    clips: list[str | Clip] = [Clip(_path(path, root), start, end) for path in paths]
    options = value.get("options") or []
    if isinstance(options, Mapping):
        options = list(options.values())
    options = [str(option) for option in options]
    listed = " ".join(f"({chr(65 + i)}) {option}" for i, option in enumerate(options))
    asked = f"{question} {listed}" if options and listed not in question else question
    return _finish(Row("", place, [("user", [*clips, asked])], _text(value, "answer"), options=options), value, place)


def _conversation(value: Mapping[str, Any], place: str, root: Path) -> Row:
    """NVIDIA's layout: turns from human and gpt, clips where ``<sound>`` stands."""
    paths = value.get("sound") or []
    paths = [_path(path, root) for path in ([paths] if isinstance(paths, str) else paths)]
    turns: list[Turn] = []
    used = 0
    for turn in value["conversations"]:
        role = SPEAKERS.get(str(turn.get("from")))
        if role is None:
            raise ValueError(f"nobody is called {turn.get('from')!r}; turns are from human and gpt")
        pieces: list[str | Clip] = []
        rest = str(turn["value"])
        while match := SOUND.search(rest):
            number = int(match[1]) - 1 if match[1] else used
            if not 0 <= number < len(paths):
                raise ValueError(f"{match[0].strip()} stands there, and there are {len(paths)} sounds")
            pieces += [rest[: match.start()], Clip(paths[number])]
            rest, used = rest[match.end() :], used + 1
        turns.append((role, [piece for piece in [*pieces, rest] if piece != ""]))
    if used != len(paths):
        raise ValueError(f"{len(paths)} sounds, and {used} places for one")
    answer = _last_answer(turns)
    return _finish(Row("", place, turns, answer), value, place)


def _chat(value: Mapping[str, Any], place: str, root: Path) -> Row:
    """Chat messages: content is a text, or a list of ``{type: text | audio, text | path | audio}``."""
    turns: list[Turn] = []
    for message in value["messages"]:
        role = message["role"]
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}")
        content = message["content"]
        pieces: list[str | Clip] = []
        for piece in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if piece["type"] == "text":
                pieces.append(str(piece["text"]))
            elif piece["type"] == "audio":
                if "url" in piece:
                    raise ValueError("audio by url is never fetched: give a path")
                path = piece.get("path") or piece.get("audio")
                if not isinstance(path, str):
                    raise ValueError("audio has no path")
                pieces.append(Clip(_path(path, root)))
            else:
                raise ValueError(f"content of type {piece['type']!r}; there are text and audio")
        turns.append((role, pieces))
    answer = value["answer"] if "answer" in value else _last_answer(turns)
    return _finish(Row("", place, turns, str(answer)), value, place)


def _last_answer(turns: list[Turn]) -> str:
    if not turns or turns[-1][0] != "assistant":
        raise ValueError("the last turn is not an answer")
    _, pieces = turns.pop()
    if any(isinstance(piece, Clip) for piece in pieces):
        raise ValueError("an answer holds audio")
    return "".join(str(piece) for piece in pieces)


def _finish(row: Row, value: Mapping[str, Any], place: str) -> Row:
    """What all layouts share."""
    row.id = str(value.get("id") or place)
    row.task, row.split = value.get("task"), value.get("split")
    row.meta = dict(value.get("meta") or {})
    row.duration = _number(value, "duration")
    row.think = value.get("think")
    if row.think is None and (match := re.match(r"\s*<think>(.*?)</think>\s*(.*)", row.answer, re.DOTALL)):
        row.think, row.answer = match[1].strip(), match[2]
        row.answer = re.sub(r"^\s*<answer>(.*)</answer>\s*$", r"\1", row.answer, flags=re.DOTALL)
    if not row.answer.strip():
        raise ValueError("no answer")
    if not any(role == "user" for role, _ in row.turns):
        raise ValueError("nothing is asked")
    if row.split is not None and row.split not in SPLITS:
        raise ValueError(f"there is no split {row.split!r}; there are {', '.join(SPLITS)}")
    letters = [chr(65 + i) for i in range(len(row.options))]
    if row.options and row.answer.strip().strip("().").upper() not in letters and row.answer not in row.options:
        raise ValueError(f"the answer {row.answer!r} is none of the options")
    return row


def _path(path: Any, root: Path) -> Path:
    if not isinstance(path, str) or not path:
        raise ValueError(f"audio is a path, not {path!r}")
    if re.match(r"[a-z]+://", path):
        raise ValueError(f"{path} is a url, which is never fetched: give a path")
    return root / path


def _text(value: Mapping[str, Any], key: str) -> str:
    found = value.get(key)
    if isinstance(found, int | float) and not isinstance(found, bool):
        found = str(found)
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"no {key}")
    return found


def _number(value: Mapping[str, Any], key: str) -> float | None:
    found = value.get(key)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"{key} is a number of seconds, not {found!r}")
    return float(found)


def first_audio(turns: Sequence[Turn]) -> Path | None:
    """The first file that a row hears."""
    return next((piece.path for _, pieces in turns for piece in pieces if isinstance(piece, Clip)), None)
