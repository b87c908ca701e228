"""A tokenizer's own Jinja chat template, rendered so that it stays known who wrote what."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from bestiary.shared.core.errors import BadDataError, require
from bestiary.shared.core.examples import Message
from bestiary.shared.language.chat_templates import Segment, message_text

FIRST_MARK = 0xF0000
"""Marks are characters of a private plane of Unicode: no text has them, and templates pass them through."""


class JinjaChat:
    """Renders chats with the template of a tokenizer of transformers.

    A template gives one string. To find the turns in it, it is rendered again with marks around their text; where the
    marks changed nothing else, their places are those of the turns. A template that trims does not trim marks: for it
    they are put inside the white space at a turn's ends.

    Args:
        hf: a tokenizer of transformers with a ``chat_template``.
    """

    def __init__(self, hf: Any):
        self._hf = hf
        self._source = str(hf.chat_template)

    def __call__(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, thinking: bool | None = None
    ) -> list[Segment]:
        """Segments of a chat.

        The switch of thoughts is the template's ``enable_thinking``, or ``/think`` and ``/no_think`` in the system
        prompt where the template reads those; a template with neither ignores ``thinking``.

        Raises:
            BadDataError: for turns that the template refuses, or rewrites so that one cannot say which part of a
                training chat the assistant wrote.
        """
        turns = [{"role": m["role"], "content": message_text(m)} for m in messages]
        if thinking is not None and "enable_thinking" not in self._source and "/no_think" in self._source:
            switch = "/think" if thinking else "/no_think"
            if turns and turns[0]["role"] == "system":
                turns[0]["content"] = f"{turns[0]['content']} {switch}".strip()
            else:
                turns.insert(0, {"role": "system", "content": switch})
        text = self._render(turns, add_generation_prompt, thinking)
        for inside in (False, True):
            marked = [{**turn, "content": _marked(turn["content"], i, inside)} for i, turn in enumerate(turns)]
            found = self._render(marked, add_generation_prompt, thinking)
            if _MARK.sub("", found) == text:
                break
        else:
            if not add_generation_prompt and any(t["role"] == "assistant" for t in turns):
                raise BadDataError(
                    "the tokenizer's chat template rewrites what the assistant said, so its words cannot be told from "
                    "the template's: choose a template of bestiary's (chat_templates.py) for training"
                )
            return [Segment(text)]
        return self._segments(found, turns, thinking)

    def _segments(self, found: str, turns: list[dict[str, str]], thinking: bool | None) -> list[Segment]:
        out: list[Segment] = []
        rest = found
        for number, turn in enumerate(turns):
            begin, end = _marks(number)
            if begin not in rest or end not in rest:
                continue  # a template may drop a turn, for example an empty system prompt
            before, inside = rest.split(begin, 1)
            inside, rest = inside.split(end, 1)
            own = turn["role"] == "assistant"
            if own and before.rstrip().endswith("<think>") and not self._begins_thoughts(turns, thinking):
                at = before.rindex("<think>")
                before, opened = before[:at], before[at:]
                out += [Segment(before), Segment(opened, own)]
            else:
                out.append(Segment(before))
            out.append(Segment(inside.replace(begin, ""), own, control=False))
            ends = next((t for t in self._hf.get_added_vocab() if rest.startswith(t)), "") if own else ""
            out.append(Segment(ends, own))
            rest = rest[len(ends) :]
        out.append(Segment(rest))
        return [s._replace(text=_MARK.sub("", s.text)) for s in out if s.text]

    def _begins_thoughts(self, turns: list[dict[str, str]], thinking: bool | None) -> bool:
        """Whether the template writes the opening tag for the model, so that it is not the model's own."""
        before = [t for t in turns if t["role"] == "system"][:1] + [{"role": "user", "content": "a"}]
        return self._render(before, True, thinking).rstrip().endswith("<think>")

    def _render(self, turns: list[dict[str, str]], prompt: bool, thinking: bool | None) -> str:
        jinja2 = require("jinja2", "text")
        options = {} if thinking is None else {"enable_thinking": thinking}
        try:
            return self._hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **options)
        except (jinja2.TemplateError, TypeError) as error:
            raise BadDataError(f"the tokenizer's chat template refuses this chat: {error}") from error


_MARK = re.compile("[\U000f0000-\U000ffffd]")


def _marks(number: int) -> tuple[str, str]:
    return chr(FIRST_MARK + 2 * number), chr(FIRST_MARK + 2 * number + 1)


def _marked(text: str, number: int, inside: bool) -> str:
    """The text with its marks: one where it begins (again after a thought's tags), one where it ends."""
    core = text.strip() if inside else text
    if not core:
        return text
    begin, end = _marks(number)
    lead, trail = text.split(core, 1)
    # A template takes a thought out of its tags or drops it, and may trim what is inside and behind.
    parts = re.split(r"(<think>\s*|\s*</think>\s*)", core)
    core = "".join(p if i % 2 or not p else begin + p for i, p in enumerate(parts))
    return lead + core + end + trail


def has_switch(tokenizer: Any) -> bool:
    """Whether a tokenizer's own chat template can switch thoughts on and off."""
    source = str(getattr(getattr(tokenizer, "hf", None), "chat_template", ""))
    return "enable_thinking" in source or "/no_think" in source
