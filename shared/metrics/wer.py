"""Word and character error rates of transcribed lyrics or speech."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from torch import nn

from bestiary.shared.core.errors import BadDataError, ConfigError, require
from bestiary.shared.core.examples import Example
from bestiary.shared.metrics.audio_answers import Answered, check_sizes, completions, values_of
from bestiary.shared.metrics.audio_matchers import answer_of

APOSTROPHES = "\u2018\u2019\u201b\u02bc\u0060\u00b4"
HEADING = re.compile(r"\[[^\[\]\n]{0,100}\]")


def normalise(text: str, unit: str = "word") -> list[str]:
    """A text as the words or characters that error rates count.

    In order: Unicode compatibility forms (full width, ligatures) are resolved; what stands in square brackets goes
    (``[Chorus]``: headings of a lyric sheet are not sung), what stands in round ones stays; letters lose their case;
    apostrophes of all kinds become one, and stay inside words (``don't`` is one word, ``'cause`` is ``cause``); every
    other sign that is no letter, mark or digit separates. Numbers are not spelt out, spellings and contractions are
    not unified, and traditional characters are not simplified.

    Args:
        text: the text.
        unit: ``word``; or ``character``: each letter or digit is one, spaces and apostrophes do not count.

    Raises:
        ConfigError: for another unit.
    """
    if unit not in ("word", "character"):
        raise ConfigError(f"unit is word or character, not {unit!r}")
    text = HEADING.sub(" ", unicodedata.normalize("NFKC", text)).casefold()
    text = re.sub(f"[{APOSTROPHES}]", "'", text)
    kept = "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    words = [word for word in (piece.strip("'") for piece in kept.split()) if word]
    if unit == "word":
        return words
    return [c for word in words for c in word if c != "'"]


def error_rate(references: Sequence[str], answers: Sequence[str], unit: str = "word") -> dict[str, float]:
    """Substitutions, deletions and insertions of a whole corpus over the units of its references.

    It is not the mean of the rates of its parts, and can be above 1.

    Args:
        references, answers: texts, one to one.
        unit: see :func:`normalise`.

    Returns:
        ``rate``, its parts ``substitutions``, ``deletions`` and ``insertions`` (shares of the same whole), and
        ``units``.

    Raises:
        BadDataError: if nothing of a reference is left after it was normalised.
    """
    jiwer: Any = require("jiwer", "audio")
    pairs = []
    for reference, answer in zip(references, answers, strict=True):
        wanted = normalise(reference, unit)
        if not wanted:
            raise BadDataError(f"nothing of the reference {reference[:80]!r} is left to compare")
        # Units become words with spaces between, so that one alignment serves both.
        pairs.append((" ".join(wanted), " ".join(normalise(answer, unit))))
    out = jiwer.process_words([wanted for wanted, _ in pairs], [said for _, said in pairs])
    units = out.hits + out.substitutions + out.deletions
    return {
        "rate": (out.substitutions + out.deletions + out.insertions) / units,
        "substitutions": out.substitutions / units,
        "deletions": out.deletions / units,
        "insertions": out.insertions / units,
        "units": float(units),
    }


class ErrorRate:
    """Error rate of greedy transcriptions over a whole corpus, normalised by :func:`normalise`.

    Published rates of lyrics name neither their normaliser nor their segments: a number here is comparable with another
    of the same data, unit and version.

    Args:
        unit: ``word`` (named ``wer``) or ``character`` (named ``cer``: for Chinese).
        max_new_tokens: longest transcription.
        batch_size: prompts at once.
        by: keys of ``meta``: the rate is reported for each of their values too.
        label: put before the names of the numbers.

    Raises:
        ConfigError: for another unit, or sizes below 1.
    """

    name = "error_rate"
    version = "1"

    def __init__(
        self,
        unit: str = "word",
        max_new_tokens: int = 256,
        batch_size: int = 8,
        by: Sequence[str] = (),
        label: str = "",
    ):
        normalise("", unit)
        check_sizes("error_rate", max_new_tokens, batch_size)
        self.unit, self.max_new_tokens, self.batch_size, self.by = unit, max_new_tokens, batch_size, tuple(by)
        self.prefix = f"{label}/" if label else ""

    def __call__(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """``wer`` or ``cer`` (a share, not %), its ``/substitutions``, ``/deletions`` and ``/insertions``, what it
        rests on (``words`` or ``characters``, ``prompts``), ``truncated_share``, and the rate by ``by``.
        """
        return self.numbers(completions(model, examples, self.max_new_tokens, self.batch_size))

    def numbers(self, answers: Sequence[Answered]) -> dict[str, float]:
        """The metrics of transcriptions: no model is needed."""
        name = {"word": "wer", "character": "cer"}[self.unit]
        whole = self._rate(answers)
        out = {name: whole["rate"]}
        out |= {f"{name}/{kind}": whole[kind] for kind in ("substitutions", "deletions", "insertions")}
        out |= {f"{self.unit}s": whole["units"], "prompts": float(len(answers))}
        out["truncated_share"] = sum(one.cut for one in answers) / len(answers)
        for key in self.by:
            kinds: dict[str, list[Answered]] = {}
            for one in answers:
                for value in values_of(one.example, key):
                    kinds.setdefault(value, []).append(one)
            out |= {f"{name}/{key}={kind}": self._rate(here)["rate"] for kind, here in sorted(kinds.items())}
        return {f"{self.prefix}{key}": value for key, value in out.items()}

    def _rate(self, answers: Sequence[Answered]) -> dict[str, float]:
        references = [one.example.get("answer") or "" for one in answers]
        return error_rate(references, [answer_of(one.text) for one in answers], self.unit)
