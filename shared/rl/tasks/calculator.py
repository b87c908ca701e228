"""calculator_tasks: arithmetic that a small model cannot do in its head, and can do with a calculator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example, text_message
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.splits import split_of
from bestiary.shared.rl.environments.calculator import calculate, calculator_tool
from bestiary.shared.rl.environments.tool_environment import demonstration, with_tools
from bestiary.shared.rl.tool_calls import ToolCall
from bestiary.shared.rl.tool_formats import tool_format


class CalculatorTasks:
    """Questions such as ``48*37=`` for the environment :class:`~bestiary.shared.rl.environments.calculator.Calculator`.

    Parts: ``rl`` (and None), prompts with the exact answer; ``sft``, whole chats of a teacher that uses the calculator
    in a share of them and answers at once in the others, mostly wrongly. A model that learns from that teacher uses the
    tool as seldom as it does; what the tool is worth is left to reinforcement learning. Questions are held out by their
    hash.

    Args:
        digits: of each operand, at least and at most.
        terms: numbers of a question, at least and at most.
        operations: what may stand between them: ``+``, ``-``, ``*``.
        tool_share: share of the ``sft`` chats that use the tool.
        wrong_direct: probability that an answer without the tool is wrong.
        format: how calls are written in the ``sft`` part.
        system: the text about the tool in the ``sft`` part; None is empty for ``compact``, else the format's own. It is
            that of the environment.
        verifier: what scores the answers.
        held_out_questions: how many each held-out split has.

    Raises:
        ConfigError: for values that cannot be.
    """

    def __init__(
        self,
        digits: Sequence[int] = (2, 2),
        terms: Sequence[int] = (2, 2),
        operations: str = "*",
        tool_share: float = 0.4,
        wrong_direct: float = 0.95,
        format: str = "compact",
        system: str | None = None,
        verifier: str = "exact_text",
        held_out_questions: int = 256,
    ):
        for name, value, most in (("digits", digits, 12), ("terms", terms, 8)):
            if len(value) != 2 or not 1 <= value[0] <= value[1] <= most:
                raise ConfigError(f"calculator_tasks: {name} is [least, most], from 1 to {most}, not {list(value)}")
        if terms[0] < 2:
            raise ConfigError("calculator_tasks: a question has at least 2 terms")
        if not operations or set(operations) - set("+-*"):
            raise ConfigError(f"calculator_tasks: operations are some of + - *, not {operations!r}")
        for name, share in (("tool_share", tool_share), ("wrong_direct", wrong_direct)):
            if not 0 <= share <= 1:
                raise ConfigError(f"calculator_tasks: {name} is a share from 0 to 1, not {share}")
        self.digits, self.terms, self.operations = tuple(digits), tuple(terms), operations
        self.tool_share, self.wrong_direct = tool_share, wrong_direct
        self.verifier, self.held_out_questions = verifier, held_out_questions
        self.format = format
        text = tool_format(format).list_tools([calculator_tool(format)])
        self.system = ("" if format == "compact" else text) if system is None else system
        names = f"{self.digits} {self.terms} {''.join(sorted(set(operations)))}"
        self.revision = "calculator-1-" + hashlib.sha256(names.encode()).hexdigest()[:8]

    def spec(self) -> DataSpec:
        """Chat; it reads nothing."""
        return DataSpec(task="chat")

    def check(self) -> None:
        """There is nothing to be missing."""

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Question k: a function of its arguments alone.

        Raises:
            ConfigError: for an unknown part.
        """
        if part not in (None, "rl", "sft"):
            raise ConfigError(f"calculator_tasks has the parts rl and sft, not {part!r}")
        rng = stream.rng(k)
        question = self._question(rng, "train")
        return self._demonstrated(question, rng) if part == "sft" else self._asked(question)

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """Different questions of ``val`` or ``test``, the same for all parts.

        Raises:
            ConfigError: for an unknown split.
        """
        if split not in ("val", "test"):
            raise ConfigError(f"calculator_tasks holds out val and test, not {split!r}")
        if part not in (None, "rl", "sft"):
            raise ConfigError(f"calculator_tasks has the parts rl and sft, not {part!r}")
        rng = np.random.default_rng(0)
        found: dict[str, None] = {}
        # Small operands leave few different questions.
        for _ in range(50 * self.held_out_questions):
            if len(found) == self.held_out_questions:
                break
            found.setdefault(self._question(rng, split))
        return [self._asked(question) for question in found]

    def _question(self, rng: np.random.Generator, split: str) -> str:
        for _ in range(10_000):
            terms = int(rng.integers(self.terms[0], self.terms[1] + 1))
            text = ""
            for number in range(terms):
                digits = int(rng.integers(self.digits[0], self.digits[1] + 1))
                least = 10 ** (digits - 1) if digits > 1 else 0
                sign = self.operations[int(rng.integers(len(self.operations)))] if number else ""
                text += f"{sign}{int(rng.integers(least, 10**digits))}"
            if split_of(text) == split:
                return text
        raise ConfigError(f"calculator_tasks: there is no {split} question of digits {list(self.digits)}: allow more")

    def _asked(self, question: str) -> Example:
        return {
            "id": f"calculator-{question}",
            "messages": [text_message("user", f"{question}=")],
            "answer": calculate(question),
            "verifier": self.verifier,
            "meta": {"expression": question},
        }

    def _demonstrated(self, question: str, rng: np.random.Generator) -> Example:
        asked = self._asked(question)
        right = asked["answer"]
        if rng.random() < self.tool_share:
            tool = calculator_tool(self.format)
            calls, end = [ToolCall(tool.name, {"expression": question})], right
        else:
            tool, calls = calculator_tool(self.format), []
            end = _wrong(right, rng) if rng.random() < self.wrong_direct else right
        shown = with_tools(asked, self.system)
        messages = demonstration(shown, calls, [tool], None, tool_format(self.format), end)
        return {"id": asked["id"], "messages": messages, "meta": {"expression": question, "tool": bool(calls)}}


def _wrong(right: str, rng: np.random.Generator) -> str:
    """Another number of the same length."""
    sign, digits = ("-", right[1:]) if right.startswith("-") else ("", right)
    while True:
        first = rng.integers(1, 10) if len(digits) > 1 else rng.integers(0, 10)
        guess = sign + "".join(str(d) for d in (first, *rng.integers(0, 10, len(digits) - 1)))
        if guess != right:
            return guess
