"""A calculator as a tool: exact arithmetic on what a policy writes, without ever running it as code."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from bestiary.shared.core.examples import Example
from bestiary.shared.rl.environments.tool_environment import Tool, ToolEnvironment, ToolError
from bestiary.shared.rl.environments.verdicts import Verifiers
from bestiary.shared.rl.protocols import Verdict, Verifier

MAX_CHARS = 300
"""Longest expression."""

MAX_BITS = 3300
"""Largest number, of numerator and denominator alike: about a thousand digits."""

MAX_DEPTH = 200
"""Deepest nesting of an expression."""

_ALLOWED = re.compile(r"[0-9+\-*/%(). ]+")
_SIGNS = str.maketrans("×·÷−–", "**/--")


def calculate(expression: str) -> str:
    """The value of an arithmetic expression: ``+ - * / // % **``, unary signs, brackets.

    Numbers are exact: integers and decimals are fractions inside, and a result that is no integer is written as a
    decimal number of 12 digits.

    Args:
        expression: at most :data:`MAX_CHARS` characters.

    Raises:
        ToolError: for anything else, division by zero, and numbers beyond :data:`MAX_BITS`.
    """
    if len(expression) > MAX_CHARS:
        raise ToolError(f"an expression has at most {MAX_CHARS} characters")
    text = expression.translate(_SIGNS).strip()
    # Without letters there are no names, no attributes and no strings: what is left is arithmetic or malformed.
    if not _ALLOWED.fullmatch(text):
        raise ToolError("only numbers, + - * / // % ** and brackets")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ToolError("this is no arithmetic expression") from error
    value = _value(tree.body, 0)
    if value.denominator == 1:
        return str(value.numerator)
    try:
        return f"{float(value):.12g}"
    except OverflowError as error:
        raise ToolError("the result is too large") from error


def _value(node: ast.expr, depth: int) -> Fraction:
    if depth > MAX_DEPTH:
        raise ToolError("the expression is nested too deeply")
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and math.isfinite(node.value):
        # The shortest decimal that reads as this float: what was written, up to 17 digits.
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = _value(node.left, depth + 1), _value(node.right, depth + 1)
        try:
            return _checked(_OPERATIONS[type(node.op)](left, right))
        except ZeroDivisionError as error:
            raise ToolError("division by zero") from error
    raise ToolError("this is no arithmetic expression")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError("exponents are whole numbers")
    # Before it is computed, not after: 9**9**9 would fill the memory.
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) not in (0, 1) and size * abs(exponent.numerator) > 2 * MAX_BITS:
        raise ToolError("the result is too large")
    if abs(base) == 1:
        return base if exponent.numerator % 2 else Fraction(1)
    if base == 0 and exponent > 0:
        return Fraction(0)
    return base**exponent.numerator


def _checked(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ToolError("the result is too large")
    return value


_OPERATIONS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: lambda a, b: a % b,
    ast.Pow: _power,
}


def calculator_tool(format: str) -> Tool:
    """The tool; in the compact format its name is ``calc``, to spare a reader of bytes."""
    parameters = {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "for example (12+7)*3"}},
        "required": ["expression"],
        "additionalProperties": False,
    }
    return Tool(
        name="calc" if format == "compact" else "calculator",
        description="The value of an arithmetic expression.",
        parameters=parameters,
        function=lambda world, arguments: calculate(arguments["expression"]),
    )


class Calculator(ToolEnvironment):
    """Questions that are answered with the help of a calculator; the answer goes to a verifier.

    Args:
        format: how calls are written. In the compact one the tool is ``calc``, and no system turn tells of it: a tiny
            model learns it from demonstrations.
        max_turns: turns of the policy after which an episode is cut.
        max_calls: calls of one episode.
        system: the text about the tool; None is an empty one for ``compact``, else the format's own.
        thinking: the chat template opens a thought in the prompt.
        verifier: for all examples, built or by name; None takes the one that each example names.
        options: arguments of the verifiers by name.
    """

    name = "calculator"
    version = "1"

    def __init__(
        self,
        format: str = "compact",
        max_turns: int = 3,
        max_calls: int = 8,
        system: str | None = None,
        thinking: bool = False,
        verifier: Verifier | str | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        text = "" if system is None and format == "compact" else system
        super().__init__([calculator_tool(format)], format, max_turns, max_calls, 2000, text, thinking)
        self.verifiers = Verifiers(verifier, options)

    def judge(self, example: Example, world: Any, text: str) -> Verdict:
        """Ask the verifier."""
        return self.verifiers.verify(example, text)

    def self_test(self, examples: Sequence[Example]) -> str:
        """Test the verifiers on these examples."""
        return self.verifiers.self_test(examples)

    def counters(self) -> dict[str, float]:
        """Calls and verdicts since the start."""
        return super().counters() | self.verifiers.counters()

    def close(self) -> None:
        """Close the verifiers."""
        self.verifiers.close()
