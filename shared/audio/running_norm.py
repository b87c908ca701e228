"""Channels of audio tokens, standardised by what training has shown of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class RunningNorm(nn.Module):
    """Takes from each channel its mean over the tokens of training, and divides by its deviation.

    What a pretrained encoder says of any clip has a large part that is the same for all of them, and a fresh projector
    must first learn to see past it. Mean and variance are averages over those of all training batches so far, on all
    processes. They move after an optimiser step, not in the forward pass: a clip's tokens do not depend on what it is
    batched with, and a rollout of GRPO sees the same ones as the update on it. Only the very first step, before which
    there are none, takes its own. Meant for frozen encoders: what an encoder that still learns said long ago counts as
    much as what it says now.

    Args:
        width: channels.
        eps: added to the variance.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    batches: torch.Tensor
    fresh: torch.Tensor
    fresh_batches: torch.Tensor

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        # Sums of means and variances of the batches since the last optimiser step.
        self.register_buffer("fresh", torch.zeros(2, width), persistent=False)
        self.register_buffer("fresh_batches", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, width) to the same; before any training it changes nothing but for ``eps``."""
        mean, variance = self.mean, self.variance
        # A single token has no variance.
        if self.training and len(tokens) > 1:
            with torch.no_grad():
                own_variance, own_mean = torch.var_mean(tokens, 0)
                self.fresh += torch.stack([own_mean, own_variance])
                self.fresh_batches += 1
                first = self.batches == 0
                mean = torch.where(first, self.fresh[0] / self.fresh_batches, mean)
                variance = torch.where(first, self.fresh[1] / self.fresh_batches, variance)
        return F.batch_norm(tokens, mean, variance, eps=self.eps)

    @torch.no_grad()
    def after_step(self, applied: bool) -> dict[str, float]:
        """Take in the batches of all processes since the last optimiser step.

        Args:
            applied: false for a step that was skipped: its batches are left out.
        """
        fresh, count = self.fresh.clone(), self.fresh_batches.clone()
        self.fresh.zero_()
        self.fresh_batches.zero_()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(fresh)
            torch.distributed.all_reduce(count)
        if applied and count > 0:
            self.batches += count
            self.mean += (fresh[0] - count * self.mean) / self.batches
            self.variance += (fresh[1] - count * self.variance) / self.batches
        return {}
