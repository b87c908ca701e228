"""completions.jsonl: what was asked, what the policy said, and what it was given for it; one group a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import Example, Message
from bestiary.shared.rl.protocols import Verdict
from bestiary.shared.rl.rollouts import Group, Trajectory


class Records:
    """Appends a step's groups; a run that goes on from a checkpoint drops what was written after it.

    Args:
        file: the path.
        tokens: keep token ids and log-probabilities, which replay needs.
    """

    def __init__(self, file: Path, tokens: bool = True):
        self.file, self.tokens = file, tokens
        self.size = 0

    def rewind(self, size: int) -> None:
        """Keep the first ``size`` bytes, those of the steps that are done."""
        self.size = size
        if self.file.is_file() and self.file.stat().st_size > size:
            os.truncate(self.file, size)

    def write(self, step: int, groups: Sequence[Group], rewards: Any, advantages: Any, extra: dict[str, Any]) -> None:
        """Append one line a group.

        Args:
            step: from 0.
            groups: in the order of the rewards.
            rewards, advantages: (P, G) nested lists; NaN is written as null.
            extra: goes into every line (the rule of a step: temperature, longest completion).
        """
        lines = []
        for group, reward, advantage in zip(groups, rewards, advantages, strict=True):
            rows = [self._row(*of) for of in zip(group.rows, reward, advantage, strict=True)]
            line = {"step": step, **extra, **described(group.example), "prompt_tokens": len(group.prompt_ids)}
            lines.append(json.dumps({**line, "rows": rows}, ensure_ascii=False, default=str))
        # Lone surrogates, which a policy may write, have no UTF-8.
        text = "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab") as handle:
            handle.write(text)
        self.size += len(text)

    def _row(self, row: Trajectory, reward: float, advantage: float) -> dict[str, Any]:
        verdict = row.verdict
        out: dict[str, Any] = {
            "sample": row.sample,
            "turns": row.turns,
            "tokens": row.tokens,
            "truncated": row.truncated,
            "score": verdict.score,
            "status": verdict.status,
            "reward": None if math.isnan(reward) else reward,
            "advantage": advantage,
        }
        out |= {"parts": dict(verdict.parts)} if verdict.parts else {}
        out |= {"note": verdict.note} if verdict.note else {}
        if self.tokens:
            out |= {"ids": row.ids, "logprobs": [round(x, 6) for x in row.logprobs]}
            if not all(row.own):
                out["own"] = [int(x) for x in row.own]
        return out


def described(example: Example) -> dict[str, Any]:
    """An example as it is recorded: all that a verifier needs, media left out."""
    messages = [{"role": m["role"], "content": message_texts(m)} for m in example["messages"]]
    out = {"id": example["id"], "messages": messages}
    return out | {k: example[k] for k in ("answer", "verifier", "meta") if k in example}


def message_texts(message: Message) -> str:
    """The text of a message, with a word in brackets for what is not text."""
    return "".join(c["value"] if c["type"] == "text" else f"<{c['type']}>" for c in message["content"])


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a completions.jsonl; a last line that was cut short is left out.

    Raises:
        BadDataError: for a file that is not there, or a line that is not JSON.
    """
    if not file.is_file():
        raise BadDataError(f"{file}: there is no such file; a stage that rolls out writes completions.jsonl")
    with open(file, "rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise BadDataError(f"{file}, line {number} is not JSON: {error}") from error


def recorded_example(line: dict[str, Any]) -> Example:
    """The example of a recorded group, without its media."""
    messages = [{"role": m["role"], "content": [{"type": "text", "value": m["content"]}]} for m in line["messages"]]
    out: Any = {"id": line["id"], "messages": messages, "meta": line.get("meta") or {}}
    return out | {k: line[k] for k in ("answer", "verifier") if k in line}


def recorded_verdict(row: dict[str, Any]) -> Verdict:
    """The verdict of a recorded row."""
    return Verdict(row["score"], row["status"], row.get("parts") or {}, row.get("note", ""))
