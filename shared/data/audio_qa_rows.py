"""Rows of a user's questions about audio, from any of the layouts in use, as one kind of row."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.data.splits import SPLITS
from bestiary.shared.language.chat_templates import ROLES

SOUND = re.compile(r"<sound(?:-(\d+))?>\n?")
"""NVIDIA's place of a clip: ``<sound>`` for the only one, ``<sound-1>`` and so on for several."""

KEYS = {"id", "audio", "start", "end", "question", "answer", "options", "task", "meta", "split", "think", "duration"}
KEYS |= {"rate"}
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
LETTERS = "ABCDEFGHIJ"
"""Options of a question, as the verifier ``multiple_choice`` knows them."""


class Fault(NamedTuple):
    """What is wrong with a row: where it stands, the kind of fault, and what exactly."""

    place: str
    kind: str
    text: str


class RowError(ValueError):
    """A row that cannot be read; the kind of fault, and what exactly."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


@dataclass
class Clip:
    """A reference to audio: a file and the part of it in seconds, or samples that stand in the row itself."""

    path: Path = Path()
    start: float = 0.0
    end: float | None = None
    samples: np.ndarray | None = None
    rate: int = 0


Turn = tuple[str, list[str | Clip]]
"""Role, and texts and clips in order."""


@dataclass
class Row:
    """One question with its answer.

    Attributes:
        id: its name. place: where it stands in the file. turns: the chat without its last answer.
        answer: the last answer. think: the thoughts before it. options: of a choice. task: what is asked about.
        meta: what is known of the clip. split: ``train``, ``val``, ``test``, or None for the hash of its audio.
        duration: seconds that the file says its audio has. rate: samples a second that it says it has.
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
    rate: float | None = None

    @property
    def clips(self) -> list[Clip]:
        """Its audio, in order."""
        return [piece for _, pieces in self.turns for piece in pieces if isinstance(piece, Clip)]

    @property
    def files(self) -> list[Path]:
        """The different files that it hears, in order."""
        return list(dict.fromkeys(clip.path for clip in self.clips if clip.samples is None))


def read_rows(file: Path) -> Iterator[Row | Fault]:
    """Rows of a file, and the faults of those that cannot be read.

    The file holds an object a line, or one JSON value: a list of objects, or NVIDIA's evaluation layout
    (``dataset_path``, ``split_path``, ``data``). What kind of object each is, its keys say: ``conversations`` (NVIDIA),
    ``messages`` (chat messages with content of type audio and text), or ``audio`` and ``question`` (ours).

    Raises:
        BadDataError: if the file is neither.
    """
    raw = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    start = raw.lstrip()[:1]
    if start not in (b"[", b"{"):
        raise BadDataError(f"{file} begins neither with {{ nor with [: it is neither JSON nor JSON lines")
    if start == b"{":
        first = _parse(raw.lstrip().split(b"\n", 1)[0])
        if isinstance(first, ValueError) or ("data" in first and "question" not in first):
            whole = _parse(raw)
            if isinstance(whole, dict) and isinstance(whole.get("data"), dict):
                yield from _evaluation(whole, file.parent)
                return
        for number, line in enumerate(raw.split(b"\n"), 1):
            if line.strip():
                value = _parse(line)
                place = f"line {number}"
                if isinstance(value, ValueError):
                    yield Fault(place, "not JSON", f"not JSON: {value}"[:200])
                else:
                    yield _row(value, place, file.parent)
        return
    whole = _parse(raw)
    if isinstance(whole, ValueError):
        raise BadDataError(f"{file} is not JSON: {whole}") from whole
    for number, value in enumerate(whole, 1):
        yield _row(value, f"entry {number}", file.parent)


def _parse(raw: bytes) -> Any:
    """The value, or the ValueError that says why there is none."""
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 at byte {error.start + 1}")
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return error


def _evaluation(whole: dict[str, Any], beside: Path) -> Iterator[Row | Fault]:
    """NVIDIA's evaluation layout: ``data`` maps numbers to name, prompt and output."""
    root = beside / str(whole.get("dataset_path") or "") / str(whole.get("split_path") or "")
    split = whole.get("split")
    for number, entry in whole["data"].items():
        place = f"data {number}"
        try:
            values = {"id": str(number), "audio": entry["name"], "question": entry["prompt"], "answer": entry["output"]}
        except (KeyError, TypeError):
            yield Fault(place, "layout", "it has no name, prompt and output")
            continue
        values |= {"task": whole.get("flamingo_task"), "split": split if split in SPLITS else "test"}
        yield _row(values, place, root)


