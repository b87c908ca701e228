"""How an answer about audio is read and compared with the gold one: one function a matcher."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.rewards.extract import after_think, last_number, last_tag
from bestiary.shared.rl.rewards.text import Numeric, chosen_letters, gold_of, options_of


@dataclass(frozen=True)
class Read:
    """What was read in an answer.

    Attributes:
        choice: the letter, label or number that was read; None where the answer cannot be read as one.
        right: whether it is the gold one.
    """

    choice: str | None
    right: bool


Matcher = Callable[[str, Example], Read]


def answer_of(text: str) -> str:
    """The answer in a completion: what its last ``<answer>…</answer>`` holds, or else all that follows the thoughts.

    Thoughts that were begun and not ended are no answer.
    """
    rest = _unthought(text)
    inside = last_tag(rest)
    return (rest if inside is None else inside).strip()


def mmau_words(text: str, example: Example) -> Read:
    """MMAU's own: all words of the gold option, and no word that only other options have.

    Words are runs of letters, digits and underscores, case aside. Options whose words are those of the gold one are not
    others. An answer with the letter of its option may so be wrong (``(A) Man`` where another option is ``A child``),
    and one that is a letter alone is, unless the option is that letter.

    Paper: arXiv:2410.19168 (MMAU) Sec. 4, as its evaluation program has it.
    """
    options, gold = options_of(example), _gold_letter(example)
    words = _words(answer_of(text))
    right = _holds(words, options[gold], list(options.values()))
    held = [letter for letter, option in options.items() if _holds(words, option, list(options.values()))]
    return Read(gold if right else held[0] if len(held) == 1 else None, right)


def letter(text: str, example: Example) -> Read:
    """The letter that an answer settles on, or else the one option whose text it has; two are none.

    It is the reading of the verifier ``multiple_choice``.
    """
    found = chosen_letters(_unthought(text), options_of(example))
    choice = next(iter(found)) if len(found) == 1 and found <= set(options_of(example)) else None
    return Read(choice, choice == _gold_letter(example))


def muchomusic(text: str, example: Example) -> Read:
    """MuChoMusic's own: the one letter of an option among *all* characters, or else the first option whose text it has.

    What stands before the last ``The correct answer is:`` does not count. Every capital counts, in words too: ``Drums``
    reads as D, which :func:`letter` does not do.

    Paper: arXiv:2408.01337 (MuChoMusic), as its evaluation program has it.
    """
    options = options_of(example)
    said = answer_of(text).split("The correct answer is:")[-1].strip()
    capitals = set(options) & set(said)
    choice = next(iter(capitals)) if len(capitals) == 1 else _first_named(options, said)
    return Read(choice, choice == _gold_letter(example))


def rul(text: str, example: Example) -> Read:
    """RUListening's own: the last ``[[X]]``; or the last letter after "answer is", "choose" and the like, whatever its
    case (so ``answer is a waltz`` reads as A); or the first ``option X`` or ``(X)`` in the order of the alphabet; or
    the first option whose text it has.

    Paper: arXiv:2504.00369 (RUListening), as its evaluation program has it.
    """
    options, said = options_of(example), answer_of(text)
    marked = re.findall(r"\[\[([A-E])\]\]", said)
    told = re.findall(r"(?:answer is|chose|choose|select|guess is|I guess) ([A-E])\b", said, re.IGNORECASE)
    standing = [x for x in "ABCDE" if f"option {x}" in said or f"Option {x}" in said or f"({x})" in said]
    if marked or told:
        choice: str | None = (marked or told)[-1].upper()
    else:
        choice = standing[0] if standing else _first_named(options, said)
    return Read(choice, choice == _gold_letter(example))


def label(text: str, example: Example) -> Read:
    """The whole answer is the label, case, punctuation and the kind of space aside.

    Where ``meta["labels"]`` says all labels, another answer counts as one that cannot be read.
    """
    said, gold = plain_label(answer_of(text)), plain_label(gold_of(example))
    labels = {plain_label(name) for name in (example.get("meta") or {}).get("labels") or ()}
    return Read(said if said and (not labels or said in labels) else None, said == gold)


def numeric(text: str, example: Example, absolute: float = 0.0) -> Read:
    """The number of the answer, or its last one; right within ``absolute``."""
    visible = _unthought(text)
    verdict = Numeric(absolute=absolute).verify(gold_of(example), visible, example)
    if verdict.status != "ok":
        raise BadDataError(f"example {example.get('id')!r}: {verdict.note}")
    return Read(None if verdict.note else last_number(answer_of(visible)), verdict.score == 1)


MATCHERS: dict[str, Matcher] = {
    "mmau_words": mmau_words,
    "letter": letter,
    "muchomusic": muchomusic,
    "rul": rul,
    "label": label,
    "numeric": numeric,
}
"""By the names that AudioQA takes."""


def plain_label(text: str) -> str:
    """A label without case, punctuation (underscores and hyphens are spaces), and spaces at its ends."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"[^\W_]+[#♯♭]?", folded))


def _unthought(text: str) -> str:
    return after_think(text).partition("<think>")[0]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _holds(words: set[str], option: str, options: Sequence[str]) -> bool:
    own = _words(option)
    others: set[str] = set().union(*(_words(other) for other in options)) - own
    return bool(words) and own <= words and not words & others


def _first_named(options: dict[str, str], said: str) -> str | None:
    low = said.lower()
    return next((key for key, option in options.items() if option.strip() and option.lower().strip() in low), None)


def _gold_letter(example: Example) -> str:
    gold, options = gold_of(example).strip(), options_of(example)
    if gold in options:
        return gold
    same = [key for key, option in options.items() if option.strip() == gold]
    if len(same) != 1:
        raise BadDataError(f"example {example.get('id')!r}: its answer {gold[:80]!r} is neither a letter nor an option")
    return same[0]
