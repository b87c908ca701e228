"""Rows of a user's own data as prompts: what a row may hold, and one report of all that is wrong."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from bestiary.shared.core.build import nearest
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import Example, Message, text_message
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.splits import SPLITS, split_of
from bestiary.shared.data.user_files import SHOWN, first_faults
from bestiary.shared.language.chat_templates import ROLES
from bestiary.shared.rl.rewards.registry import VERIFIERS

KEYS = ("prompt", "messages", "answer", "verifier", "meta", "id", "split")
NEEDS = {
    **dict.fromkeys(("exact_text", "genrm", "math", "multiple_choice", "numeric", "patch"), ("answer", ())),
    "code": ("meta", ("tests",)),
    "instructions": ("meta", ("instructions",)),
    "json_schema": ("meta", ("schema",)),
    "metadata": ("meta", ("metadata",)),
    "reasoning_gym": ("meta", ("task", "entry")),
}
"""What a verifier cannot do without; more is checked by the verifiers themselves when a stage starts."""


class PromptRows:
    """A data source over rows ``{prompt or messages, answer, verifier, meta, id, split}``.

    All rows are read and checked before anything else; a report lists up to 20 faults by place. Rows without a
    ``split`` are split by the hash of what is asked, so that a prompt that comes twice is not in two splits. A subclass
    yields the rows.

    Args:
        name: of the data set, in messages.
        path: the file or folder.
        verifier: for rows that name none.
        max_mb: largest size of the files together; all rows are kept in memory.

    Attributes:
        revision: name and sha256 of the files.
    """

    def __init__(self, name: str, path: str | Path, verifier: str | None, max_mb: float):
        self.name, self.path = name, Path(path).expanduser()
        if verifier is not None and verifier not in VERIFIERS:
            raise ConfigError(f"dataset.verifier: {_no_verifier(verifier)}")
        self.verifier, self.max_mb = verifier, max_mb

    def files(self) -> list[Path]:
        """The files, all of them there."""
        raise NotImplementedError

    def rows(self) -> Iterator[tuple[str, Any]]:
        """(place, row) of each row, or (place, ValueError) where it cannot be read."""
        raise NotImplementedError

    @cached_property
    def revision(self) -> str:
        """Name and hash of the files."""
        digest = hashlib.sha256()
        for file in self.files():
            digest.update(file.name.encode(errors="surrogateescape") + b"\0")
            with file.open("rb") as handle:
                while block := handle.read(2**20):
                    digest.update(block)
        return f"{self.name}-{digest.hexdigest()}"

    def spec(self) -> DataSpec:
        """Chat; it reads nothing."""
        return DataSpec(task="chat")

    def check(self) -> None:
        """Read and check all rows.

        Raises:
            MissingDataError: if the file is not there.
            BadDataError: with one report of all that is wrong; or for a set without a row to train on.
        """
        if not self._splits["train"]:
            raise BadDataError(
                f"{self.path}: none of its rows is to train on ({len(self._splits['val'])} are val and "
                f"{len(self._splits['test'])} test). Rows without a split are put by hash: add rows, or set their split"
            )

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Row k of the training split, all of them once before any comes again."""
        self._no_parts(part)
        self.check()
        rows = self._splits["train"]
        return rows[stream.shuffled(k, len(rows))]

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """The rows of ``val`` or ``test``, in the order of the file."""
        self._no_parts(part)
        if split not in ("val", "test"):
            raise ConfigError(f"{self.name} holds out val and test, not {split!r}")
        return self._splits[split]

    def _no_parts(self, part: str | None) -> None:
        if part is not None:
            raise ConfigError(f"the data set {self.name} has no parts; part={part!r} was asked for")

    @cached_property
    def _splits(self) -> dict[str, list[Example]]:
        size = sum(file.stat().st_size for file in self.files()) / 1e6
        if size > self.max_mb:
            raise BadDataError(
                f"{self.path} has {size:,.0f} MB, and all of it is kept in memory: give a part of it, or raise "
                f"dataset.max_mb above {self.max_mb:,.0f}"
            )
        splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
        faults: list[str] = []
        count = total = 0
        ids: dict[str, str] = {}
        asked: dict[bytes, tuple[str, str]] = {}
        for place, row in self.rows():
            total += 1
            try:
                if isinstance(row, ValueError):
                    raise row
                example, split = read_row(row, place, self.verifier)
                first = ids.setdefault(example["id"], place)
                if first != place:
                    raise ValueError(f"the id {example['id']!r} is that of {first} too")
                digest = hashlib.sha256(json.dumps(example["messages"]).encode()).digest()
                before, where = asked.setdefault(digest, (split, place))
                if before != split:
                    raise ValueError(f"what it asks is in the split {split}, and at {where} in {before}")
            except ValueError as error:
                count += 1
                if len(faults) < SHOWN:
                    faults.append(f"{place}: {error}")
                continue
            splits[split].append(example)
        if not total:
            raise BadDataError(f"{self.path} has no rows. A row is {{prompt, answer, verifier}}")
        if count:
            raise BadDataError(f"{self.path}: {count} of {total} rows cannot be used:\n{first_faults(faults, count)}")
        return splits