def _row(value: Any, place: str, root: Path) -> Row | Fault:
    try:
        if not isinstance(value, Mapping):
            raise RowError("layout", "it is no object")
        if "conversations" in value:
            return _conversation(value, place, root)
        if "messages" in value:
            return _chat(value, place, root)
        return _question(value, place, root)
    except RowError as error:
        return Fault(place, error.kind, " ".join(str(error).split())[:200])
    except KeyError as error:
        return Fault(place, "layout", f"a key {error} is missing")
    except (ValueError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        return Fault(place, "layout", f"it has not the form that its keys promise ({why})")


def _question(value: Mapping[str, Any], place: str, root: Path) -> Row:
    """Our layout."""
    unknown = sorted(set(value) - KEYS)
    if unknown:
        raise RowError("unknown key", f"unknown key {unknown[0]!r}; what is your own goes into meta")
    question = _text(value, "question")
    paths = value.get("audio")
    paths = [] if paths is None else [paths] if isinstance(paths, str) else list(paths)
    start, end = _number(value, "start") or 0.0, _number(value, "end")
    if start < 0 or (end is not None and end <= start):
        raise RowError("span", f"start {start:g} and end {end} leave nothing to hear")
    clips: list[str | Clip] = [Clip(_path(path, root), start, end) for path in paths]
    options = _options(value.get("options"))
    listed = " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    asked = f"{question} {listed}" if options and listed not in question else question
    return _finish(Row("", place, [("user", [*clips, asked])], _text(value, "answer"), options=options), value, place)


def _options(options: Any) -> list[str]:
    if isinstance(options, Mapping):
        if [str(key).strip("() .") for key in options] != list(LETTERS[: len(options)]):
            raise RowError("options", "options by letter are A, B, C and so on, in order")
        options = list(options.values())
    if options is None:
        return []
    if not isinstance(options, list):
        raise RowError("options", f"options are a list of texts, not {options!r}")
    if not all(isinstance(option, str | int | float) for option in options):
        raise RowError("options", "options are texts or numbers")
    texts = [str(option) for option in options]
    if texts and not 2 <= len(texts) <= len(LETTERS):
        raise RowError("options", f"a choice has 2 to {len(LETTERS)} options, not {len(texts)}")
    if len({" ".join(text.casefold().split()) for text in texts}) < len(texts):
        raise RowError("options", "two options are the same")
    return texts


def _conversation(value: Mapping[str, Any], place: str, root: Path) -> Row:
    """NVIDIA's layout: turns from human and gpt, clips where ``<sound>`` stands."""
    paths = value.get("sound") or []
    paths = [_path(path, root) for path in ([paths] if isinstance(paths, str) else paths)]
    turns: list[Turn] = []
    used: list[int] = []
    for turn in value["conversations"]:
        role = SPEAKERS.get(turn.get("from"))
        if role is None:
            raise RowError("layout", f"nobody is called {turn.get('from')!r}; turns are from human and gpt")
        pieces: list[str | Clip] = []
        rest = str(turn["value"])
        while match := SOUND.search(rest):
            number = int(match[1]) - 1 if match[1] else len(used)
            if not 0 <= number < len(paths):
                raise RowError("sounds", f"{match[0].strip()} stands there, and there are {len(paths)} sounds")
            pieces += [rest[: match.start()], Clip(paths[number])]
            rest = rest[match.end() :]
            used.append(number)
        turns.append((role, [piece for piece in [*pieces, rest] if piece != ""]))
    if sorted(used) != list(range(len(paths))):
        raise RowError("sounds", f"{len(paths)} sounds, and places for {[number + 1 for number in used]}")
    answer = _last_answer(turns)
    return _finish(Row("", place, turns, answer), value, place)


def _chat(value: Mapping[str, Any], place: str, root: Path) -> Row:
    """Chat messages: content is a text, or a list of ``{type: text | audio, text | path | array}``."""
    turns: list[Turn] = []
    for message in value["messages"]:
        role = message["role"]
        if role not in ROLES:
            raise RowError("layout", f"unknown role {role!r}")
        content = message["content"]
        pieces: list[str | Clip] = []
        for piece in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if piece["type"] == "text":
                pieces.append(str(piece["text"]))
            elif piece["type"] == "audio":
                pieces.append(_chat_audio(piece, root))
            else:
                raise RowError("layout", f"content of type {piece['type']!r}; there are text and audio")
        turns.append((role, pieces))
    answer = _text(value, "answer") if "answer" in value else _last_answer(turns)
    return _finish(Row("", place, turns, answer, options=_options(value.get("options"))), value, place)


def _chat_audio(piece: Mapping[str, Any], root: Path) -> Clip:
    inner = piece.get("audio")
    piece = {**piece, **inner} if isinstance(inner, Mapping) else piece
    if "array" in piece:
        rate = piece.get("sampling_rate") or piece.get("rate")
        if isinstance(rate, bool) or not isinstance(rate, int):
            raise RowError("audio", "an array of samples needs its sampling_rate")
        samples = np.asarray(piece["array"], np.float32)
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise RowError("audio", "an array of samples is one row of finite numbers")
        return Clip(samples=samples, rate=rate)
    url = piece.get("url")
    return Clip(_path(url if url else piece.get("path") or inner, root))


def _last_answer(turns: list[Turn]) -> str:
    if not turns or turns[-1][0] != "assistant":
        raise RowError("answer", "the last turn is not an answer")
    _, pieces = turns.pop()
    if any(isinstance(piece, Clip) for piece in pieces):
        raise RowError("answer", "an answer holds audio")
    return "".join(str(piece) for piece in pieces)


def _finish(row: Row, value: Mapping[str, Any], place: str) -> Row:
    """What all layouts share."""
    own = value.get("id")
    row.id = place if own is None or own == "" else str(own)
    task, row.split = value.get("task"), value.get("split")
    row.task = None if task is None else str(task)
    meta = value.get("meta") or {}
    if not isinstance(meta, Mapping):
        raise RowError("meta", f"meta is an object, not {str(meta)[:60]!r}")
    row.meta = dict(meta)
    row.duration, row.rate = _number(value, "duration"), _number(value, "rate")
    row.think = None if value.get("think") is None else _text(value, "think")
    if row.think is None and (match := re.match(r"\s*<think>(.*?)</think>\s*(.*)", row.answer, re.DOTALL)):
        row.think, row.answer = match[1].strip() or None, match[2]
        row.answer = re.sub(r"^\s*<answer>(.*)</answer>\s*$", r"\1", row.answer, flags=re.DOTALL)
    if not row.answer.strip():
        raise RowError("answer", "no answer")
    if not any(role == "user" and any(isinstance(p, str) and p.strip() for p in pieces) for role, pieces in row.turns):
        raise RowError("question", "nothing is asked")
    texts = [piece for _, pieces in row.turns for piece in pieces if isinstance(piece, str)]
    try:
        "".join([row.id, row.answer, row.think or "", *row.options, *texts]).encode()
    except UnicodeEncodeError:
        # Neither a tokenizer nor a log could take it.
        raise RowError("text", "it holds half a character (a lone surrogate such as \\ud800)") from None
    if row.split is not None and row.split not in SPLITS:
        raise RowError("split", f"there is no split {row.split!r}; there are {', '.join(SPLITS)}")
    return row


def _path(path: Any, root: Path) -> Path:
    if not isinstance(path, str) or not path:
        raise RowError("audio", f"audio is a path, not {path!r}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", path):
        raise RowError("url", f"{path[:100]} is a url, which is never fetched: give a path")
    return Path(os.path.normpath(root / path))


def _text(value: Mapping[str, Any], key: str) -> str:
    found = value.get(key)
    if isinstance(found, int | float) and not isinstance(found, bool):
        found = str(found)
    if not isinstance(found, str) or not found.strip():
        raise RowError(key, f"no {key}")
    return found


def _number(value: Mapping[str, Any], key: str) -> float | None:
    found = value.get(key)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise RowError(key, f"{key} is a number, not {found!r}")
    return float(found)
