"""Token mixers for segmentation nets (``kind: mixer``): what stands at the end of a level of a U-Net."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from bestiary.kernels import cross_orders
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.streams import derive_seed
from bestiary.shared.nn.mamba import BidirectionalMamba, Mamba, MambaStack, SlicedMamba

FixedOrders = Literal["raster", "random", "cross"]
Branches = Literal["one", "two", "sliced"]
_BRANCHES: dict[str, type[Mamba]] = {"one": Mamba, "two": BidirectionalMamba, "sliced": SlicedMamba}


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


class WideLevels:
    """Base of TokenMixers that give every wide level of a net a block of one kind, which a subclass names.

    Its options are those of the block after ``dim`` and ``spatial_dims``, so that they are spelled once; what a config
    says is checked against them.

    Args:
        min_channels: a level has a block when its channels exceed this number (strictly).
        **options: of the block.
    """

    block: ClassVar[type[nn.Module]]

    def __init_subclass__(cls) -> None:
        own = inspect.signature(WideLevels.__init__).parameters["min_channels"]
        _, _, *options = inspect.signature(cls.block).parameters.values()
        cls.__signature__ = inspect.Signature([own, *options])  # type: ignore[attr-defined]

    def __init__(self, min_channels: int = 64, **options: Any) -> None:
        inspect.signature(type(self)).bind(min_channels, **options)  # an option that the block does not have
        self.min_channels, self.options = min_channels, options

    def build(self, dim: int, spatial_dims: int, level: int) -> nn.Module | None:
        """The block of one level, or None where the level is too narrow."""
        return self.block(dim, spatial_dims, **self.options) if dim > self.min_channels else None


class FixedOrderMamba(nn.Module):
    """Mamba over tokens in an order that is fixed beforehand: the controls of the adaptive scan.

    Exactly ASM's block (arXiv:2508.07237, official code) with the order fixed and no score: ``depth`` layers of
    ``U <- LN(U + Mamba(ReLU(LN(Linear(U)))))`` of width dim (ASM's have width dim + 1, for the score) walk the tokens
    in each order, with the same weights; the mean over the orders; then ``LN(Linear(mean))``; no residual round the
    block unless asked for.

    Args:
        dim: channels.
        spatial_dims: 2 or 3, None to accept either.
        order: ``raster`` (last axis fastest); ``random``, :func:`random_order`'s; or ``cross``: every axis fastest in
            turn, forwards and backwards, 4 orders in 2D and 6 in 3D (VMamba's cross scan, arXiv:2401.10166 Sec. 4).
        num_orders: how many ``random`` orders (ASM has 3 groups).
        branches: directions of each Mamba layer: ``one``; ``two``, Vision Mamba's
            :class:`~bestiary.shared.nn.mamba.BidirectionalMamba` (arXiv:2401.09417); or ``sliced``, SegMamba's
            :class:`~bestiary.shared.nn.mamba.SlicedMamba` (arXiv:2401.13560).
        d_state: states per channel.
        d_conv: width of the convolution.
        expand: inner width over dim.
        depth: layers.
        residual: add the input to the output.
        checkpoint: recompute the stack in the backward pass instead of keeping its activations.

    Raises:
        ConfigError: if an option does not exist.
    """

    def __init__(
        self,
        dim: int,
        spatial_dims: int | None = None,
        order: FixedOrders = "raster",
        num_orders: int = 3,
        branches: Branches = "one",
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        depth: int = 2,
        residual: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        for name, value, known in (("order", order, get_args(FixedOrders)), ("branches", branches, tuple(_BRANCHES))):
            if value not in known:
                raise ConfigError(f"{name} of a mixer is one of {', '.join(known)}, not {value!r}")
        if num_orders < 1:
            raise ConfigError(f"num_orders must be 1 or more, not {num_orders}")
        self.dim, self.spatial_dims, self.residual, self.checkpoint = dim, spatial_dims, residual, checkpoint
        self.order, self.num_orders = order, num_orders
        self.stack = MambaStack(dim, depth, _BRANCHES[branches], d_state=d_state, d_conv=d_conv, expand=expand)
        self.proj = nn.Linear(dim, dim)
        self.proj_norm = nn.LayerNorm(dim)
        self.report_name = {"one": f"{order} order", "two": "bidirectional", "sliced": "sliced"}[branches]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, dim, *S) or (B, L, dim) to the same shape; ``cross`` needs the former."""
        tokens_BLD, spatial = to_tokens(x, self.dim, self.spatial_dims)
        recompute = self.checkpoint and self.training
        orders_KL = self._orders(spatial, tokens_BLD.shape[1], tokens_BLD.device)
        if orders_KL is None:
            mixed = run_stack(self.stack, tokens_BLD, recompute=recompute)
        else:
            K, B = len(orders_KL), len(tokens_BLD)
            walks = orders_KL.repeat_interleave(B, 0)
            tokens = tokens_BLD.expand(K, -1, -1, -1).flatten(0, 1)
            mixed = run_stack(self.stack, tokens, walks, recompute=recompute).unflatten(0, (K, B)).mean(0)
        out_BLD = self.proj_norm(self.proj(mixed))
        return from_tokens(tokens_BLD + out_BLD if self.residual else out_BLD, spatial)

    def _orders(self, spatial: tuple[int, ...], length: int, device: torch.device) -> torch.Tensor | None:
        """(K, L) int64, or None for raster order."""
        if self.order == "raster":
            return None
        if self.order == "random":
            return random_order(self.num_orders, length).to(device)
        if not spatial:
            raise ValueError("a cross scan needs features (B, D, *S): tokens alone have no rows and columns")
        return cross_orders(spatial).to(device)


class FixedOrder(WideLevels):
    """The TokenMixer that gives every wide level a :class:`FixedOrderMamba`; see :class:`WideLevels`."""

    block = FixedOrderMamba


class AttentionBlock(nn.Module):
    """Self-attention where ASM-UNet has Mamba: every token sees every other, and there is no order.

    ASM's shell: ``depth`` layers of ``U <- LN(U + MHA(ReLU(LN(Linear(U)))))``, then ``LN(Linear(U))``. Nothing tells a
    token its place but what the convolutions before have put into it. Time and, without a fused kernel, memory grow
    with the square of the number of tokens.

    Paper: arXiv:1706.03762 for the attention; its use here is ours.

    Args:
        dim: channels; num_heads must divide it.
        spatial_dims: 2 or 3, None to accept either.
        num_heads: heads.
        depth: layers.
        residual: add the input to the output.
        checkpoint: recompute the layers in the backward pass instead of keeping their activations.

    Raises:
        ConfigError: if num_heads does not divide dim.
    """

    report_name = "attention"

    def __init__(
        self,
        dim: int,
        spatial_dims: int | None = None,
        num_heads: int = 4,
        depth: int = 2,
        residual: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"attention needs a number of heads that divides the channels: {num_heads} for {dim}")
        self.dim, self.spatial_dims, self.residual, self.checkpoint = dim, spatial_dims, residual, checkpoint
        self.stack = nn.Sequential(*(_AttentionLayer(dim, num_heads) for _ in range(depth)))
        self.proj = nn.Linear(dim, dim)
        self.proj_norm = nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, dim, *S) or (B, L, dim) to the same shape."""
        tokens_BLD, spatial = to_tokens(x, self.dim, self.spatial_dims)
        mixed = run_stack(self.stack, tokens_BLD, recompute=self.checkpoint and self.training)
        out_BLD = self.proj_norm(self.proj(mixed))
        return from_tokens(tokens_BLD + out_BLD if self.residual else out_BLD, spatial)


class _AttentionLayer(nn.Module):
    """``U <- LayerNorm(U + MHA(ReLU(LayerNorm(Linear(U)))))``."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.out_norm = nn.LayerNorm(dim)

    def forward(self, tokens_BLD: torch.Tensor) -> torch.Tensor:
        """(B, L, dim) to (B, L, dim)."""
        inner = torch.relu(self.norm(self.linear(tokens_BLD)))
        return self.out_norm(tokens_BLD + self.attention(inner, inner, inner, need_weights=False)[0])


class Attention(WideLevels):
    """The TokenMixer that gives every wide level an :class:`AttentionBlock`; see :class:`WideLevels`."""

    block = AttentionBlock


@lru_cache(maxsize=64)
def random_order(num_orders: int, length: int) -> torch.Tensor:
    """Fixed random orders (num_orders, length) int64: the same for the same arguments, in every run and process."""
    orders = [
        np.random.default_rng(derive_seed("random order", length, number)).permutation(length)
        for number in range(num_orders)
    ]
    return torch.from_numpy(np.stack(orders))


def run_stack(stack: Callable[..., torch.Tensor], *inputs: torch.Tensor, recompute: bool) -> torch.Tensor:
    """``stack(*inputs)``, recomputed in the backward pass if asked for; the gradients are the same."""
    if recompute and torch.is_grad_enabled():
        out = run_checkpointed(stack, *inputs, use_reentrant=False)
        assert isinstance(out, torch.Tensor)
        return out
    return stack(*inputs)
