"""How formats list tools and write calls, and how their calls are read back.

A format knows text alone. Where a checkpoint brings a chat template with tools of its own, its wording differs from the
lists here; the tags of the calls are the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bestiary.shared.core.build import nearest
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.rl.tool_calls import (
    MAX_CALL_CHARS,
    Parsed,
    ToolCall,
    ToolFormat,
    ToolSpec,
    at_most,
    blocks_of,
    load_json,
    without_thoughts,
)

_PARAMETER = re.compile(r"\s*<parameter=([^<>\n]+)>")
_COMPACT = re.compile(r"([A-Za-z_]\w{0,63})\(", re.ASCII)


def tool_format(name: str) -> ToolFormat:
    """A format by name.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown tool format {name!r}{nearest(name, FORMATS)}; there is: {', '.join(FORMATS)}")
    return FORMATS[name]


class JsonFormat:
    """Calls as JSON between two tags: one object, or a list of them.

    The first closing tag ends a call, so a string that holds one must escape its bracket, as :meth:`render` does.
    An opening tag that is never closed takes the rest of the turn: a stop string may have cut the closing one.

    Args:
        name: of the format.
        tag: of the calls.
        listed: whether the calls of a turn are one list in one pair of tags.
        head: makes the text of the system turn from the descriptions of the tools.
    """

    def __init__(self, name: str, tag: str, listed: bool, head: Callable[[list[dict[str, Any]]], str]):
        self.name, self.tag, self.listed, self.head = name, tag, listed, head
        self._escape = re.compile(f"<(?=/?(?:think|{tag})>)")

    def parse(self, text: str, tools: Sequence[ToolSpec] = (), in_thought: bool = False) -> Parsed:
        """As in :class:`ToolFormat`."""
        blocks, around = blocks_of(without_thoughts(text, in_thought), self.tag)
        return Parsed(at_most(call for block in blocks for call in self._read(block)), around)

    def render(self, calls: Sequence[ToolCall], tools: Sequence[ToolSpec] = ()) -> str:
        """As in :class:`ToolFormat`."""
        values = [{"name": call.name, "arguments": call.arguments} for call in calls]
        if self.listed:
            return f"<{self.tag}>{self._dump(values)}</{self.tag}>"
        return "\n".join(f"<{self.tag}>\n{self._dump(value)}\n</{self.tag}>" for value in values)

    def list_tools(self, tools: Sequence[ToolSpec]) -> str:
        """As in :class:`ToolFormat`."""
        return self.head([tool.described() for tool in tools])

    def _dump(self, value: Any) -> str:
        return self._escape.sub(r"\\u003c", json.dumps(value, ensure_ascii=False))

    def _read(self, block: str) -> Iterator[ToolCall]:
        value, error = load_json(block)
        if error:
            yield ToolCall("", error=f"the call is no JSON that can be read: {error}")
        elif isinstance(value, list) and self.listed:
            yield from map(self._call, value) if value else [ToolCall("", error="the list of calls is empty")]
        else:
            yield self._call(value)

    def _call(self, value: Any) -> ToolCall:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return ToolCall("", error='a call is an object {"name": …, "arguments": {…}}')
        arguments = value.get("arguments", {})
        if not isinstance(arguments, dict):
            return ToolCall(value["name"], error="the arguments of a call are an object")
        return ToolCall(value["name"], arguments)


class XmlFormat:
    """Nemotron 3's calls: ``<tool_call><function=name><parameter=key>value</parameter></function></tool_call>``.

    A value stands between line breaks, one each, that are not part of it. It has no type: with the tool's schema,
    whatever is not a string is read as JSON; without it, all values are strings. The format has no escapes, so a value
    cannot hold the format's own closing tags: :meth:`render` refuses it.

    The tags are documented. Uncertain: the line breaks are those of Qwen3-Coder's format, which Nemotron 3's is said to
    be. The wording of the list of tools is ours: prefer the checkpoint's own template for it.
    """

    name = "nemotron_3"
    tag = "tool_call"

    def parse(self, text: str, tools: Sequence[ToolSpec] = (), in_thought: bool = False) -> Parsed:
        """As in :class:`ToolFormat`."""
        blocks, around = blocks_of(without_thoughts(text, in_thought), self.tag)
        return Parsed(at_most(self._read(block, tools) for block in blocks), around)

    def render(self, calls: Sequence[ToolCall], tools: Sequence[ToolSpec] = ()) -> str:
        """As in :class:`ToolFormat`.

        Raises:
            BadDataError: for a value that holds one of the format's tags.
        """
        out = []
        for call in calls:
            lines = [f"<{self.tag}>", f"<function={call.name}>"]
            for key, value in call.arguments.items():
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                if re.search("</?(?:parameter|function|tool_call|think)[=>]", text):
                    raise BadDataError(f"the tool format {self.name} cannot write an argument with its own tags: {key}")
                lines += [f"<parameter={key}>", text, "</parameter>"]
            out.append("\n".join([*lines, "</function>", f"</{self.tag}>"]))
        return "\n".join(out)

    def list_tools(self, tools: Sequence[ToolSpec]) -> str:
        """As in :class:`ToolFormat`."""
        lines = ["You can call these functions:", "<tools>"]
        for tool in tools:
            lines += ["<function>", f"<name>{tool.name}</name>", f"<description>{tool.description}</description>"]
            lines += [f"<parameters>{json.dumps(tool.parameters, ensure_ascii=False)}</parameters>", "</function>"]
        shape = "<tool_call>\n<function=NAME>\n<parameter=KEY>\nvalue\n</parameter>\n</function>\n</tool_call>"
        return "\n".join([*lines, "</tools>", "Write a call like this:", shape])

    def _read(self, block: str, tools: Sequence[ToolSpec]) -> ToolCall:
        if len(block) > MAX_CALL_CHARS:
            return ToolCall("", error=f"a call has at most {MAX_CALL_CHARS} characters")
        body = block.strip()
        head = re.match(r"<function=([^<>\n]+)>", body)
        if head is None:
            return ToolCall("", error="a call begins with <function=NAME>")
        name = head[1].strip()
        types = _types(name, tools)
        arguments: dict[str, Any] = {}
        at = head.end()
        while match := _PARAMETER.match(body, at):
            end = body.find("</parameter>", match.end())
            if end < 0:
                return ToolCall(name, error=f"the parameter {match[1][:80]} is not closed")
            value = body[match.end() : end]
            value = value[1:] if value.startswith("\n") else value
            value = value[:-1] if value.endswith("\n") else value
            key = match[1].strip()
            if types.get(key, "string") != "string":
                found, error = load_json(value)
                if error:
                    return ToolCall(name, error=f"the parameter {key[:80]} is no {types[key]}: {error}")
                value = found
            arguments[key] = value
            at = end + len("</parameter>")
        rest = body[at:].strip()
        if rest not in ("", "</function>"):
            return ToolCall(name, error="between <function=NAME> and </function> stand parameters alone")
        return ToolCall(name, arguments)


