"""Finding the answer in a completion. All of it takes time linear in the text, whatever the text is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
# A sign belongs to a number unless it stands behind something it could be subtracted from.
NUMBER = re.compile(
    r"(?<![\w.])(?:(?<![\w.)\]}])[-+\u2212])?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)\.\d*|\.\d+|(?<=\d))"
    r"(?:[eE][-+]?\d{1,4}(?!\w))?"
    r"(?: ?/ ?\d+(?![\d.]))?"
)
PLAIN_NUMBER = re.compile(r"([-+]?)(\d*)(?:\.(\d*))?(?:e([-+]?\d{1,4}))?", re.IGNORECASE)
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)
LONGEST_NUMBER = 400
"""Characters and decimal exponent; beyond that a number is a way to use up memory."""


def after_think(text: str, tag: str = "think", required: bool = False) -> str:
    """What follows the last closing tag of the thoughts.

    Args:
        text: the completion.
        tag: name of the tag.
        required: without a closing tag the answer is empty (the thoughts were cut off); else it is the whole text.
    """
    end = f"</{tag}>"
    at = text.rfind(end)
    if at < 0:
        return "" if required else text
    return text[at + len(end) :]


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{…}``, braces balanced (escaped ones do not count); None without one, or cut off."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for match in BRACES.finditer(text, start):
        if match[0] in "{}":
            depth += 1 if match[0] == "{" else -1
            if depth == 0:
                return text[start : match.start()]
    return None


def last_tag(text: str, tag: str = "answer") -> str | None:
    """Content of the last ``<tag>…</tag>``, or None without a whole one."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, end) if end >= 0 else -1
    return None if start < 0 else text[start + len(tag) + 2 : end]


def last_fence(text: str, languages: Sequence[str] = (), plain: bool = True) -> str | None:
    """Content of the last closed code fence in one of some languages, or None.

    Args:
        text: the text.
        languages: names behind the opening fence, in lower case; none means any.
        plain: take a fence that names no language too.
    """
    found: str | None = None
    opened: re.Match[str] | None = None
    for match in FENCE.finditer(text):
        if opened is None:
            opened = match
        elif match[1].startswith(opened[1]) and not match[2]:  # at least as long, of the same kind
            language = opened[2].lower()
            if not languages or language in languages or (plain and not language):
                found = text[opened.end() + 1 : match.start()]
            opened = None
    return found


def numbers(text: str) -> list[str]:
    """All numbers of a text as they stand: ``1,234.5``, ``-3``, ``1/2``, ``2e-3``. Digits inside words do not count."""
    return [match[0] for match in NUMBER.finditer(text)]


def last_number(text: str) -> str | None:
    """The last number of a text, or None."""
    found: str | None = None
    for match in NUMBER.finditer(text):
        found = match[0]
    return found


def as_number(text: str) -> Fraction | None:
    """A decimal, an integer with thousands separators, or a fraction of such, exactly; None for anything else.

    NaN, infinities, and numbers of more than 400 digits are none.
    """
    text = text.strip().replace("\u2212", "-")
    if len(text) > LONGEST_NUMBER or not text.isascii():
        return None
    over, slash, under = text.partition("/")
    numerator = _decimal(over.strip())
    if not slash or numerator is None:
        return numerator
    denominator = _decimal(under.strip())
    return numerator / denominator if denominator else None


def _decimal(text: str) -> Fraction | None:
    if "," in text:
        if not re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", text):
            return None
        text = text.replace(",", "")
    match = PLAIN_NUMBER.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return None
    exponent = int(match[4] or 0)
    if abs(exponent) > LONGEST_NUMBER:
        return None
    fraction = match[3] or ""
    value = Fraction(int(match[2] + fraction or "0")) * Fraction(10) ** (exponent - len(fraction))
    return -value if match[1] == "-" else value
