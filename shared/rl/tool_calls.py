"""What a tool call is, and reading one from a text that may hold anything: thoughts, tags, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

MAX_CALLS = 16
"""Calls that are read from one turn; what comes after them is one error."""

MAX_CALL_CHARS = 100_000
"""Longest call."""

MAX_DEPTH = 32
"""Deepest nesting of a call's arguments."""


@dataclass(frozen=True)
class ToolSpec:
    """What a policy is told of a tool.

    Attributes:
        name: an identifier.
        description: one sentence.
        parameters: the JSON schema of the arguments, an object.
    """

    name: str
    description: str
    parameters: dict[str, Any]

    def described(self) -> dict[str, Any]:
        """As the formats with JSON list it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolCall:
    """One call.

    Attributes:
        name: the tool's; empty where it could not be read.
        arguments: by name.
        error: what is wrong with the call as it was written; empty for one that can be read.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class Parsed(NamedTuple):
    """A turn taken apart: its calls in order, and the text around them without thoughts."""

    calls: list[ToolCall]
    text: str


class ToolFormat(Protocol):
    """One way of writing calls.

    ``tools`` names the tools there are: a format without types of its own (XML, compact) needs them to read arguments.
    """

    name: str

    def parse(self, text: str, tools: Sequence[ToolSpec] = (), in_thought: bool = False) -> Parsed:
        """Read a turn of the policy, in time linear in its length. It never raises.

        Args:
            text: whatever the policy wrote.
            tools: the tools there are.
            in_thought: the prompt opened a thought, so a turn without ``</think>`` is all thought.
        """
        ...

    def render(self, calls: Sequence[ToolCall], tools: Sequence[ToolSpec] = ()) -> str:
        """What a policy writes to make these calls; :meth:`parse` gives them back."""
        ...

    def list_tools(self, tools: Sequence[ToolSpec]) -> str:
        """The text of the system turn that tells of the tools."""
        ...


def without_thoughts(text: str, in_thought: bool = False) -> str:
    """A text without what stands in ``<think>…</think>``; a thought that is not closed goes on to the end.

    Where the first tag is a closing one, the prompt opened the thought, and the text begins inside it.
    """
    opened, closed = text.find("<think>"), text.find("</think>")
    inside = in_thought or (closed >= 0 and not 0 <= opened < closed)
    parts: list[str] = []
    at = 0
    while at <= len(text):
        tag = "</think>" if inside else "<think>"
        end = text.find(tag, at)
        stop = len(text) if end < 0 else end
        if not inside:
            parts.append(text[at:stop])
        at, inside = stop + len(tag), not inside
    return "".join(parts)


def load_json(text: str) -> tuple[Any, str]:
    """The value of a JSON text and an empty string, or None and what is wrong with it; it never raises."""
    if len(text) > MAX_CALL_CHARS:
        return None, f"it has more than {MAX_CALL_CHARS} characters"
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        return None, str(error)[:200] if isinstance(error, ValueError) else "it is nested too deeply"
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [child for children in inside for child in children]
        if not level:
            return value, ""
    return None, "it is nested too deeply"


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def blocks_of(text: str, tag: str) -> tuple[list[str], str]:
    """What stands between the tags of a text, one piece more than the limit at most, and the text around."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    blocks: list[str] = []
    around: list[str] = []
    at = 0
    while len(blocks) <= MAX_CALLS and (start := text.find(opening, at)) >= 0:
        around.append(text[at:start])
        end = text.find(closing, start)
        blocks.append(text[start + len(opening) : end if end >= 0 else len(text)])
        at = end + len(closing) if end >= 0 else len(text)
    return blocks, "".join([*around, text[at:]]).strip()


def at_most(calls: Iterator[ToolCall]) -> list[ToolCall]:
    """The first calls, and an error for those beyond the limit."""
    out: list[ToolCall] = []
    for call in calls:
        if len(out) == MAX_CALLS:
            return [*out, ToolCall("", error=f"a turn has at most {MAX_CALLS} calls; the others were not made")]
        out.append(call)
    return out
