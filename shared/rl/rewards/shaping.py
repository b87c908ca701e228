"""Rewards that depend on the other completions of the step. Rewards are (P, G); NaN (a masked row) stays NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.rl.protocols import ScoredRow, Shaping

Groups = Sequence[Sequence[ScoredRow]]


def group_z(values: torch.Tensor) -> torch.Tensor:
    """z-scores (P, G) in each group, with the standard deviation over n − 1; 0 where all of a group are equal.

    NaN counts for nothing and stays.
    """
    known = ~values.isnan()
    count = known.sum(1, keepdim=True)
    centred = values - values.nansum(1, keepdim=True) / count
    variance = (centred**2).nansum(1, keepdim=True) / (count - 1).clamp(min=1)
    # Equal rewards leave rounding, which a tiny deviation would blow up.
    spread = _max(values, known) - _min(values, known) > 1e-9
    return torch.where(known & ~spread, 0.0, centred / torch.where(spread, variance.sqrt(), 1.0))


def _min(values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(~known, torch.inf).amin(1, keepdim=True)


def _max(values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(~known, -torch.inf).amax(1, keepdim=True)


class TanhZScore:
    """r = tanh(z), z the reward's z-score in its group: no outlier of a reward model rules a group.

    Paper: arXiv:2512.13607 (Nemotron-Cascade): a stabiliser for RLHF.
    """

    def __call__(self, rewards: torch.Tensor, groups: Groups) -> torch.Tensor:
        """New rewards (P, G)."""
        return torch.tanh(group_z(rewards))


class SigmoidGated:
    """r = r_IF + sigmoid(z) where the verifier gave 1, else 0; z is the reward model's score, normalised in the group.

    Paper: arXiv:2512.13607 (Nemotron-Cascade): IF-RL of thinking models. All completions of a group go into z, those
    that failed the verifier too, which the paper leaves open.

    Args:
        scorer: gives a step's scores (P, G), as a shaping: usually a
            :class:`~bestiary.shared.rl.rewards.reward_model.RewardModelScorer`.
    """

    def __init__(self, scorer: Shaping):
        self.scorer = scorer

    def __call__(self, rewards: torch.Tensor, groups: Groups) -> torch.Tensor:
        """New rewards (P, G)."""
        scores = self.scorer(rewards, groups).to(rewards)
        gated = torch.where(rewards == 1.0, rewards + torch.sigmoid(group_z(scores)), 0.0)
        return torch.where(rewards.isnan(), rewards, gated)


class OverlongPenalty:
    """Adds a penalty that falls linearly from 0 to −1 over the last tokens before the limit.

    0 up to ``max_tokens`` − ``cache_tokens``, −1 from ``max_tokens`` on.

    Paper: arXiv:2503.14476 (DAPO) Eq. 13: soft overlong punishment.

    Args:
        max_tokens: L_max, at most what sampling allows. cache_tokens: L_cache.
    """

    def __init__(self, max_tokens: int, cache_tokens: int):
        if not 0 < cache_tokens <= max_tokens:
            raise ConfigError(f"overlong_penalty: 0 < cache_tokens ({cache_tokens}) ≤ max_tokens ({max_tokens})")
        self.max_tokens, self.cache_tokens = max_tokens, cache_tokens

    def __call__(self, rewards: torch.Tensor, groups: Groups) -> torch.Tensor:
        """New rewards (P, G)."""
        lengths = torch.tensor([[float(row.tokens) for row in group] for group in groups]).to(rewards)
        over = (self.max_tokens - self.cache_tokens - lengths) / self.cache_tokens
        return rewards + over.clamp(-1.0, 0.0)


class GroupLengthControl:
    """Favours what is short for its group, apart for thoughts and answers, and more so where it is good as well.

    For each of the two lengths ℓ, w = 1 − (ℓ − ℓ_min) / (ℓ_max − ℓ_min) (0 in a group of equal lengths), less the
    group's mean of w, times ``weight``, is added. The shortest thoughts, and the shortest answer, of the group get
    ``bonus`` if their base reward reaches the ``percentile`` of the group's base rewards.

    Paper: arXiv:2512.20848 (Nemotron 3 Nano), RLHF: group-relative length control.
    Where the paper is open, we read: the bonus goes to the shortest of all if it is good enough, not to the shortest of
    the good ones; equally short ones all get it; the percentile is interpolated linearly. A row's tokens are split
    between thoughts and answer by their characters. A completion without ``</think>`` in a group where another has one
    is unfinished: all of it is thoughts, and its answer counts as long as the longest and is never the shortest. In a
    group without any ``</think>``, all is answer.

    Args:
        weight: λ. bonus: of the shortest. percentile: 0 to 100.
        think_tag: name of the tag of the thoughts.
    """

    def __init__(self, weight: float = 0.5, bonus: float = 0.5, percentile: float = 80.0, think_tag: str = "think"):
        if not 0 <= percentile <= 100:
            raise ConfigError(f"group_length_control: percentile is between 0 and 100, not {percentile}")
        self.weight, self.bonus, self.percentile, self.tag = weight, bonus, percentile, f"</{think_tag}>"

    def __call__(self, rewards: torch.Tensor, groups: Groups) -> torch.Tensor:
        """New rewards (P, G)."""
        out = rewards.clone()
        for number, group in enumerate(groups):
            keep = [i for i in range(len(group)) if not bool(rewards[number, i].isnan())]
            if keep:
                out[number, keep] += self._added(rewards[number, keep], [group[i] for i in keep])
        return out

    def _added(self, base: torch.Tensor, rows: Sequence[ScoredRow]) -> torch.Tensor:
        good = base >= torch.quantile(base, self.percentile / 100)
        thoughts, answers, whole = self._lengths(rows)
        added = torch.zeros_like(base)
        for lengths, counts in ((thoughts, [True] * len(rows)), (answers, whole)):
            if not lengths:
                continue
            length, counted = torch.tensor(lengths).to(base), torch.tensor(counts, device=base.device)
            least, most = length.min(), length.max()
            w = 1 - (length - least) / (most - least) if most > least else torch.zeros_like(length)
            added += self.weight * (w - w.mean())
            shortest = counted & (length == length[counted].min()) if bool(counted.any()) else counted
            added += self.bonus * (shortest & good)
        return added

    def _lengths(self, rows: Sequence[ScoredRow]) -> tuple[list[float], list[float], list[bool]]:
        """Tokens of thoughts (empty where nobody thinks) and of answers, and which answers are there."""
        ends = [row.text.rfind(self.tag) for row in rows]
        if max(ends) < 0:
            return [], [float(row.tokens) for row in rows], [True] * len(rows)
        thoughts, answers = [], []
        for row, end in zip(rows, ends, strict=True):
            share = (end + len(self.tag)) / len(row.text) if end >= 0 else 1.0
            thoughts.append(row.tokens * share)
            answers.append(row.tokens * (1 - share) if end >= 0 else None)
        longest = max(answer for answer in answers if answer is not None)
        return (
            thoughts,
            [longest if answer is None else answer for answer in answers],
            [answer is not None for answer in answers],
        )
