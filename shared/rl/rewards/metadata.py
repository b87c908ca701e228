"""Structured metadata: how much of a record (tempo, key, instruments, …) a description names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import Verdict
from bestiary.shared.rl.rewards.extract import after_think, last_tag

KINDS = {"bpm": "bpm", "tempo": "bpm", "key": "key", "meter": "meter", "metre": "meter", "time signature": "meter"}
"""How a category of this name is compared, where nobody says otherwise; any other is ``text``."""

NOTES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
SIGNS = {"#": 1, "♯": 1, "sharp": 1, "b": -1, "♭": -1, "flat": -1}
KEY = re.compile(r"\b([A-G])[ -]?(#|♯|b|♭|(?i:sharp|flat))?[ -]?((?i:major|maj|minor|min)|m)(?!\w)")
METER = re.compile(r"(?<![\w/])(\d{1,2}) ?/ ?(\d{1,2})(?![\w/])")
BPM = re.compile(
    r"(?<![\w.])(\d{2,3}(?:\.\d{1,3})?) ?-?(?:bpm\b|beats per minute)"
    r"|\b(?:bpm|tempo|beats per minute)\b[^\d\n]{0,20}(\d{2,3}(?:\.\d{1,3})?)(?![\w.]*\d)",
    re.IGNORECASE,
)


class Named(NamedTuple):
    """Of one category, in an answer: values of the record, those of them that it names, all values that it names and
    those of these that are right. The last two are None where the category's possible values are not known.
    """

    wanted: int
    hit: int
    named: int | None
    right: int | None


class Metadata:
    """The share of a record's categories whose values the answer names.

    A category counts at most 1; one with several values counts the share of them that are named. Values are found as
    whole words, with case and punctuation aside. A tempo must be given as beats per minute, within 4 % (an octave off
    is wrong); a key with its mode, by any spelling (A♯ minor is B♭ minor); a metre exactly.

    Naming everything does not pay. Of a tempo, key or metre an answer may name two different values, the right one
    among them; with more the category counts 0. Of any other category whose possible values are known (``vocabulary``)
    it may name ``slack`` values more than the record has; with more, 0. Where they are not known, the length of the
    answer is the only bound: beyond ``max_chars`` it scores 0.

    Paper: arXiv:2511.10289 (Music Flamingo): matched items over the number of categories.
    Differs from paper: how values are compared, and the bounds, are ours; it says "string-matched".

    Args:
        categories: those that count; None for all of a record.
        kinds: category to ``text``, ``bpm``, ``key`` or ``meter``, beside :data:`KINDS`.
        vocabulary: category to all values it can have; an example's ``meta["vocabulary"]`` comes before it.
        slack: see above.
        answer_tag: what is read is in ``<tag>…</tag>``; None for all that follows the thoughts.
        max_chars: longest answer.

    Example:
        ``meta["metadata"]``: category to a value or a list of values.
    """

    name = "metadata"
    version = "1"

    def __init__(
        self,
        categories: Sequence[str] | None = None,
        kinds: Mapping[str, str] | None = None,
        vocabulary: Mapping[str, Sequence[str]] | None = None,
        slack: int = 2,
        answer_tag: str | None = None,
        max_chars: int = 8000,
    ):
        self.categories = None if categories is None else {c.casefold() for c in categories}
        self.kinds = KINDS | {name.casefold(): kind for name, kind in (kinds or {}).items()}
        unknown = set(self.kinds.values()) - {"text", "bpm", "key", "meter"}
        if unknown:
            raise ConfigError(
                f"verifier 'metadata': kinds are text, bpm, key and meter, not {', '.join(sorted(unknown))}"
            )
        self.vocabulary = {name.casefold(): list(values) for name, values in (vocabulary or {}).items()}
        self.slack, self.answer_tag, self.max_chars = slack, answer_tag, max_chars

    def check(self, example: Example) -> None:
        """Raise BadDataError for a record that is missing, or a value that no answer could name."""
        where, record = f"example {example.get('id')!r}", self._record(example)
        if not record:
            raise BadDataError(f'{where} has no meta["metadata"] with a category that counts')
        for category, values in record.items():
            for value in values:
                kind = self.kinds.get(category, "text")
                if not plain(value).strip() or (kind != "text" and self._found(kind, self._said(kind, value)) is None):
                    raise BadDataError(f"{where}: {category} {value!r} cannot be read as {kind}")

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Look for each category's values."""
        text = self._read(answer)
        record = self._record(example)
        if not record:
            return Verdict(0.0, "error", note="the example has no record")
        if text is None or len(text) > self.max_chars:
            return Verdict(0.0, note="no answer in its tag" if text is None else f"over {self.max_chars} characters")
        known, words = self._known(example), plain(text)
        parts = {}
        for category, values in record.items():
            kind = self.kinds.get(category, "text")
            if kind == "text":
                parts[category] = self._share(values, known.get(category, ()), words)
            else:
                parts[category] = self._number(kind, values, text)
        return Verdict(sum(parts.values()) / len(parts), parts=parts)

    def named(self, answer: str, example: Example) -> dict[str, Named]:
        """Of each category (case folded) what the answer names; the bounds on naming too much play no part."""
        text, out = self._read(answer) or "", {}
        known, words = self._known(example), plain(text)
        for category, values in self._record(example).items():
            kind = self.kinds.get(category, "text")
            if kind == "text":
                own, found, others = self._texts(values, known.get(category, ()), words)
                sure = bool(known.get(category))
                total = len(found) + len(others) if sure else None
                out[category] = Named(len(own), len(found), total, len(found) if sure else None)
            else:
                found = self._found(kind, text) or set()
                right = {f for f in found for value in values if self._same(kind, f, value)}
                hit = sum(any(self._same(kind, f, value) for f in found) for value in values)
                out[category] = Named(len(values), hit, len(found), len(right))
        return out

    def gold_answer(self, example: Example) -> str | None:
        """A line a category."""
        record = self._record(example)
        if not record:
            return None
        lines = (
            f"{category}: {', '.join(self._said(self.kinds.get(category, 'text'), value) for value in values)}"
            for category, values in record.items()
        )
        text = ".\n".join(lines)
        return text if self.answer_tag is None else f"<{self.answer_tag}>{text}</{self.answer_tag}>"

    def close(self) -> None:
        """Nothing to give back."""

    def _record(self, example: Example) -> dict[str, list[str]]:
        """Category (case folded) to its values as texts."""
        record: Any = (example.get("meta") or {}).get("metadata") or {}
        out = {}
        for name, value in record.items():
            values = value if isinstance(value, list | tuple) else [value]
            if values and (self.categories is None or name.casefold() in self.categories):
                out[name.casefold()] = [str(v) for v in values]
        return out

    def _read(self, answer: str) -> str | None:
        """What is read of an answer, or None where its tag is missing."""
        text = after_think(answer)
        return text if self.answer_tag is None else last_tag(text, self.answer_tag)

    def _known(self, example: Example) -> Mapping[str, Sequence[str]]:
        """Category (case folded) to all values it can have."""
        own = (example.get("meta") or {}).get("vocabulary") or {}
        return self.vocabulary | {name.casefold(): values for name, values in own.items()}

    @staticmethod
    def _texts(values: list[str], vocabulary: Sequence[str], words: str) -> tuple[set[str], set[str], set[str]]:
        """The record's values, those of them that are named, and other values of the vocabulary that are."""
        own = {plain(value) for value in values}
        found = {value for value in own if value in words}
        others = {value for value in map(plain, vocabulary) if value.strip() and value in words} - own
        # "bass" inside "double bass" is not another
        return own, found, {v for v in others if not any(v in w for w in found)}

    def _share(self, values: list[str], vocabulary: Sequence[str], words: str) -> float:
        own, found, others = self._texts(values, vocabulary, words)
        if len(found) + len(others) > len(own) + self.slack:
            return 0.0
        return len(found) / len(own)

    def _number(self, kind: str, values: list[str], text: str) -> float:
        found = self._found(kind, text)
        if found is None or len(found) > max(2, len(values)):
            return 0.0
        return sum(any(self._same(kind, f, value) for f in found) for value in values) / len(values)

    def _same(self, kind: str, found: Any, value: str) -> bool:
        """Whether a tempo, key or metre that was found is a value of the record."""
        wanted = self._found(kind, self._said(kind, value)) or set()
        return any(abs(found - w) <= 0.04 * w for w in wanted) if kind == "bpm" else found in wanted

    @staticmethod
    def _said(kind: str, value: str) -> str:
        """A value as an answer would say it."""
        return f"{value} bpm" if kind == "bpm" and re.fullmatch(r"[\d.]+", value.strip()) else value

    @staticmethod
    def _found(kind: str, text: str) -> set[Any] | None:
        """The different tempos, keys or metres that a text names, or None."""
        if kind == "bpm":
            found: set[Any] = {float(match[1] or match[2]) for match in BPM.finditer(text)}
        elif kind == "meter":
            found = {(int(match[1]), int(match[2])) for match in METER.finditer(text)}
        else:
            found = set()
            for note, sign, mode in KEY.findall(text):
                minor = mode == "m" or mode.casefold().startswith("min")
                found.add(((NOTES[note] + SIGNS.get(sign.casefold(), 0)) % 12, minor))
        return found or None


def plain(text: str) -> str:
    """Case folded, punctuation as spaces, and a space at both ends, so that ``in`` finds whole words."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(["", *re.findall(r"[^\W_]+", folded), ""])
