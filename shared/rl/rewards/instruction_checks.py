"""Checkers of instructions on form: each takes an answer and says whether one instruction holds.

They are our own, in the manner of IFEval (arXiv:2311.07911); a score on them is not comparable to a published one. All
take time linear in the text. A word is letters and digits, with hyphens and apostrophes inside; a sentence ends with
``.``, ``!`` or ``?`` before white space (abbreviations are not known); paragraphs are parted by an empty line.
"""

from __future__ import annotations

import json
import operator
import re
import unicodedata
from collections.abc import Callable, Sequence

from bestiary.shared.core.errors import BadDataError

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": operator.ge,
    "at most": operator.le,
    "exactly": operator.eq,
    "less than": operator.lt,
    "more than": operator.gt,
}
CHECKS: dict[str, Callable[..., bool]] = {}
"""``family:name`` to the checker."""

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def check(name: str):
    """Register a checker under ``family:name``."""

    def register(function: Callable[..., bool]) -> Callable[..., bool]:
        CHECKS[name] = function
        return function

    return register


def compare(found: int, relation: str, count: int) -> bool:
    """Whether a number stands in a relation to another.

    Raises:
        BadDataError: for an unknown relation, or a count that is no whole number.
    """
    if relation not in RELATIONS or not isinstance(count, int) or isinstance(count, bool):
        raise BadDataError(f"relation {relation!r} and count {count!r}: {', '.join(RELATIONS)}, and a whole number")
    return RELATIONS[relation](found, count)


def words_of(text: str) -> list[str]:
    """The words of a text."""
    return WORD.findall(text)


def paragraphs_of(text: str) -> list[str]:
    """Paragraphs, parted by lines that are empty or white space."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(lines) for lines in found if lines]


def occurrences(text: str, phrase: str) -> int:
    """How often a word or phrase stands in a text as whole words, case aside."""
    return len(re.findall(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", text, re.IGNORECASE))


def phrases(values: Sequence[str]) -> Sequence[str]:
    """The values, if they are a list of texts that are not empty; BadDataError otherwise."""
    if isinstance(values, str) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise BadDataError(f"a list of texts is needed, not {values!r}")
    return values


# ------------------------------------------------------------------ lengths


@check("length:words")
def words(text: str, relation: str, count: int) -> bool:
    """Number of words."""
    return compare(len(words_of(text)), relation, count)


@check("length:sentences")
def sentences(text: str, relation: str, count: int) -> bool:
    """Number of sentences; a last one need not be closed."""
    pieces = re.split(r"[.!?]+(?=[\s\"'”’)]|$)", text)
    return compare(sum(bool(WORD.search(piece)) for piece in pieces), relation, count)


@check("length:paragraphs")
def paragraphs(text: str, relation: str, count: int) -> bool:
    """Number of paragraphs."""
    return compare(len(paragraphs_of(text)), relation, count)


@check("length:lines")
def lines(text: str, relation: str, count: int) -> bool:
    """Number of lines that are not empty."""
    return compare(sum(bool(line.strip()) for line in text.split("\n")), relation, count)


@check("length:characters")
def characters(text: str, relation: str, count: int) -> bool:
    """Number of characters, white space at the ends aside."""
    return compare(len(text.strip()), relation, count)


@check("length:each_word")
def each_word(text: str, relation: str, count: int) -> bool:
    """Every word has so many characters."""
    found = words_of(text)
    return all([compare(len(word), relation, count) for word in found] or [compare(0, relation, count)])


# ------------------------------------------------------------------ words and letters


@check("keywords:present")
def present(text: str, keywords: Sequence[str]) -> bool:
    """All of these words or phrases occur."""
    return all(occurrences(text, keyword) for keyword in phrases(keywords))


@check("keywords:absent")
def absent(text: str, keywords: Sequence[str]) -> bool:
    """None of these words or phrases occurs."""
    return not any(occurrences(text, keyword) for keyword in phrases(keywords))


@check("keywords:frequency")
def keyword_frequency(text: str, keyword: str, relation: str, count: int) -> bool:
    """One word or phrase occurs so often."""
    return compare(occurrences(text, phrases([keyword])[0]), relation, count)


@check("keywords:first_word")
def first_word(text: str, word: str, paragraph: int = 1) -> bool:
    """A paragraph (counted from 1) begins with this word."""
    found = paragraphs_of(text)
    first = words_of(found[paragraph - 1])[:1] if 1 <= paragraph <= len(found) else []
    return [w.casefold() for w in first] == [word.casefold()]


@check("letters:frequency")
def letter_frequency(text: str, letter: str, relation: str, count: int) -> bool:
    """One letter occurs so often, in either case."""
    if len(letter) != 1:
        raise BadDataError(f"one letter is needed, not {letter!r}")
    return compare(text.casefold().count(letter.casefold()), relation, count)


@check("letters:ascii")
def ascii_only(text: str) -> bool:
    """No character beyond ASCII."""
    return text.isascii()


@check("letters:script")
def script(text: str, script: str) -> bool:
    """There are letters, and all are of one script, by Unicode's name for it (``LATIN``, ``CYRILLIC``, ``HANGUL``)."""
    letters = {c for c in set(text) if c.isalpha()}
    return bool(letters) and all(unicodedata.name(c, "").startswith(script.upper() + " ") for c in letters)


