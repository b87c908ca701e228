"""What environments with tools share: calls are read from a turn, made, and answered, until a turn makes none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bestiary.shared.core.errors import ConfigError, require
from bestiary.shared.core.examples import Example, Message, text_message
from bestiary.shared.rl.protocols import Environment, Episode, Turn, Verdict
from bestiary.shared.rl.tool_calls import ToolCall, ToolFormat, ToolSpec
from bestiary.shared.rl.tool_formats import tool_format


class ToolError(Exception):
    """What a tool answers to a call that it cannot make. The policy reads it, and the episode goes on."""


@dataclass(frozen=True)
class Tool(ToolSpec):
    """A tool that can be called.

    Attributes:
        function: (world, arguments) to the answer; the arguments fit the schema. It raises :class:`ToolError` for what
            the policy did wrong; any other exception is a failure of the harness.
    """

    function: Callable[[Any, dict[str, Any]], str]

    @cached_property
    def _validator(self) -> Any:
        return require("jsonschema", "rl").Draft202012Validator(self.parameters)

    def __call__(self, world: Any, arguments: dict[str, Any]) -> str:
        """Check the arguments and call it.

        Raises:
            ToolError: for arguments that do not fit.
        """
        for key, value in arguments.items():
            if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):
                raise ToolError(f"{self.name}: {key[:80]} has characters that are no text")
        error = next(self._validator.iter_errors(arguments), None)
        if error is not None:
            where = "".join(f"{part}: " for part in error.path)
            raise ToolError(f"{self.name}: {where}{_short(error.message, 200)}")
        return self.function(world, arguments)


def call_tool(tools: Sequence[Tool], world: Any, call: ToolCall, longest: int = 2000) -> tuple[str, bool]:
    """Make a call.

    Args:
        tools: those there are.
        world: what the tools act on.
        call: as it was read.
        longest: characters of the answer; the rest is cut off.

    Returns:
        The answer, and whether the call could be made.
    """
    try:
        if call.error:
            raise ToolError(call.error)
        tool = next((tool for tool in tools if tool.name == call.name), None)
        if tool is None:
            names = ", ".join(tool.name for tool in tools)
            raise ToolError(f"there is no tool {_short(call.name, 80)!r}; there is: {names}")
        return _short(tool(world, call.arguments), longest), True
    except ToolError as error:
        return _short(f"error: {error}", longest), False


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text)} characters)"


def with_tools(example: Example, text: str) -> Example:
    """The example with a text about its tools at the end of its system turn; unchanged for an empty text."""
    if not text:
        return example
    messages = list(example["messages"])
    if messages and messages[0]["role"] == "system":
        first: Message = {**messages[0]}
        first["content"] = [*first["content"], {"type": "text", "value": f"\n\n{text}"}]
        messages[0] = first
    else:
        messages.insert(0, text_message("system", text))
    return {**example, "messages": messages}


class ToolEnvironment:
    """An environment with tools; the kinds differ in their tools, their world and how the end is judged.

    A turn without a call ends an episode. All calls of a turn are answered, a message each, in order.

    Args:
        tools: what can be called.
        format: how calls are written, a name of :data:`~bestiary.shared.rl.tool_formats.FORMATS`.
        max_turns: turns of the policy after which an episode is cut.
        max_calls: calls of one episode; further ones are answered with an error.
        max_result: characters of an answer that the policy is shown.
        system: the text about the tools in the system turn; None is the format's own, an empty one leaves it out (a
            policy may have learned its tools from demonstrations).
        thinking: the chat template opens a thought in the prompt, so a turn without ``</think>`` is all thought.

    Raises:
        ConfigError: for limits below 1, or an unknown format.
    """

    name = "tools"
    version = "1"

    def __init__(
        self,
        tools: Sequence[Tool],
        format: str,
        max_turns: int,
        max_calls: int,
        max_result: int,
        system: str | None,
        thinking: bool,
    ):
        for label, value in (("max_turns", max_turns), ("max_calls", max_calls), ("max_result", max_result)):
            if value < 1:
                raise ConfigError(f"environment {self.name}: {label} must be 1 or more, not {value}")
        self.tools, self.format = list(tools), tool_format(format)
        self.max_turns, self.max_calls, self.max_result = max_turns, max_calls, max_result
        self.system = self.format.list_tools(self.tools) if system is None else system
        self.thinking = thinking
        self._lock = threading.Lock()
        self._counts = {"calls": 0, "errors": 0}

    def prompt(self, example: Example) -> Example:
        """The example with the tools in its system turn."""
        return with_tools(example, self.system)

    def reset(self, example: Example, seed: int) -> ToolEpisode:
        """A fresh world."""
        return ToolEpisode(self, example, self.new_world(example, seed))

    def new_world(self, example: Example, seed: int) -> Any:
        """What the tools act on."""
        return None

    def judge(self, example: Example, world: Any, text: str) -> Verdict:
        """Score an episode that the policy has ended with this turn."""
        raise NotImplementedError

    def counters(self) -> dict[str, float]:
        """Calls, and those that were answered with an error, since the start."""
        with self._lock:
            return {f"tools/{name}": float(value) for name, value in self._counts.items()}

    def count(self, good: bool) -> None:
        """Count one call."""
        with self._lock:
            self._counts["calls"] += 1
            self._counts["errors"] += not good

    def describe(self) -> str:
        """One line for the log."""
        tools = ", ".join(tool.name for tool in self.tools)
        limits = f"at most {self.max_turns} turns and {self.max_calls} calls"
        return f"{self.name} {self.version}: {tools}; calls as {self.format.name}, {limits}"

    def close(self) -> None:
        """Give back what is shared by all episodes."""


class ToolEpisode:
    """One rollout with tools."""

    def __init__(self, environment: ToolEnvironment, example: Example, world: Any):
        self._environment, self._example, self.world = environment, example, world
        self._calls = 0

    def step(self, text: str) -> Turn:
        """Make the calls of a turn and answer them; a turn without any ends the episode."""
        calls = self._read(text)
        if not calls:
            return Turn()
        return Turn([text_message("tool", self._answer(call)) for call in calls], done=False)

    def verify(self, text: str) -> Verdict:
        """Score the episode; one whose last turn still makes a call was cut, and scores 0."""
        if self._read(text):
            return Verdict(0.0, note="the episode was cut before an answer")
        return self._environment.judge(self._example, self.world, text)

    def close(self) -> None:
        """Let the world go."""
        close = getattr(self.world, "close", None)
        if callable(close):
            close()

    def _read(self, text: str) -> list[ToolCall]:
        of = self._environment
        return of.format.parse(text, of.tools, of.thinking).calls

    def _answer(self, call: ToolCall) -> str:
        of = self._environment
        self._calls += 1
        if self._calls > of.max_calls:
            answer, good = f"error: at most {of.max_calls} calls can be made; answer now", False
        else:
            answer, good = call_tool(of.tools, self.world, call, of.max_result)
        of.count(good)
        return answer


def play(environment: Environment, example: Example, turns: Sequence[str], seed: int = 0) -> tuple[list[str], Verdict]:
    """Play an episode with given turns of the policy, as far as the environment lets them go.

    Args:
        environment: where.
        example: what is asked.
        turns: what the policy says, at least one turn.
        seed: of the world.

    Returns:
        What the environment said, and its verdict.
    """
    episode: Episode = environment.reset(example, seed)
    said: list[str] = []
    last = turns[0]
    try:
        for last in turns[: environment.max_turns]:
            turn = episode.step(last)
            said += ["".join(c["value"] for c in message["content"]) for message in turn.messages]
            if turn.done:
                break
        return said, episode.verify(last)
    finally:
        episode.close()


def demonstration(
    example: Example, calls: Sequence[ToolCall], tools: Sequence[Tool], world: Any, format: ToolFormat, end: str
) -> list[Message]:
    """A whole chat: the example's turns, each call with the answer it gets, and the assistant's last word."""
    messages = list(example["messages"])
    for call in calls:
        answer, _ = call_tool(tools, world, call)
        messages += [text_message("assistant", format.render([call], tools)), text_message("tool", answer)]
    return [*messages, text_message("assistant", end)]
