"""Chat formats as plain functions: messages to segments of text, each with what wrote it.

They serve tokenizers that bring no Jinja template along; where a checkpoint has one, that one is used. Nemotron 3 has
a template of its own (``enable_thinking``, XML tool tags), which is not written here: it comes with the checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import Message

ROLES = ("system", "user", "assistant", "tool")


class Segment(NamedTuple):
    """A piece of a rendered chat.

    Attributes:
        text: the piece.
        own: the assistant wrote it, so it carries loss.
        control: the template wrote it, so special tokens are read from it; from what people wrote they are not.
    """

    text: str
    own: bool = False
    control: bool = True


Template = Callable[..., list[Segment]]
"""(messages, add_generation_prompt, thinking, tools) to segments."""


def message_text(message: Message) -> str:
    """The text of a message.

    Raises:
        BadDataError: for an unknown role, or content other than text.
    """
    if message["role"] not in ROLES:
        raise BadDataError(f"unknown role {message['role']!r}; roles are {', '.join(ROLES)}")
    kinds = {c["type"] for c in message["content"]} - {"text"}
    if kinds:
        raise BadDataError(f"this model reads text alone, and a message has {', '.join(sorted(kinds))}")
    return "".join(c["value"] for c in message["content"])


def chatml(
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    thinking: bool | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[Segment]:
    """ChatML: ``<|im_start|>role``, newline, text, ``<|im_end|>``, newline.

    Args:
        messages: the turns.
        add_generation_prompt: end with the assistant's header.
        thinking: not used; the format has no switch.
        tools: not used; the format has no place for them.
    """
    out: list[Segment] = []
    for message in messages:
        own = message["role"] == "assistant"
        out += [
            Segment(f"<|im_start|>{message['role']}\n"),
            Segment(message_text(message), own, control=False),
            Segment("<|im_end|>", own),
            Segment("\n"),
        ]
    return [*out, Segment("<|im_start|>assistant\n")] if add_generation_prompt else out


SWITCH = re.compile(r"(?<!\S)(/think|/no_think)(?!\S)")
"""What switches thoughts in Nano 2's turns: a word of its own, not a part of a path."""


def nemotron_nano_v2(
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    thinking: bool | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[Segment]:
    """The format of Nemotron Nano 2.

    ``/think`` and ``/no_think`` in system or user turns switch thoughts on and off; the last one wins, and both are
    removed from the text. Thoughts are on by default. Thoughts of earlier turns are dropped.

    Paper: arXiv:2508.14444. The tags and switches are stated by the model's card; the line breaks between turns and
    the sentence before the tools are from memory, so prefer the checkpoint's own template.

    Args:
        messages: the turns.
        add_generation_prompt: end with the assistant's header and ``<think>`` or ``<think></think>``.
        thinking: beats the switches of the messages; None leaves it to them.
        tools: descriptions of functions, listed in the system turn.
    """
    on = True
    for message in messages:
        if message["role"] in ("system", "user"):
            for switch in SWITCH.findall(message_text(message)):
                on = switch == "/think"
    return _nemotron(messages, add_generation_prompt, on if thinking is None else thinking, tools, SWITCH)


REASONING = {True: "{'reasoning': True}", False: "{'reasoning': False}"}
"""What switches a Nemotron-H reasoning model, in its system prompt."""


def nemotron_h(
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    thinking: bool | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[Segment]:
    """The format of the Nemotron-H reasoning models: ``{'reasoning': True}`` or ``False`` in the system prompt.

    The model reads the switch itself, so it stays in the text. That the answer is begun for the model as in Nemotron
    Nano 2 is an assumption: no source at hand says so.

    Paper: arXiv:2504.03624.

    Args:
        messages: the turns.
        add_generation_prompt: end with the assistant's header, and what begins or skips a thought.
        thinking: writes the switch into the system prompt, in place of one that is there; None leaves it.
        tools: descriptions of functions, listed in the system turn.
    """
    turns = list(messages)
    system = message_text(turns.pop(0)) if turns and turns[0]["role"] == "system" else ""
    if thinking is not None:
        for switch in REASONING.values():
            system = system.replace(switch, "")
        system = f"{REASONING[thinking]}\n{system.strip()}".strip()
    head: Message = {"role": "system", "content": [{"type": "text", "value": system}]}
    return _nemotron([head, *turns], add_generation_prompt, REASONING[False] not in system, tools, None)


def _nemotron(
    messages: Sequence[Message], prompt: bool, thinking: bool, tools: Any, switch: re.Pattern[str] | None
) -> list[Segment]:
    def clean(message: Message) -> str:
        text = message_text(message)
        return (switch.sub("", text) if switch and message["role"] in ("system", "user") else text).strip()

    turns = list(messages)
    system = clean(turns.pop(0)) if turns and turns[0]["role"] == "system" else ""
    out = [Segment("<SPECIAL_10>System\n"), Segment(system, control=False)]
    if tools:
        listed = json.dumps(list(tools), ensure_ascii=False)
        out.append(Segment(f"{chr(10) * 2 if system else ''}<AVAILABLE_TOOLS>{listed}</AVAILABLE_TOOLS>"))
    out.append(Segment("\n"))
    last = max((i for i, m in enumerate(turns) if m["role"] == "assistant"), default=-1)
    for number, message in enumerate(turns):
        role = message["role"]
        if role == "assistant":
            text = message_text(message)
            current = number == last and not prompt
            if not current:
                text = text.rsplit("</think>", 1)[-1]
            # The answer to learn is begun as a prompt for it would be: without a thought, an empty one is given.
            begun = "<think></think>" if current and "</think>" not in text else ""
            out += [
                Segment("<SPECIAL_11>Assistant\n" + begun),
                Segment(text.strip(), own=True, control=False),
                Segment("\n<SPECIAL_12>", own=True),
                Segment("\n"),
            ]
        elif role == "tool":
            out.append(Segment("<SPECIAL_11>User\n<TOOL_RESPONSE>"))
            out += [Segment(clean(message), control=False), Segment("</TOOL_RESPONSE>\n")]
        else:
            out += [Segment(f"<SPECIAL_11>{role.title()}\n"), Segment(clean(message), control=False), Segment("\n")]
    if prompt:
        out.append(Segment("<SPECIAL_11>Assistant\n" + ("<think>\n" if thinking else "<think></think>")))
    return out


TEMPLATES: dict[str, Template] = {
    "chatml": chatml,
    "nemotron_nano_v2": nemotron_nano_v2,
    "nemotron_h": nemotron_h,
}
"""Formats by name."""
