"""What a worker process of the ``reasoning_gym`` verifier runs: the tasks' own scoring, without its holes.

Some tasks of reasoning-gym hand the answer to ``eval`` or to sympy's parser, which is ``eval`` too: an answer could run
any code. For the tasks both are replaced here, by a reader of literals and by a parser that lets numbers, letters,
operators and the usual functions through and nothing else. This module is free of torch.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import json
import math
import re
import sys
import warnings
from typing import Any

import sympy
import sympy.parsing.sympy_parser as sympy_parser

from bestiary.shared.core.errors import require

warnings.simplefilter("ignore")  # numpy's remarks on nonsense

FUNCTIONS = frozenset(
    "sin cos tan cot sec csc asin acos atan sinh cosh tanh asinh acosh atanh exp log ln sqrt Abs abs pi".split()  # noqa: SIM905
)
TOKEN = re.compile(r"\s+|\d+(?:\.\d+)?(?![\w.])|[A-Za-z]+(?!\w)|[-+*/^(),]")
NO_NUMBER = re.compile(r"(?<![A-Za-z])(?:nan|inf|infinity)[ij]?(?![A-Za-z])", re.IGNORECASE)
EVALUATES_ITS_OWN = {"bitwise_arithmetic"}
"""Tasks that call eval on their own question while they score, never on an answer."""

_parse_expr = sympy_parser.parse_expr


def parse_plain(text: str, *args: Any, **options: Any) -> Any:
    """Parse with sympy what :func:`is_plain`.

    Raises:
        ValueError: for anything else.
    """
    if not is_plain(text):
        raise ValueError("no plain expression")
    return _parse_expr(text, *args, **options)


def is_plain(text: str) -> bool:
    """Whether a text is made of numbers, single letters, operators, brackets and known functions.

    There is no attribute, index, string or underscore in it, so evaluating it runs nothing but arithmetic. Numbers with
    an exponent are none either: countdown would not count their digits as used.
    """
    at = 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None or (len(match[0]) > 1 and match[0].isalpha() and match[0] not in FUNCTIONS):
            return False
        at = match.end()
    return True


def _refuse(*_: Any) -> None:
    raise ValueError("nothing is executed here")


# The tasks take the parser by one of these two names, when they are imported. Sympy's own calls need the real one.
sympy.parse_expr = sympy_parser.parse_expr = parse_plain  # type: ignore[assignment]
reasoning_gym: Any = require("reasoning_gym", "rl")
sympy_parser.parse_expr = _parse_expr


@functools.lru_cache(maxsize=64)
def _dataset(task: str, config: str) -> Any:
    dataset = reasoning_gym.create_dataset(task, seed=0, size=1, **json.loads(config))
    module: Any = sys.modules[type(dataset).__module__]
    module.exec = _refuse
    if task not in EVALUATES_ITS_OWN:
        module.eval = ast.literal_eval
    return dataset


def score(task: str, config: dict[str, Any], answer: str, entry: dict[str, Any]) -> list[Any]:
    """``[score, note]``: what the task gives an answer, from 0 to 1.

    Args:
        task: name of the task.
        config: of its generator; some tasks look at it when they score.
        answer: the answer alone.
        entry: the item that was generated, as it came through JSON.
    """
    gold = entry.get("answer")
    if NO_NUMBER.search(answer) and not NO_NUMBER.search(str(gold)):
        return [0.0, "NaN and infinities are no answer"]  # some tasks find no difference to them
    if task == "countdown" and re.search(r"[A-Za-z]", answer):
        return [0.0, "names stand for numbers that were not given"]
    if task in ("arc_agi", "rearc"):  # they compare with tuples
        entry = {**entry, "metadata": {**entry["metadata"], "output": tuple(map(tuple, entry["metadata"]["output"]))}}
    dataset = _dataset(task, json.dumps(config, sort_keys=True))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            value = float(dataset.score_answer(answer, entry))
    except MemoryError:
        raise
    except Exception as error:
        return [0.0, f"the task's scoring failed: {type(error).__name__}: {error}"[:200]]
    return [min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0, ""]
