"""Channels of audio tokens, standardised by what training has shown of them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class RunningNorm(nn.Module):
    """Takes from each channel its mean over the tokens of training, and divides by its deviation.

    What a pretrained encoder says of any clip has a large part that is the same for all of them, and a fresh projector
    must first learn to see past it. Statistics are those of ``BatchNorm1d`` without weights, averaged over all training
    batches so far; unlike there, a training step uses them too, so that a clip's tokens do not depend on what it is
    batched with, and rollouts and updates of GRPO see the same ones. Meant for frozen encoders: what an encoder that
    still learns said long ago counts as much as what it says now. On several processes each has its own batches'.

    Args:
        width: channels.
    """

    def __init__(self, width: int):
        super().__init__()
        self.seen = nn.BatchNorm1d(width, affine=False, momentum=None)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, width) to the same; before any training it changes nothing but for the 1e-5 added to the variance."""
        # A single token has no variance.
        if self.training and len(tokens) > 1:
            with torch.no_grad():
                self.seen(tokens)
        return F.batch_norm(tokens, self.seen.running_mean, self.seen.running_var, eps=self.seen.eps)
