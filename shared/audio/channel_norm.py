"""Channels of audio tokens, standardised by what they are on training clips."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F


class ChannelNorm(nn.Module):
    """Takes from each channel its mean over the tokens of some training clips, and divides by its deviation.

    What a pretrained encoder says of any clip has a large part that is the same for all of them, and a fresh projector
    must first learn to see past it. Mean and variance are found once, before training, and never move: a clip's tokens
    depend neither on what it is batched with nor on the step. Meant for frozen encoders: one that learns drifts away
    from what was found.

    Args:
        width: channels.
        eps: added to the variance.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    fitted: torch.Tensor

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, width) to the same; before :meth:`fit` it changes nothing but for ``eps``."""
        return F.batch_norm(tokens, self.mean, self.variance, eps=self.eps)

    @torch.no_grad()
    def fit(self, clips: Iterable[torch.Tensor]) -> None:
        """Find mean and variance over all tokens of the clips; a second call changes nothing.

        Args:
            clips: tokens (n, width) of each; none at all leaves everything as it is.
        """
        if self.fitted:
            return
        tokens = list(clips)
        if sum(map(len, tokens)) > 1:
            variance, mean = torch.var_mean(torch.cat(tokens).double(), 0)
            self.mean.copy_(mean)
            self.variance.copy_(variance)
            self.fitted.fill_(True)
