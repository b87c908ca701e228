"""Whisper's audio encoder, and AF-Whisper's: log-mel windows to tokens.

Shapes: W windows, M mel bins, T frames, P positions after the convolutions, D width, N tokens of all windows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bestiary.shared.audio.mel import TAIL, LogMel
from bestiary.shared.core.errors import BadDataError, ConfigError


class WhisperEncoder(nn.Module):
    """Two convolutions (the second of stride 2), a table of positions, pre-norm layers, and a last norm.

    With ``pool=2`` the tokens are averaged two by two before the last norm, as AF-Whisper does; with 1 it is Whisper's
    encoder. Windows of equal length go through together and no longer than they are, so there is no padding to mask,
    and a clip's tokens do not depend on what it is batched with.

    Paper: arXiv:2212.04356 (Whisper); the pool is that of arXiv:2507.08128 (Audio Flamingo 3).

    Args:
        front_end: what makes the windows.
        width: D. layers, heads, ffn: of the stack.
        pool: how many tokens in a row are averaged into one; those left over at the end of a window are dropped.
        recompute: keep only each layer's input for the backward pass, and compute the rest again.

    Attributes:
        out_dim: D. step_seconds: seconds between tokens. tokens_per_window: tokens of a whole window.

    Raises:
        ConfigError: if the heads do not divide the width, or for a pool that is no number of 1 or more.
    """

    def __init__(
        self,
        front_end: LogMel | None = None,
        width: int = 1280,
        layers: int = 32,
        heads: int = 20,
        ffn: int = 5120,
        pool: int = 2,
        recompute: bool = False,
    ):
        super().__init__()
        if width % heads:
            raise ConfigError(f"encoder.heads={heads} does not divide encoder.width={width}")
        # A bool would pass as 0 or 1.
        if isinstance(pool, bool) or pool < 1:
            raise ConfigError(f"encoder.pool={pool}: give how many tokens are averaged into one; 1 averages none")
        self.front_end = front_end or LogMel()
        self.out_dim, self.pool, self.recompute = width, pool, recompute
        self.conv1 = nn.Conv1d(self.front_end.n_mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        positions = self.front_end.frames // 2
        self.embed_positions = Positions(positions, width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, ffn) for _ in range(layers))
        self.layer_norm = nn.LayerNorm(width)
        self.tokens_per_window: int = self.token_counts(self.front_end.frames)
        self.step_seconds = self.front_end.hop / self.front_end.rate * 2 * pool

    def token_counts(self, frames: Any) -> Any:
        """How many tokens so many real frames (a number or a tensor) become; fewer than ``pool`` tokens become none."""
        positions = (frames - 1) // 2 + 1
        return positions // self.pool

    def preprocess(self, raw: tuple[np.ndarray, int]) -> tuple[dict[str, torch.Tensor], int]:
        """Features of one clip.

        Args:
            raw: samples (n,) and their rate; what is beyond the front end's longest is left out, with a warning.

        Returns:
            ``features`` (W, M, T), ``lengths``, ``counts`` and ``window`` (W,): real frames, tokens, and the window's
            number in its clip; and the tokens of the clip.

        Raises:
            BadDataError: for another rate than the front end's, or samples that it cannot take.
        """
        samples, rate = raw
        if rate != self.front_end.rate:
            raise BadDataError(
                f"audio at {rate} Hz, and the front end takes {self.front_end.rate}: resample it where it is read "
                "(dataset.rate)"
            )
        if self.front_end.is_cut(samples.shape[-1]):
            # Without the clip's own length, so that it is said once and not for every clip.
            longest = f"{self.front_end.max_windows * self.front_end.window_seconds:g} s"
            warnings.warn(
                f"clips over {longest} are cut: the encoder hears no more of them (encoder.front_end.max_seconds)",
                stacklevel=2,
            )
        features, lengths = self.front_end(samples)
        counts = self.token_counts(lengths)
        items = {"features": features, "lengths": lengths, "counts": counts, "window": torch.arange(len(lengths))}
        return items, int(counts.sum())

    def forward(self, features: torch.Tensor, lengths: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode windows.

        Args:
            features: (W, M, T), of any float type; they are cast to the weights'.
            lengths: (W,) real frames.

        Returns:
            tokens (N, D), window by window, and counts (W,).
        """
        counts = self.token_counts(lengths)
        starts = counts.cumsum(0) - counts
        parts, places = [], []
        whole = self.front_end.frames
        for length, rows in self._groups(lengths):
            cut = features if self.front_end.fill else features[..., : length + TAIL]
            encoded = self._encode(cut[rows], whole if self.front_end.fill else length)
            encoded = encoded[:, : int(counts[rows[0]])]
            parts.append(encoded.flatten(0, 1))
            places.append((starts[rows][:, None] + torch.arange(encoded.shape[1], device=rows.device)).flatten())
        if not parts:
            return self.conv1.weight.new_zeros(0, self.out_dim), counts
        return torch.cat(parts).index_select(0, torch.cat(places).argsort()), counts

    @staticmethod
    def _groups(lengths: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        for length in lengths.unique().tolist():
            yield length, (lengths == length).nonzero()[:, 0]

    def _encode(self, features: torch.Tensor, length: int) -> torch.Tensor:
        """(w, M, length + tail) to (w, tokens, D)."""
        x = F.gelu(self.conv1(features.to(self.conv1.weight.dtype)))
        x = F.gelu(self.conv2(x))
        positions = (length - 1) // 2 + 1
        x = x[..., :positions].transpose(1, 2) + self.embed_positions.weight[:positions]
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute and self.training else layer(x)
        if self.pool > 1:
            x = x[:, : positions // self.pool * self.pool].unflatten(1, (-1, self.pool)).mean(2)
        return self.layer_norm(x)


class Positions(nn.Module):
    """The table of positions (P, D): sinusoids to begin with, kept with the weights and never trained, as Whisper's."""

    weight: torch.Tensor

    def __init__(self, positions: int, width: int):
        super().__init__()
        self.register_buffer("weight", sinusoids(positions, width))


class EncoderLayer(nn.Module):
    """Attention over all positions, then a GELU MLP, each behind a norm and beside a residual."""

    def __init__(self, width: int, heads: int, ffn: int):
        super().__init__()
        self.self_attn = SelfAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn)
        self.fc2 = nn.Linear(ffn, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(w, P, D) to the same."""
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class SelfAttention(nn.Module):
    """Bidirectional attention; the keys have no bias, as in Whisper."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(w, P, D) to the same."""
        q, k, v = (self._heads(projected) for projected in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def sinusoids(positions: int, width: int) -> torch.Tensor:
    """Whisper's table (positions, width): sines in the first half, cosines in the second, periods 2 pi to 20,000 pi."""
    step = math.log(10000) / (width // 2 - 1)
    angles = torch.arange(positions)[:, None] * torch.exp(-step * torch.arange(width // 2))[None]
    return torch.cat([angles.sin(), angles.cos()], 1)