def read_row(row: Any, place: str, verifier: str | None = None) -> tuple[Example, str]:
    """One row as an example, and its split.

    Args:
        row: a mapping with :data:`KEYS`.
        place: names a row without an id.
        verifier: for a row that names none.

    Raises:
        ValueError: with all that is wrong with the row.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"a row is an object with prompt and answer, not {_short(row)}")
    row = {key: value for key, value in row.items() if value is not None}
    faults = [
        f"unknown key {_short(key)}{nearest(str(key), KEYS) or ';'} what is your own goes into meta"
        for key in row
        if key not in KEYS
    ]
    messages = _messages(row, faults)
    answer = _answer(row, faults)
    meta = row.get("meta", {})
    if not isinstance(meta, Mapping):
        faults.append(f"meta is an object, not {_short(meta)}")
        meta = {}
    named = row.get("verifier", verifier)
    if named is None:
        faults.append("no verifier (name one, or set dataset.verifier for all rows)")
    elif not isinstance(named, str) or named not in VERIFIERS:
        faults.append(_no_verifier(named))
    else:
        key, inside = NEEDS.get(named, ("", ()))
        if key == "answer" and not str(row.get("answer", "")).strip():
            faults.append(f"no answer, and the verifier {named} compares with one")
        faults += [f'no meta["{name}"], which the verifier {named} needs' for name in inside if name not in meta]
    name = row.get("id", place)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        faults.append(f"an id is text or a whole number, not {_short(name)}")
    split = row.get("split")
    if split is not None and split not in SPLITS:
        faults.append(f"there is no split {_short(split)}; there are {', '.join(SPLITS)}")
    example: Example = {"id": str(name), "messages": messages, "meta": dict(meta), "verifier": str(named)}
    if answer is not None:
        example["answer"] = answer
    if not faults:
        faults += _unwritable(example)
    if faults:
        raise ValueError("; ".join(faults))
    return example, str(split or split_of(json.dumps(messages)))


def _messages(row: Mapping[str, Any], faults: list[str]) -> list[Message]:
    before = len(faults)
    prompt, turns = row.get("prompt"), row.get("messages")
    if isinstance(prompt, list) and turns is None:
        prompt, turns = None, prompt
    if (prompt is None) == (turns is None):
        faults.append("neither prompt nor messages" if prompt is None else "both prompt and messages; give one")
        return []
    if turns is None:
        if not isinstance(prompt, str) or not prompt.strip():
            faults.append(f"a prompt is text, not {_short(prompt)}")
            return []
        return [text_message("user", prompt)]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        faults.append(f"messages is a list of {{role, content}}, not {_short(turns)}")
        return []
    messages = []
    for number, turn in enumerate(turns, 1):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if role not in ROLES:
            faults.append(f"message {number}: unknown role {_short(role)}; roles are {', '.join(ROLES)}")
            continue
        text = _content(content)
        if text is None or (role == "user" and not text.strip()):
            faults.append(f"message {number}: its content is no text, or empty: {_short(content)}")
        else:
            messages.append(text_message(role, text))
    if len(faults) == before and messages[-1]["role"] not in ("user", "tool"):
        faults.append(f"the last message is the {messages[-1]['role']}'s; an answer belongs under answer")
    return messages


def _content(content: Any) -> str | None:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not content:
        return None
    texts = []
    for piece in content:
        text = piece.get("value", piece.get("text")) if isinstance(piece, Mapping) else None
        if not isinstance(text, str) or piece.get("type") != "text":
            return None
        texts.append(text)
    return "".join(texts)


def _answer(row: Mapping[str, Any], faults: list[str]) -> str | None:
    answer = row.get("answer")
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, float) and not math.isfinite(answer):
        faults.append(f"the answer {answer} is no number")
        return None
    try:
        return json.dumps(answer, ensure_ascii=False)
    except (TypeError, ValueError):
        faults.append(f"the answer is neither text nor JSON: {_short(answer)}")
        return None


def _unwritable(example: Example) -> list[str]:
    """Half characters (lone surrogates) cannot be encoded, so neither a tokenizer nor a log could take them."""
    try:
        json.dumps(example, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return ["it holds half a character (a lone surrogate such as \\ud800)"]
    except (TypeError, ValueError, RecursionError) as error:
        return [f"it is no JSON: {error}"[:120]]
    return []


def _no_verifier(name: Any) -> str:
    return (
        f"there is no verifier {_short(name)}{nearest(str(name), VERIFIERS)}; there are {', '.join(sorted(VERIFIERS))}"
    )


def _short(value: Any) -> str:
    # Only the beginning of a long text is shown, and it is cut before it is written out.
    text = repr(value[:60]) if isinstance(value, str) else repr(value)[:60]
    return text.encode(errors="backslashreplace").decode()
