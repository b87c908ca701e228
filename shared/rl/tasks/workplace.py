"""workplace_tasks: requests at the workplace, each with the calls that solve it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from bestiary.shared.core.build import nearest
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example, text_message
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.splits import split_of
from bestiary.shared.rl.environments.tool_environment import demonstration, with_tools
from bestiary.shared.rl.environments.workplace_tasks import TEMPLATES
from bestiary.shared.rl.environments.workplace_tools import TOOLS
from bestiary.shared.rl.environments.workplace_world import World, make_rows
from bestiary.shared.rl.tool_calls import ToolCall
from bestiary.shared.rl.tool_formats import tool_format


class WorkplaceTasks:
    """Tasks for the environment :class:`~bestiary.shared.rl.environments.workplace.Workplace`.

    Parts: ``rl`` (and None), prompts; ``sft``, whole chats in which the expected calls are made, one a turn. Tasks are
    held out by the hash of template and words, whatever the wording and the world, so a question of a held-out split is
    never trained on. ``meta`` has ``template``, ``arguments``, ``gold_calls``, ``world`` and, for a question, ``fact``.

    Args:
        format: how calls are written in the ``sft`` part.
        system: the text about the tools in the ``sft`` part; None is the format's own.
        held_out_tasks: how many tasks each held-out split has.
        held_out_templates: these are never trained on; held-out tasks have a part ``new`` of them alone, and ``known``
            of the others.
        worlds: how many worlds there are.

    Raises:
        ConfigError: for an unknown template or format, or if no template is left to train on.
    """

    def __init__(
        self,
        format: str = "hermes",
        system: str | None = None,
        held_out_tasks: int = 128,
        held_out_templates: Sequence[str] = (),
        worlds: int = 10_000,
    ):
        for name in held_out_templates:
            if name not in TEMPLATES:
                there = ", ".join(TEMPLATES)
                raise ConfigError(
                    f"workplace_tasks: unknown template {name!r}{nearest(name, TEMPLATES)}; there is: {there}"
                )
        self.new = tuple(name for name in TEMPLATES if name in held_out_templates)
        self.known = tuple(name for name in TEMPLATES if name not in held_out_templates)
        if not self.known or worlds < 1:
            raise ConfigError("workplace_tasks needs at least one template to train on, and one world")
        self.format, self.worlds, self.held_out_tasks = format, worlds, held_out_tasks
        names = f"{self.known} {worlds}"
        self.revision = "workplace-1-" + hashlib.sha256(names.encode()).hexdigest()[:8]
        self.system = tool_format(format).list_tools(TOOLS) if system is None else system

    def spec(self) -> DataSpec:
        """Chat; it reads nothing."""
        return DataSpec(task="chat")

    def check(self) -> None:
        """There is nothing to be missing."""

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Task k: a function of its arguments alone.

        Raises:
            ConfigError: for an unknown part.
        """
        if part not in (None, "rl", "sft"):
            raise ConfigError(f"workplace_tasks has the parts rl and sft to train on, not {part!r}")
        example = self._draw(stream.rng(k), self.known, "train")
        return self._demonstrated(example) if part == "sft" else example

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """Different tasks of ``val`` or ``test``: of all templates, or of those of a part.

        Raises:
            ConfigError: for an unknown split or part.
        """
        if split not in ("val", "test"):
            raise ConfigError(f"workplace_tasks holds out val and test, not {split!r}")
        parts = {None: (*self.known, *self.new), "rl": self.known, "sft": self.known, "known": self.known}
        parts |= {"new": self.new} if self.new else {}
        if part not in parts:
            there = ", ".join(name for name in parts if name)
            raise ConfigError(f"workplace_tasks holds out the parts {there}, not {part!r} (see held_out_templates)")
        rng, names = np.random.default_rng(0), parts[part]
        found: dict[str, Example] = {}
        # Each template in turn; there may be fewer different tasks than are asked for.
        for number in range(20 * self.held_out_tasks):
            if len(found) == self.held_out_tasks:
                break
            example = self._draw(rng, [names[number % len(names)]], split)
            found.setdefault(example["id"], example)
        return list(found.values())

    def _draw(self, rng: np.random.Generator, names: Sequence[str], split: str) -> Example:
        while True:
            name = names[int(rng.integers(len(names)))]
            template, world = TEMPLATES[name], int(rng.integers(self.worlds))
            draft = template.draw(make_rows(world), rng)
            wording = template.wordings[int(rng.integers(len(template.wordings)))]
            if split_of(json.dumps([name, draft.words], sort_keys=True)) == split:
                break
        question = wording.format(**draft.words)
        meta: dict[str, Any] = {"template": name, "arguments": draft.words, "gold_calls": draft.calls, "world": world}
        if draft.fact:
            meta["fact"] = draft.fact
        return {
            "id": "workplace-" + hashlib.sha256(f"{world} {question}".encode()).hexdigest()[:12],
            "messages": [text_message("user", question)],
            "answer": " ".join(draft.fact.values()) or "Done.",
            "meta": meta,
        }

    def _demonstrated(self, example: Example) -> Example:
        calls = [ToolCall(call["name"], call["arguments"]) for call in example["meta"]["gold_calls"]]
        world = World(make_rows(example["meta"]["world"]))
        shown = with_tools(example, self.system)
        messages = demonstration(shown, calls, TOOLS, world, tool_format(self.format), example["answer"])
        world.close()
        return {"id": example["id"], "messages": messages, "meta": example["meta"]}
