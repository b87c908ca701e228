"""The reward of a patch without running it: against the gold patch, and a judge for what lies between."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from typing import Any

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import Verdict
from bestiary.shared.rl.rewards.extract import after_think, last_fence

HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")
Change = tuple[str, tuple[tuple[str, str], ...]]
"""A file, and its removed and added lines in order, each with its sign."""


class Patch:
    """1 for the gold patch, 0 for one that changes nothing, −1 for one that cannot be read, else a judge's word.

    Two patches are the same if they remove and add the same lines of the same files in the same order; context lines,
    line numbers, index lines and white space at line ends do not count.

    Paper: arXiv:2512.13607 (Nemotron-Cascade), SWE RL. Differs from paper: without a judge, the similarity of the
    changed lines (difflib's ratio) stands in for its P(YES); it is below 1 for every patch that is not the gold one.

    Args:
        judge: (gold patch, patch, example) to the probability that the patch does what is asked, 0 to 1; None: the
            similarity.
        max_chars: a longer patch cannot be read.
    """

    name = "patch"
    version = "1"

    def __init__(self, judge: Callable[[str, str, Example], float] | None = None, max_chars: int = 50_000):
        self.judge, self.max_chars = judge, max_chars

    def check(self, example: Example) -> None:
        """Raise BadDataError for a gold patch that is none."""
        if not parse_patch(example.get("answer", "")):
            raise BadDataError(f"example {example.get('id')!r}: its answer is no unified diff that changes something")

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Compare."""
        text = after_think(answer)
        text = last_fence(text, ("diff", "patch")) or text
        wanted = parse_patch(gold)
        if not wanted:
            return Verdict(0.0, "error", note="the gold answer is no unified diff")
        found = None if len(text) > self.max_chars else parse_patch(text)
        if found is None:
            return Verdict(-1.0, note="not a unified diff")
        if not found:
            return Verdict(0.0, note="no change")
        if found == wanted:
            return Verdict(1.0, note="the gold patch")
        if self.judge is None:
            return Verdict(similarity(wanted, found), note="similarity")
        value: Any = self.judge(gold, text, example)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return Verdict(0.0, "error", note=f"the judge said {value!r}"[:200])
        return Verdict(min(max(float(value), 0.0), 1.0), note="judge")

    def gold_answer(self, example: Example) -> str | None:
        """The gold patch in a fence."""
        return f"```diff\n{example.get('answer', '')}\n```"

    def close(self) -> None:
        """There is nothing to give back."""


def parse_patch(text: str) -> list[Change] | None:
    """A unified diff as its changes, by file name; None if it is none.

    A patch without any change (no hunk, or context alone) is an empty list; so is an empty text.
    """
    if not text.strip():
        return []
    files: dict[str, list[tuple[str, str]]] = {}
    name: str | None = None
    old = new = 0
    seen = False
    for line in text.splitlines():
        if old > 0 or new > 0:  # inside a hunk, as long as its header says
            sign = line[:1] or " "
            if sign not in "+- \\":
                return None
            old -= sign in "- "
            new -= sign in "+ "
            if sign in "+-" and name is not None:
                files[name].append((sign, line[1:].rstrip()))
            if old < 0 or new < 0:
                return None
        elif line.startswith("--- "):
            name, seen = _file(line), True
        elif line.startswith("+++ "):
            target = _file(line)
            name = target if target != "/dev/null" or name is None else name
            files.setdefault(name, [])
        elif line.startswith("@@"):
            match = HUNK.match(line)
            if match is None or name is None or name not in files:
                return None
            old, new = (int(n) if n is not None else 1 for n in match.groups())
        elif line.strip() and not _header(line):
            return None
    if old > 0 or new > 0 or not seen:
        return None
    return sorted((name, tuple(changes)) for name, changes in files.items() if changes)


def _file(line: str) -> str:
    name = line[4:].split("\t")[0].strip()
    return name[2:] if name[:2] in ("a/", "b/") else name


def _header(line: str) -> bool:
    words = ("diff ", "index ", "new file", "deleted file", "old mode", "new mode", "similarity", "rename ", "\\ ")
    return line.startswith(words)


def similarity(wanted: list[Change], found: list[Change]) -> float:
    """How alike two patches' changed lines are, 0 to just below 1."""
    a, b = ([f"{name}:{sign}{line}" for name, lines in p for sign, line in lines] for p in (wanted, found))
    return min(difflib.SequenceMatcher(None, a, b, autojunk=False).ratio(), 0.99)
