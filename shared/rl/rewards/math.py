"""Mathematical answers: cheap comparisons first, then math-verify in a process that can be killed."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict

from bestiary.shared.core.errors import BadDataError, ConfigError, require
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import Verdict
from bestiary.shared.rl.rewards.extract import after_think, as_number, last_boxed
from bestiary.shared.rl.rewards.text import gold_of
from bestiary.shared.rl.rewards.workers import WorkerPool

LONGEST = 512
"""Characters of an answer that are handed to sympy."""


class Math:
    r"""1 if the last ``\boxed{…}`` behind the thoughts is mathematically equal to the gold answer.

    Equal texts and equal numbers are settled here; different integers as well. All else goes to math-verify (gold
    first: it is not symmetric) in worker processes, whose inner timeouts are backed by a deadline twice as long. An
    answer over 512 characters is wrong unless it equals the gold text. One that takes too long, or takes its process
    down, scores 0 with status ``timeout``.

    Taken for right, as by math-verify 0.9: units and degree signs left out or added, ``x=5`` and ``x\in\{5\}`` for 5,
    the last side of a chain (``6=5`` says 5), decimals equal to six digits (``0.333333`` for 1/3, not ``0.3333``), sets
    in any order, expressions not worked out (``2+3`` for 5). Percent signs are dropped on both sides, so ``5\%`` is 5,
    and not 0.05. Taken for wrong: ``[0,∞)`` for ``x≥0``, two answers where the gold one is one. ``(1,2)`` reads as
    an open interval, so it equals itself, and not ``(2,1)``. Words are compared as texts, case aside, since as
    mathematics they are products of letters and equal to their anagrams.

    Paper: arXiv:2505.16400 (AceReason): 1 or 0 by a rule-based grader, the answer in a box behind the thoughts.
    Differs from paper: math-verify, in place of a grader on sympy 1.12.

    Args:
        workers: worker processes.
        timeout_s: whole seconds for each of math-verify's three steps.
        memory_mb: address space of a worker in MiB.
        need_think: without ``</think>`` the score is 0; else the whole text is searched.
        cache: pairs of gold and answer that are remembered.
    """

    name = "math"
    version = "1"

    def __init__(
        self,
        workers: int = 2,
        timeout_s: int = 3,
        memory_mb: int = 1024,
        need_think: bool = False,
        cache: int = 10_000,
    ):
        if int(timeout_s) != timeout_s or timeout_s < 1:
            raise ConfigError(f"verifier 'math': timeout_s is a whole number of seconds, not {timeout_s!r}")
        require("math_verify", "rl")
        self.timeout_s, self.need_think, self.size = int(timeout_s), need_think, cache
        self.pool = WorkerPool(
            "bestiary.shared.rl.rewards.math_child:same", workers, 2.0 * 3 * self.timeout_s, memory_mb
        )
        self._cache: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, example: Example) -> None:
        """Raise BadDataError where the gold answer is missing or too long."""
        if len(plain_form(gold_of(example))) > LONGEST:
            raise BadDataError(f"example {example.get('id')!r}: its answer is longer than {LONGEST} characters")

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Compare the boxed answer with the gold one."""
        found = last_boxed(after_think(answer, required=self.need_think))
        if found is None:
            return Verdict(0.0, note="no \\boxed{}")
        gold = last_boxed(gold) or gold
        if found.strip() == gold.strip():
            return Verdict(1.0)
        if len(found) > LONGEST:
            return Verdict(0.0, note=f"the answer is longer than {LONGEST} characters")
        return self._compare(plain_form(gold), plain_form(found))

    def _compare(self, gold: str, found: str) -> Verdict:
        if not gold or not found:
            return Verdict(0.0, note="nothing to compare")
        if gold == found:
            return Verdict(1.0)
        wanted, number = exact(gold), exact(found)
        if wanted is not None and number is not None:
            if wanted == number:
                return Verdict(1.0)
            if wanted.denominator == number.denominator == 1:
                return Verdict(0.0)
        words = as_words(gold)
        if words is not None:
            return Verdict(float(words == as_words(found)))
        with self._lock:
            known = self._cache.get((gold, found))
        if known is not None:
            return known
        result = self.pool.call(gold, found, self.timeout_s)
        if result.status == "error":
            return Verdict(0.0, "error", note=result.note)
        if result.status != "ok":
            return Verdict(0.0, "timeout", note=result.note)
        equal, note = result.value
        if equal is None:
            return Verdict(0.0, "timeout", note=note)
        verdict = Verdict(float(equal), note=note)
        with self._lock:  # not for timeouts: another time the machine may be less busy
            self._cache[gold, found] = verdict
            if len(self._cache) > self.size:
                self._cache.popitem(last=False)
        return verdict

    def gold_answer(self, example: Example) -> str | None:
        """The gold answer in a box, behind thoughts where they are needed."""
        gold = example.get("answer")
        if gold is None:
            return None
        return ("</think>" if self.need_think else "") + f"\\boxed{{{last_boxed(gold) or gold}}}"

    def close(self) -> None:
        """End the worker processes."""
        self.pool.close()


def plain_form(text: str) -> str:
    r"""One line without what carries no meaning: dollar and percent signs, spacing commands, ``\left``, ``\dfrac``."""
    text = text.replace("\\%", "").replace("%", "").replace("\\$", "").replace("$", "").replace("\u2212", "-")
    text = re.sub(r"\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\[,;:!]", "", text)
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text).replace("{,}", ",")
    return " ".join(text.split()).rstrip(".").strip()


def exact(text: str):
    r"""The exact value of a plain number, ``a/b``, ``\frac{a}{b}`` or ``\frac12``; None for anything else."""
    match = re.fullmatch(r"([-+]?) ?\\frac ?(?:\{ ?(-?\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))", text)
    if match is not None:
        sign, over, under = match[1], match[2] or match[3], match[4] or match[5]
        value = as_number(f"{over}/{under}")
        return -value if value is not None and sign == "-" else value
    return as_number(text)


def as_words(text: str) -> str | None:
    r"""The text in lower case where it is words (``\text{…}``, or four letters and more); else None."""
    match = re.fullmatch(r"\\(?:text|mathrm|textbf|mbox) ?\{([^{}\\]*)\}", text)
    if match is not None:
        return match[1].strip().casefold()
    bare = re.fullmatch(r"[^\W\d_]{4,}(?:[ '’-][^\W\d_]+)*", text)
    return text.casefold() if bare is not None else None