@check("letters:palindromes")
def palindromes(text: str, relation: str, count: int) -> bool:
    """Number of words of three letters and more that read the same backwards."""
    found = [word.casefold() for word in words_of(text)]
    return compare(sum(len(word) > 2 and word == word[::-1] for word in found), relation, count)


@check("case:lower")
def lower(text: str) -> bool:
    """There are letters, and none is a capital."""
    return text == text.lower() and any(c.isalpha() for c in text)


@check("case:upper")
def upper(text: str) -> bool:
    """There are letters, and all are capitals."""
    return text == text.upper() and any(c.isalpha() for c in text)


@check("case:capital_words")
def capital_words(text: str, relation: str, count: int) -> bool:
    """Number of words all in capitals."""
    return compare(sum(word.isupper() for word in words_of(text)), relation, count)


# ------------------------------------------------------------------ format


@check("format:title")
def title(text: str) -> bool:
    """There is a title in double angular brackets: ``<<title>>``."""
    return any(match.strip() for match in re.findall(r"<<([^<>\n]+)>>", text))


@check("format:bullets")
def bullets(text: str, relation: str, count: int) -> bool:
    """Number of lines that begin with ``* `` or ``- ``."""
    return compare(len(re.findall(r"^[ \t]*[*-][ \t]+\S", text, re.MULTILINE)), relation, count)


@check("format:sections")
def sections(text: str, word: str, relation: str, count: int) -> bool:
    """Number of lines that begin with a word and a number: ``Section 1``, Markdown's signs aside."""
    return compare(
        len(re.findall(rf"^[#* ]{{0,8}}{re.escape(word)} \d+\b", text, re.MULTILINE | re.IGNORECASE)), relation, count
    )


@check("format:highlights")
def highlights(text: str, relation: str, count: int) -> bool:
    """Number of passages between asterisks, one or two a side, on one line: ``*so*``, ``**so**``."""
    found = re.findall(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*", text)
    return compare(sum(bool((double or single).strip()) for double, single in found), relation, count)


@check("format:placeholders")
def placeholders(text: str, relation: str, count: int) -> bool:
    """Number of names in square brackets: ``[address]``."""
    return compare(len(re.findall(r"\[[^\[\]\n]+\]", text)), relation, count)


@check("format:json")
def is_json(text: str) -> bool:
    """The whole answer is JSON, an object or a list, a fence around it aside."""
    body = text.strip()
    if body.startswith("```") and body.endswith("```") and "\n" in body:
        body = body[body.index("\n") + 1 : -3]
    try:
        return isinstance(json.loads(body), dict | list)
    except (ValueError, RecursionError):
        return False


@check("punctuation:no_commas")
def no_commas(text: str) -> bool:
    """No comma."""
    return "," not in text and "，" not in text


# ------------------------------------------------------------------ beginnings, ends, and the whole


@check("ends:postscript")
def postscript(text: str, marker: str = "P.S.") -> bool:
    """A line begins with the marker, and something follows it."""
    return any(
        line.strip().startswith(marker) and line.strip() != marker for line in text.split("\n") if marker.strip()
    )


@check("ends:starts_with")
def starts_with(text: str, phrase: str) -> bool:
    """The answer begins with exactly this text."""
    return text.strip().startswith(phrases([phrase])[0].strip())


@check("ends:ends_with")
def ends_with(text: str, phrase: str) -> bool:
    """The answer ends with exactly this text."""
    return text.strip().endswith(phrases([phrase])[0].strip())


@check("ends:quotation")
def quotation(text: str) -> bool:
    """The whole answer stands in double quotation marks."""
    body = text.strip()
    return len(body) > 2 and (body[0], body[-1]) in (('"', '"'), ("“", "”"))


@check("combination:two_responses")
def two_responses(text: str) -> bool:
    """Two different answers, parted by ``******``."""
    found = [part.strip() for part in text.split("******")]
    return len(found) == 2 and all(found) and found[0] != found[1]


@check("combination:repeat_prompt")
def repeat_prompt(text: str, prompt: str) -> bool:
    """The answer begins with the prompt, word for word, and goes on."""
    body, wanted = text.strip(), phrases([prompt])[0].strip()
    return body.startswith(wanted) and bool(body[len(wanted) :].strip())


@check("choice:constrained")
def constrained(text: str, choices: Sequence[str]) -> bool:
    """The answer is one of these texts, and nothing else."""
    return text.strip() in [choice.strip() for choice in phrases(choices)]
