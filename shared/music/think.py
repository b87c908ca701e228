"""Chains of thought checked step by step against the record of a piece.

Paper: arXiv:2511.10289, section on MF-Think: chains are split into small steps, each is checked, minor errors are
rewritten, and a chain with more than 30 % wrong steps is dropped.
Differs from paper: there the model trained so far checks each step against the audio; here the record does, by rule,
and a step without a claim that it can judge passes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bestiary.shared.music.claims import Claim, claims, steps
from bestiary.shared.music.records import Record

LIMIT = 0.3
"""Share of wrong steps beyond which a chain is dropped; the paper's."""


@dataclass(frozen=True)
class Step:
    """One step of a chain: as it was, ``right``, ``wrong`` or ``neutral``, and as it is kept; None where it is not."""

    text: str
    verdict: str
    kept: str | None


@dataclass(frozen=True)
class Chain:
    """A checked chain.

    Attributes:
        steps: its steps. wrong: share of wrong ones among all. text: the chain as it is kept, or None if it is dropped.
    """

    steps: tuple[Step, ...]
    wrong: float
    text: str | None


def check_chain(chain: str, record: Record, limit: float = LIMIT) -> Chain:
    """Judge each step; rewrite wrong values from the record, or leave the step out where the record has no single one.

    Args:
        chain: sentences or lines. record: what is true. limit: share of wrong steps that is still mended.
    """
    checked = []
    for start, end in steps(chain):
        text = chain[start:end].strip()
        found = claims(text, record)
        if all(claim.right for claim in found):
            checked.append(Step(text, "right" if found else "neutral", text))
        else:
            checked.append(Step(text, "wrong", mended(text, found, record)))
    wrong = sum(step.verdict == "wrong" for step in checked) / len(checked) if checked else 1.0
    kept = [step.kept for step in checked if step.kept]
    return Chain(tuple(checked), wrong, " ".join(kept) if kept and wrong <= limit else None)


def mended(text: str, found: list[Claim], record: Record) -> str | None:
    """The text with its wrong values replaced by the record's, or None where that cannot be done.

    Nor is it where a step names several values of one category: "from 60 to 90 bpm" would go from one to the same.
    """
    for claim in sorted(found, key=lambda claim: -claim.start):
        if claim.right:
            continue
        values = record.texts(claim.category)
        if len(values) != 1 or sum(other.category == claim.category for other in found) > 1:
            return None
        before = text[: claim.start]
        if re.search(r"\b[Aa]n? $", before):
            # As it is said: an A, an E, an F sharp, an 80, an 11, an organ.
            vowel = re.match(r"[AaEeIiOo]|F\b|8|1[18]\b", values[0])
            before = re.sub(r"n? $", "n " if vowel else " ", before)
        value = values[0] if before.strip() else values[0][0].upper() + values[0][1:]
        text = before + value + text[claim.end :]
    return text if all(claim.right for claim in claims(text, record)) else None
