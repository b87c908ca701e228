"""A penalty on completions that leave the language of the prompt for another script."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import torch

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import ScoredRow

MODES = ("batch_min_minus_10", "minus_one", "zero")
FOREIGN_SHARE = 0.2
"""Share of foreign letters from which a prompt counts as not English."""


class CodeSwitch:
    """Replaces the reward of a completion that has letters of a foreign script where the prompt is English.

    A letter is foreign if, after Unicode compatibility folding, it is neither Latin nor Greek (so 𝛼, ℝ, fullwidth and
    superscript letters are not, nor the ℵ of set theory). Letters that the prompt itself has may be quoted. A prompt
    of which a fifth of the letters or more are foreign is not English, and its completions are left alone. Thoughts
    count. Another language in Latin letters is not noticed.

    Paper: arXiv:2512.13607 (Nemotron-Cascade): batch minimum − 10 in RLHF, −1 in math, 0 in code.

    Args:
        mode: the new reward: ``batch_min_minus_10`` (the least reward of the step, less 10), ``minus_one`` or ``zero``.
    """

    def __init__(self, mode: str = "minus_one"):
        if mode not in MODES:
            raise ConfigError(f"code_switch: mode is one of {', '.join(MODES)}, not {mode!r}")
        self.mode = mode

    def __call__(self, rewards: torch.Tensor, groups: Sequence[Sequence[ScoredRow]]) -> torch.Tensor:
        """Rewards (P, G) with those of offenders replaced; NaN stays."""
        offends = torch.tensor(
            [[switches_script(row.example, row.text) for row in group] for group in groups],
            dtype=torch.bool,
            device=rewards.device,
        ).reshape(rewards.shape)
        known = rewards[~rewards.isnan()]
        if self.mode == "batch_min_minus_10":
            penalty = float(known.min()) - 10.0 if len(known) else 0.0
        else:
            penalty = -1.0 if self.mode == "minus_one" else 0.0
        return torch.where(offends & ~rewards.isnan(), penalty, rewards)


def switches_script(example: Example, text: str) -> bool:
    """Whether a completion has foreign letters that its English prompt does not have."""
    if text.isascii():
        return False
    found = {c for c in set(text) if is_foreign(c)}
    if not found:
        return False
    prompt = prompt_text(example)
    letters = [c for c in prompt if c.isalpha()]
    foreign = sum(is_foreign(c) for c in letters)
    if letters and foreign >= FOREIGN_SHARE * len(letters):
        return False
    return not found <= set(prompt)


def prompt_text(example: Example) -> str:
    """All text of an example's prompt."""
    messages = example.get("messages") or []
    pieces = [c["value"] for m in messages for c in m["content"] if c["type"] == "text"]
    return "\n".join([*pieces, example.get("text") or ""])


@lru_cache(20_000)
def is_foreign(character: str) -> bool:
    """Whether a character is a letter of a script other than Latin and Greek."""
    if "\u2135" <= character <= "\u2138":  # alef to dalet as mathematical signs
        return False
    for c in unicodedata.normalize("NFKC", character):
        if unicodedata.category(c) in ("Lu", "Ll", "Lt", "Lo"):
            script = unicodedata.name(c, "").split(" ")[0]
            if script not in ("LATIN", "GREEK"):
                return True
    return False