class CompactFormat:
    """Ours, for tiny models that read bytes: the last line is ``name(argument)``, for example ``calc(12*7)``.

    A tool with one string parameter takes the text between the brackets as it stands; any other takes a JSON object,
    ``name({"day": "Monday"})``. One call a turn. A last line of another shape is no call.
    """

    name = "compact"

    def parse(self, text: str, tools: Sequence[ToolSpec] = (), in_thought: bool = False) -> Parsed:
        """As in :class:`ToolFormat`."""
        text = without_thoughts(text, in_thought).rstrip()
        before, _, line = text.rpartition("\n")
        head = _COMPACT.match(line)
        if head is None or (not line.endswith(")") and ")" in line):
            return Parsed([], text)
        name, inside = head[1], line[head.end() : -1]
        if len(line) > MAX_CALL_CHARS:
            call = ToolCall(name, error=f"a call has at most {MAX_CALL_CHARS} characters")
        elif not line.endswith(")"):
            call = ToolCall(name, error="the bracket is not closed")
        else:
            call = self._read(name, inside, tools)
        return Parsed([call], before)

    def render(self, calls: Sequence[ToolCall], tools: Sequence[ToolSpec] = ()) -> str:
        """As in :class:`ToolFormat`, one call.

        Raises:
            BadDataError: for several calls.
        """
        if len(calls) != 1:
            raise BadDataError(f"the compact tool format writes one call a turn, not {len(calls)}")
        call = calls[0]
        sole = _sole(call.name, tools)
        value = call.arguments.get(sole) if sole and set(call.arguments) == {sole} else None
        plain = isinstance(value, str) and not value.startswith("{") and not re.search("\n|</?think>", value)
        inside = value if plain else json.dumps(call.arguments).replace("<", "\\u003c") if call.arguments else ""
        return f"{call.name}({inside})"

    def list_tools(self, tools: Sequence[ToolSpec]) -> str:
        """As in :class:`ToolFormat`."""
        lines = [f"{t.name}({', '.join(t.parameters.get('properties', {}))}): {t.description}" for t in tools]
        several = any(_sole(t.name, tools) is None for t in tools)
        how = 'name({"parameter": value, …})' if several else "name(argument)"
        return "\n".join(["Tools:", *lines, f"To use one, end with the line {how}"])

    def _read(self, name: str, inside: str, tools: Sequence[ToolSpec]) -> ToolCall:
        sole = _sole(name, tools)
        if inside.startswith("{"):
            value, error = load_json(inside)
            if isinstance(value, dict) and (sole is None or set(value) == {sole}):
                return ToolCall(name, value)
            if sole is None:
                return ToolCall(name, error=f"the arguments are no JSON object: {error or 'another value'}")
        if sole is not None:
            return ToolCall(name, {sole: inside})
        return ToolCall(name) if not inside.strip() else ToolCall(name, error="the arguments are no JSON object")


def _types(name: str, tools: Sequence[ToolSpec]) -> dict[str, str]:
    properties = next((t.parameters.get("properties", {}) for t in tools if t.name == name), {})
    return {key: str(schema.get("type", "string")) for key, schema in properties.items()}


def _sole(name: str, tools: Sequence[ToolSpec]) -> str | None:
    """The only parameter of a tool, where it is a string."""
    types = _types(name, tools)
    return next(iter(types)) if list(types.values()) == ["string"] else None


def _hermes_head(tools: list[dict[str, Any]]) -> str:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    shape = '<tool_call>\n{"name": NAME, "arguments": {…}}\n</tool_call>'
    return f"You can call these functions:\n<tools>\n{listed}\n</tools>\nWrite a call like this:\n{shape}"


def _nano_v2_head(tools: list[dict[str, Any]]) -> str:
    listed = json.dumps(tools, ensure_ascii=False)
    shape = '<TOOLCALL>[{"name": NAME, "arguments": {…}}]</TOOLCALL>'
    return f"<AVAILABLE_TOOLS>{listed}</AVAILABLE_TOOLS>\nWrite calls like this:\n{shape}"


FORMATS: dict[str, ToolFormat] = {
    "hermes": JsonFormat("hermes", "tool_call", False, _hermes_head),
    "nemotron_nano_v2": JsonFormat("nemotron_nano_v2", "TOOLCALL", True, _nano_v2_head),
    "nemotron_3": XmlFormat(),
    "compact": CompactFormat(),
}
"""Formats by name. ``hermes`` is that of Qwen and of most ChatML models."""
