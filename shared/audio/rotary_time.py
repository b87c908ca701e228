"""Rotary time embedding: audio tokens are turned by their time in the clip, once, before the projector."""

from __future__ import annotations

import math

import torch
from torch import nn

from bestiary.shared.core.errors import ConfigError


class RotaryTime(nn.Module):
    """Rotates pairs of adjacent channels of audio tokens by angles that grow with absolute time.

    With f_k = theta^(-2k / D), D = int(share · width), each repeated twice, a token at place p of window w at time t
    has the angles -2 pi t · (w / P · f, 2 pi p / P · f): 2 D channels are turned, the others pass. Because the time
    multiplies a position, the angle grows with the square of time.

    Paper: arXiv:2511.10289 (Music Flamingo), the section on the rotary time embedding.
    Differs from paper: there the token index of the rotary embedding is replaced by time; this is the axial form of the
    released checkpoint, in its order of float32 operations, so that long clips round as they do there.

    Args:
        width: channels of a token.
        theta: the base.
        share: share of the channels that each of the two axes turns.
        positions: P.
        step_seconds: seconds between tokens. tokens_per_window: tokens of a whole window.

    Raises:
        ConfigError: if two axes do not fit into the width, or a window has more tokens than there are positions.
    """

    def __init__(
        self,
        width: int,
        theta: float = 1200.0,
        share: float = 0.2,
        positions: int = 1200,
        step_seconds: float = 0.04,
        tokens_per_window: int = 750,
    ):
        super().__init__()
        self.width, self.theta, self.positions = width, theta, positions
        self.dim = int(width * share)
        self.step_seconds, self.tokens_per_window = step_seconds, tokens_per_window
        if not 0 < 4 * math.ceil(self.dim / 2) <= width:
            raise ConfigError(f"rotary time: share {share} of {width} channels leaves no room for two axes")
        if tokens_per_window > positions:
            raise ConfigError(f"rotary time: a window has {tokens_per_window} tokens, more than {positions} positions")

    def angles(self, window: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """(N, 2 D) float32 angles of tokens by the number of their window and their place in it, both (N,)."""
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device=window.device) / self.dim
        frequency = 1.0 / (self.theta**exponent)
        seconds = window.float() * self.tokens_per_window * self.step_seconds + place.float() * self.step_seconds
        by_window = (window.float() / self.positions)[:, None] * frequency
        by_place = (place.float() / self.positions * (2 * math.pi))[:, None] * frequency
        both = torch.cat([by_window.repeat_interleave(2, -1), by_place.repeat_interleave(2, -1)], -1)
        return both * (-seconds * 2 * math.pi)[:, None]

    def forward(self, tokens: torch.Tensor, window: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Rotate.

        Args:
            tokens: (N, width).
            window: (N,) the number of each token's window in its clip.
            place: (N,) its place in the window.

        Returns:
            (N, width), the dtype unchanged; the rotation is computed in float64 (float32 on MPS).
        """
        kind = torch.float32 if tokens.device.type == "mps" else torch.float64
        with torch.no_grad():
            angles = self.angles(window, place)
            cos, sin = angles.cos().to(kind), angles.sin().to(kind)
        size = cos.shape[-1]
        turned = tokens[..., :size].to(kind)
        even, odd = turned[..., 0::2], turned[..., 1::2]
        across = torch.stack([-odd, even], -1).flatten(-2)
        return torch.cat([(turned * cos + across * sin).to(tokens.dtype), tokens[..., size:]], -1)
