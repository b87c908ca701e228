"""Rewards that teach nothing: what a gain must be compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from bestiary.shared.rl.protocols import ScoredRow


class Shuffled:
    """The step's own rewards, dealt to its rows at random: the same mean and spread, and nothing to learn from.

    The deal follows from what the policy said, so that a resumed run deals the same.

    Args:
        seed: of the deal.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed

    def __call__(self, rewards: torch.Tensor, groups: Sequence[Sequence[ScoredRow]]) -> torch.Tensor:
        """(P, G) to the same values in another order."""
        digest = hashlib.blake2b(str(self.seed).encode(), digest_size=8)
        for group in groups:
            for row in group:
                digest.update(row.text.encode("utf-8", "replace") + b"\0")
        draw = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little") >> 1)
        return rewards.flatten()[torch.randperm(rewards.numel(), generator=draw)].view_as(rewards)
