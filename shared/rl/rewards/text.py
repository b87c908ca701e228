"""Verifiers that compare texts, numbers and letters of multiple choice."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import Verdict
from bestiary.shared.rl.rewards.extract import after_think, as_number, last_boxed, last_tag, numbers

READ = 20_000
"""Characters at the end of an answer that are searched where no tag says where it stands."""


class ExactText:
    """1 if what follows the thoughts equals the gold answer, white space at the ends aside.

    Args:
        ignore_case: fold case.
        ignore_punctuation: leave punctuation and symbols out.
        ignore_spaces: any white space counts as one space.
        answer_tag: compare the content of the last ``<tag>…</tag>``; without one the score is 0.
    """

    name = "exact_text"
    version = "1"

    def __init__(
        self,
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        ignore_spaces: bool = False,
        answer_tag: str | None = None,
    ):
        self.ignore_case, self.ignore_punctuation, self.ignore_spaces = ignore_case, ignore_punctuation, ignore_spaces
        self.answer_tag = answer_tag

    def check(self, example: Example) -> None:
        """Raise BadDataError where there is no gold answer, or nothing of it is left to compare."""
        if not self._plain(gold_of(example)):
            raise BadDataError(f"example {example.get('id')!r}: nothing of its answer is left to compare")

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Compare."""
        wanted = self._plain(gold)
        if not wanted:
            return Verdict(0.0, "error", note="there is no gold answer")
        text: str | None = after_think(answer)
        if self.answer_tag is not None:
            text = last_tag(text, self.answer_tag)
            if text is None:
                return Verdict(0.0, note=f"no <{self.answer_tag}>")
        return Verdict(float(self._plain(text) == wanted))

    def gold_answer(self, example: Example) -> str | None:
        """The gold answer in its tag."""
        return in_tag(example.get("answer"), self.answer_tag)

    def close(self) -> None:
        """Nothing to give back."""

    def _plain(self, text: str) -> str:
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = "".join(c for c in text if unicodedata.category(c)[0] not in "PS")
        return " ".join(text.split()) if self.ignore_spaces else text.strip()


class Numeric:
    r"""1 if the number that is answered is the gold one, within tolerances.

    The answer is the content of the last ``<answer>…</answer>`` or else ``\boxed{…}``, which must hold one number
    (``12 apples`` is fine, ``5 or 6`` is none); without either it is the last number of what follows the thoughts.
    Thousands separators, fractions, exponents and the minus sign of Unicode are understood. NaN and infinities never
    equal anything. Numbers are compared exactly, as fractions.

    Args:
        absolute: largest difference that still counts as equal.
        relative: the same as a share of the gold number; the larger of the two holds.
        percent: read ``5%`` as 0.05; else a number with a percent sign is no number.
    """

    name = "numeric"
    version = "1"

    def __init__(self, absolute: float = 0.0, relative: float = 0.0, percent: bool = False):
        self.absolute, self.relative, self.percent = Fraction(absolute), Fraction(relative), percent

    def check(self, example: Example) -> None:
        """Raise BadDataError where the gold answer is no number."""
        if self._number(gold_of(example)) is None:
            hint = "" if self.percent else " (with percent: true, 5% is 0.05)"
            raise BadDataError(
                f"example {example.get('id')!r}: its answer {example['answer'][:80]!r} is no number{hint}"
            )

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Compare."""
        wanted = self._number(gold)
        if wanted is None:
            return Verdict(0.0, "error", note="the gold answer is no number")
        text = after_think(answer)
        marked = last_tag(text)
        marked = last_boxed(text) if marked is None else marked
        text = (text if marked is None else marked)[-READ:]
        found = self._numbers(text)
        if marked is not None and len(found) != 1:
            return Verdict(0.0, note=f"{len(found)} numbers where the answer should be")
        value = found[-1] if found else None
        if value is None:
            return Verdict(0.0, note="no number")
        close = abs(value - wanted) <= max(self.absolute, self.relative * abs(wanted))
        return Verdict(float(close))

    def gold_answer(self, example: Example) -> str | None:
        """The gold answer in its tag."""
        return in_tag(example.get("answer"), "answer")

    def close(self) -> None:
        """Nothing to give back."""

    def _number(self, text: str) -> Fraction | None:
        found = self._numbers(text[:READ])
        return found[0] if len(found) == 1 else None

    def _numbers(self, text: str) -> list[Fraction | None]:
        text = text.replace("\\%", "%").replace("{,}", ",")
        text = re.sub(r"\\d?frac ?\{ ?(-?\d{1,50}) ?\} ?\{ ?(\d{1,50}) ?\}", r"\1/\2", text)
        found, at = [], 0
        for number in numbers(text):
            at = text.index(number, at) + len(number)
            value = as_number(number)
            if text[at : at + 2].lstrip().startswith("%"):
                value = value / 100 if self.percent and value is not None else None
            found.append(value)
        return found


LETTERS = "ABCDEFGHIJ"
LIST_OF_LETTERS = r"(?:\(?[A-J]\)?(?![\w'’])(?:\s{0,3}(?:,|/|and|or|&)\s{0,3}(?:\(?[A-J]\)?(?![\w'’])))*)"
SAID = re.compile(
    r"(?i:\b(?:answer|(?:correct|right|best) (?:choice|option))\b)(?i:\s{0,3}(?:is|are|would be|must be|:|=|\*\*)){0,3}"
    rf"(?i:\s{{0,3}}(?:option|choice|letter)?)\s{{0,3}}[*$]{{0,2}}(?:\\(?:text|boxed)\{{)?({LIST_OF_LETTERS})"
)
STANDING = re.compile(
    r"\([A-J]\)|(?i:\b(?:choice|option) )[A-J](?!\w)|\*\*[A-J]\*\*"
    r"|(?<![\w'’])[A-J](?:\s{0,3}(?:,|/|and|or|&)\s{0,3}[A-J](?![\w'’]))+"
    r"|(?:^|(?<=\s))\*{0,2}[A-J]\*{0,2}(?:[.):](?!\w)|(?=\s{0,3}$))",
    re.MULTILINE,
)

LETTER = re.compile(r"(?<![\w'’])[A-J](?![\w'’])")
IN_TAG = re.compile(r"(?<![\w'’])[A-J](?![\w'’]| [a-z])")  # not the article


class MultipleChoice:
    r"""1 if the answer settles on the gold option, and on no other.

    Looked at: the content of the last ``<answer>…</answer>`` or else ``\boxed{…}``, or else what follows the thoughts.
    A letter alone settles it; then the letters behind "answer is", "correct option" and the like; then letters that
    stand as ``(B)``, ``B.``, ``**B**``, ``option B`` or alone on a line (in a tag, all that stand alone); then, where
    ``meta["options"]`` is known, the text of one option. Two different letters at the level that decides are a hedge
    and score 0.

    Example:
        ``answer``: a letter, or the text of an option. ``meta["options"]``: the texts in order, or letters to texts.
    """

    name = "multiple_choice"
    version = "1"

    def check(self, example: Example) -> None:
        """Raise BadDataError where the gold answer is none of the options."""
        if self._gold(gold_of(example), example) is None:
            raise BadDataError(
                f"example {example.get('id')!r}: its answer {example['answer'][:80]!r} is neither a letter nor "
                "an option"
            )

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Find the letter, and compare."""
        wanted = self._gold(gold, example)
        if wanted is None:
            return Verdict(0.0, "error", note="the gold answer is neither a letter nor an option")
        found = chosen_letters(answer, options_of(example))
        return Verdict(float(found == {wanted}), note=f"chose {', '.join(sorted(found)) or 'nothing'}")

    def gold_answer(self, example: Example) -> str | None:
        """The gold letter in its tag."""
        gold = self._gold(example.get("answer") or "", example)
        return in_tag(gold, "answer")

    def close(self) -> None:
        """Nothing to give back."""

    def _gold(self, gold: str, example: Example) -> str | None:
        options = options_of(example)
        letter = gold.strip().strip("().:*").upper()
        if len(letter) == 1 and letter in (options or LETTERS):
            return letter
        same = [key for key, text in options.items() if _words(text) == _words(gold)]
        return same[0] if len(same) == 1 else None


