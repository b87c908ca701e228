"""Token mixers for segmentation nets (``kind: mixer``): what stands at the end of a level of a U-Net."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from bestiary.shared.nn.mamba import MambaStack


def to_tokens(x: torch.Tensor, dim: int, spatial_dims: int | None = None) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Flatten (B, D, *S) in raster order (last axis fastest); tokens (B, L, D) pass through.

    Args:
        x: features or tokens. A tensor of three axes is tokens.
        dim: the width D expected.
        spatial_dims: number of spatial axes expected, None for any.

    Returns:
        Tokens (B, L, D), and the spatial shape (empty for tokens).

    Raises:
        ValueError: if the shape does not fit.
    """
    if x.ndim == 3:
        if x.shape[-1] != dim:
            raise ValueError(f"expected tokens (B, L, {dim}), got {tuple(x.shape)}")
        return x, ()
    axes = x.ndim - 2
    if x.ndim not in (4, 5) or x.shape[1] != dim or (spatial_dims is not None and axes != spatial_dims):
        wanted = {2: "(B, {0}, H, W)", 3: "(B, {0}, Z, H, W)"}.get(spatial_dims or 0, "(B, {0}, *S)").format(dim)
        raise ValueError(f"expected features {wanted} or tokens (B, L, {dim}), got {tuple(x.shape)}")
    return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])


def from_tokens(tokens_BLD: torch.Tensor, spatial: tuple[int, ...]) -> torch.Tensor:
    """The inverse of :func:`to_tokens`."""
    if not spatial:
        return tokens_BLD
    return tokens_BLD.transpose(1, 2).reshape(tokens_BLD.shape[0], tokens_BLD.shape[2], *spatial)


class RasterMamba(nn.Module):
    """One-direction Mamba over tokens in raster order: the control of the adaptive scan.

    Exactly ASM's block (arXiv:2508.07237, official code) with the order fixed and no score: tokens in raster order
    (last axis fastest); ``depth`` layers of ``U <- LN(U + Mamba(ReLU(LN(Linear(U)))))`` of width dim (ASM's have
    width dim + 1, for the score); then ``LN(Linear(U))``; no residual round the block unless asked for.

    Args:
        dim: channels.
        spatial_dims: 2 or 3, None to accept either.
        d_state: states per channel.
        d_conv: width of the convolution.
        expand: inner width over dim.
        depth: layers.
        residual: add the input to the output.
        checkpoint: recompute the stack in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        dim: int,
        spatial_dims: int | None = None,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        depth: int = 2,
        residual: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.spatial_dims, self.residual, self.checkpoint = dim, spatial_dims, residual, checkpoint
        self.stack = MambaStack(dim, depth, d_state=d_state, d_conv=d_conv, expand=expand)
        self.proj = nn.Linear(dim, dim)
        self.proj_norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, dim, *S) or (B, L, dim) to the same shape."""
        tokens_BLD, spatial = to_tokens(x, self.dim, self.spatial_dims)
        mixed = run_stack(self.stack, tokens_BLD, recompute=self.checkpoint and self.training)
        out_BLD = self.proj_norm(self.proj(mixed))
        return from_tokens(tokens_BLD + out_BLD if self.residual else out_BLD, spatial)


class Raster:
    """The TokenMixer that gives every wide level a :class:`RasterMamba`.

    Args:
        min_channels: a level has a block when its channels exceed this number (strictly).
        d_state: as :class:`RasterMamba`.
        d_conv: as :class:`RasterMamba`.
        expand: as :class:`RasterMamba`.
        depth: as :class:`RasterMamba`.
        residual: as :class:`RasterMamba`.
        checkpoint: as :class:`RasterMamba`.
    """

    def __init__(
        self,
        min_channels: int = 64,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        depth: int = 2,
        residual: bool = False,
        checkpoint: bool = False,
    ) -> None:
        self.min_channels = min_channels
        self.d_state, self.d_conv, self.expand, self.depth = d_state, d_conv, expand, depth
        self.residual, self.checkpoint = residual, checkpoint

    def build(self, dim: int, spatial_dims: int, level: int) -> RasterMamba | None:
        """The block of one level, or None where the level is too narrow."""
        if dim <= self.min_channels:
            return None
        return RasterMamba(
            dim,
            spatial_dims,
            d_state=self.d_state,
            d_conv=self.d_conv,
            expand=self.expand,
            depth=self.depth,
            residual=self.residual,
            checkpoint=self.checkpoint,
        )


def run_stack(stack: Callable[..., torch.Tensor], *inputs: torch.Tensor, recompute: bool) -> torch.Tensor:
    """``stack(*inputs)``, recomputed in the backward pass if asked for; the gradients are the same."""
    if recompute and torch.is_grad_enabled():
        out = run_checkpointed(stack, *inputs, use_reentrant=False)
        assert isinstance(out, torch.Tensor)
        return out
    return stack(*inputs)
