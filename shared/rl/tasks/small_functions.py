"""small_functions: one-line Python functions with tests, and a teacher that takes steps in the wrong order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example, text_message
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream, derive_seed
from bestiary.shared.data.splits import SPLITS, split_of

PARTS = (None, "sft", "rl")


@dataclass(frozen=True)
class Operation:
    """One step of a function: ``phrase`` asks for it, ``code`` is it around ``{}``, ``apply`` is what it does."""

    phrase: str
    code: str
    apply: Callable[[Any], Any]


def _numbers() -> list[Operation]:
    ops = [Operation(f"plus {k}", f"({{}} + {k})", lambda v, k=k: v + k) for k in range(1, 10)]
    ops += [Operation(f"minus {k}", f"({{}} - {k})", lambda v, k=k: v - k) for k in range(1, 10)]
    return ops + [Operation(f"times {k}", f"{{}} * {k}", lambda v, k=k: v * k) for k in range(2, 10)]


def _slices() -> list[Operation]:
    ops = [Operation("reverse", "{}[::-1]", lambda v: v[::-1])]
    ops += [Operation(f"first {k}", f"{{}}[:{k}]", lambda v, k=k: v[:k]) for k in range(1, 7)]
    ops += [Operation(f"last {k}", f"{{}}[-{k}:]", lambda v, k=k: v[-k:]) for k in range(1, 7)]
    ops += [Operation(f"drop {k}", f"{{}}[{k}:]", lambda v, k=k: v[k:]) for k in range(1, 7)]
    return [*ops, Operation("twice", "({} * 2)", lambda v: v * 2)]


FAMILIES: dict[str, tuple[Operation, ...]] = {
    "number": tuple(_numbers()),
    "text": (*_slices(), Operation("upper case", "{}.upper()", str.upper)),
    "list": (*_slices(), Operation("sort", "sorted({})", sorted)),
}
"""What functions of each kind of argument are made of."""


class SmallFunctions:
    """``list: sort, then first 2`` asks for ``def f(x): return sorted(x)[:2]`` in a Python fence.

    Questions are pairs of different operations of three families (numbers, text, lists), without those whose result is
    always the same (``last 3, then drop 4`` leaves nothing). The part ``sft`` is what a teacher writes who takes the
    two steps in the wrong order with probability ``noise``; the part ``rl`` (and the whole) has ``meta["tests"]`` for
    the verifier ``code``: calls whose results come from composing the operations here, never from the text of a
    program. Where the order matters at all, at least one of the calls shows it (``meta["order_matters"]``), so that
    the teacher's mistake never passes. A few questions are passed by a shorter program too: no five calls show all.

    Questions are held out by their hash: those of ``val`` and ``test`` are in no training part.

    Args:
        families: which of :data:`FAMILIES`.
        noise: how often the teacher takes the wrong order.
        calls: tests of each function.

    Raises:
        ConfigError: for values that cannot be.
    """

    def __init__(self, families: Sequence[str] = ("number", "text", "list"), noise: float = 0.6, calls: int = 5):
        unknown = sorted(set(families) - set(FAMILIES))
        if unknown or not families:
            raise ConfigError(f"small_functions: families are some of {', '.join(FAMILIES)}, not {list(families)}")
        if not 0 <= noise <= 1:
            raise ConfigError(f"small_functions: noise is a probability, not {noise}")
        if not 1 <= calls <= 100:
            raise ConfigError(f"small_functions: calls must be from 1 to 100, not {calls}")
        self.families, self.noise, self.calls = tuple(dict.fromkeys(families)), noise, calls
        self.revision = f"small_functions-1-{'-'.join(sorted(self.families))}-noise{noise:g}-calls{calls}"

    def spec(self) -> DataSpec:
        """Chat."""
        return DataSpec(task="chat")

    def check(self) -> None:
        """Nothing can be missing: the data is computed."""

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Question k, all of them once before any comes again; in the part ``sft`` with the teacher's program."""
        self._known(part)
        questions = self._questions["train"]
        family, steps = questions[stream.shuffled(k, len(questions))]
        if part != "sft":
            return self._example(family, steps)
        wrong = bool(stream.rng(k, "teacher").random() < self.noise)
        text = _question(family, steps)
        answer = _fenced(program(steps[::-1] if wrong else steps))
        return Example(id=f"sft-{text}", messages=[text_message("user", text)], answer=answer)

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """The questions of ``val`` or ``test`` with their tests, whatever the part."""
        self._known(part)
        if split not in ("val", "test"):
            raise ConfigError(f"small_functions holds out val and test, not {split!r}")
        return [self._example(*question) for question in self._questions[split]]

    @cached_property
    def _questions(self) -> dict[str, list[tuple[str, tuple[Operation, Operation]]]]:
        questions: dict[str, list[Any]] = {split: [] for split in SPLITS}
        for family in self.families:
            for steps in product(FAMILIES[family], repeat=2):
                results = [result for _, result, _ in _cases(family, steps)]
                if steps[0] is not steps[1] and any(result != results[0] for result in results):
                    questions[split_of(_question(family, steps))].append((family, steps))
        return questions

    def _known(self, part: str | None) -> None:
        if part not in PARTS:
            raise ConfigError(f"small_functions has the parts sft and rl, not {part!r}")

    def _example(self, family: str, steps: tuple[Operation, Operation]) -> Example:
        text = _question(family, steps)
        cases = _cases(family, steps)
        # First a call that shows the order, if any does, then one with another result, then any.
        cases.sort(key=lambda case: case[1] == case[2])
        cases[1:] = sorted(cases[1:], key=lambda case: case[1] == cases[0][1])
        return Example(
            id=text,
            messages=[text_message("user", text)],
            verifier="code",
            meta={
                "family": family,
                "order_matters": cases[0][1] != cases[0][2],
                "solution": program(steps),
                "tests": {
                    "kind": "call",
                    "function": "f",
                    "calls": [{"args": [case[0]], "expected": case[1]} for case in cases[: self.calls]],
                },
            },
        )


def program(steps: Sequence[Operation]) -> str:
    """The function that takes these steps, one line."""
    code = "x"
    for step in steps:
        code = step.code.format(code)
    return f"def f(x): return {code}"


def _question(family: str, steps: Sequence[Operation]) -> str:
    return f"{family}: {', then '.join(step.phrase for step in steps)}"


def _cases(family: str, steps: Sequence[Operation]) -> list[tuple[Any, Any, Any]]:
    """50 arguments, what the steps make of each, and what they would make of it in the wrong order."""
    first, second = steps
    rng = np.random.default_rng(derive_seed("small_functions", _question(family, steps)))
    drawn = [_argument(family, rng) for _ in range(50)]
    return [(x, second.apply(first.apply(x)), first.apply(second.apply(x))) for x in drawn]


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def _argument(family: str, rng: np.random.Generator) -> Any:
    if family == "number":
        return int(rng.integers(-20, 100))
    values = rng.integers(0, 26 if family == "text" else 100, int(rng.integers(1, 9))).tolist()
    return "".join(chr(ord("a") + value) for value in values) if family == "text" else values