def options_of(example: Example) -> dict[str, str]:
    """Letters to the texts of ``meta["options"]``; empty where there are none."""
    options: Any = (example.get("meta") or {}).get("options") or {}
    if isinstance(options, dict):
        return {str(k).strip().upper(): str(v) for k, v in options.items()}
    return {letter: str(text) for letter, text in zip(LETTERS, options, strict=False)}


def chosen_letters(answer: str, options: dict[str, str]) -> set[str]:
    """The letters an answer settles on: one, or none, or several where it hedges."""
    text = after_think(answer)
    marked = last_tag(text)
    marked = last_boxed(text) if marked is None else marked
    text = (text if marked is None else marked)[-READ:]
    alone = re.sub(r"\\text\s?\{([^{}]{0,200})\}", r"\1", text).strip().strip("()[]{}.:*$\"' \n").upper()
    if len(alone) == 1 and alone in LETTERS:
        return {alone}
    said = {letter for match in SAID.finditer(text) for letter in LETTER.findall(match[1])}
    if marked is None:
        standing = {letter for match in STANDING.finditer(text) for letter in LETTER.findall(match[0])}
    else:
        standing = set(IN_TAG.findall(text))
    for letters in (said, standing):
        letters &= set(options or LETTERS)
        if letters:
            return letters
    rest, found = f" {_words(text)} ", set()
    for letter, option in sorted(options.items(), key=lambda item: -len(item[1])):  # "dark red" before "red"
        words = f" {_words(option)} "
        if words.strip() and words in rest:
            found.add(letter)
            rest = rest.replace(words, "  ")
    return found


def gold_of(example: Example) -> str:
    """The gold answer.

    Raises:
        BadDataError: where the example has none.
    """
    gold = example.get("answer")
    if not isinstance(gold, str) or not gold.strip():
        raise BadDataError(f"example {example.get('id')!r} has no answer (a text), and its verifier needs one")
    return gold


def in_tag(answer: str | None, tag: str | None) -> str | None:
    """``<tag>answer</tag>``; the answer alone without a tag, None without an answer."""
    return answer if answer is None or tag is None else f"<{tag}>{answer}</{tag}>"


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
