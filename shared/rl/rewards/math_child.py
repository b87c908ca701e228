"""What a worker process of the ``math`` verifier runs: math-verify, with its own timeouts. Free of torch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from bestiary.shared.core.errors import require

math_verify: Any = require("math_verify", "rl")
errors: Any = require("math_verify.errors", "rl")


def same(gold: str, answer: str, timeout_s: int) -> list[Any]:
    """``[equal, why not]``; equal is None where math-verify ran out of time.

    Args:
        gold: LaTeX or plain mathematics without a box, short.
        answer: the same.
        timeout_s: for each of its three steps (two parsings, one comparison), in whole seconds.
    """
    try:
        wanted = parsed(gold, timeout_s)
        found = parsed(answer, timeout_s)
        if not wanted or not found:
            return [False, f"the {'answer' if wanted else 'gold answer'} cannot be parsed"]
        return [bool(math_verify.verify(wanted, found, timeout_seconds=timeout_s, raise_on_error=True)), ""]
    except errors.TimeoutException:
        return [None, "math-verify ran out of time"]
    except MemoryError:
        raise
    except Exception as error:  # sympy has many ways to refuse
        return [False, f"{type(error).__name__} in math-verify"]


@lru_cache(64)
def parsed(text: str, timeout_s: int) -> list[Any]:
    """What math-verify reads in a box around the text."""
    config = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    return math_verify.parse(
        f"\\boxed{{{text}}}", extraction_config=[config], parsing_timeout=timeout_s, raise_on_error=True
    )
