"""The adaptive scan Mamba block: tokens are scored, sorted by score, mixed by Mamba, and put back.

Shape legend: B batch, L tokens, D channels, G score groups.

Paper: arXiv:2508.07237, abstract (scan order from group commonality plus individual variation); every formula is
from the official code.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from bestiary.kernels import argsort_order, gather_tokens, invert_order
from bestiary.shared.nn.mamba import MambaStack, SlicedMamba
from bestiary.shared.nn.mixers import from_tokens, run_stack, to_tokens


class IndividualScore(nn.Module):
    """The score of each token in its own image: ``sigmoid(Linear(SlicedMamba(ReLU(LayerNorm(X)))))``.

    Args:
        dim: D.
        num_slices: slices of the third branch.
        **options: d_state, d_conv and expand, as :class:`~bestiary.shared.nn.mamba.Mamba`.
    """

    def __init__(self, dim: int, num_slices: int = 5, **options) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mamba = SlicedMamba(dim, num_slices, **options)
        self.head = nn.Linear(dim, 1)

    def forward(self, tokens_BLD: torch.Tensor) -> torch.Tensor:
        """(B, L, D) to (B, L) in (0, 1), float32 or wider."""
        mixed = self.mamba(F.relu(self.norm(tokens_BLD)))
        with torch.autocast(mixed.device.type, enabled=False):
            # half precision has so few values in (0, 1) that most tokens would tie and keep raster order
            work = torch.promote_types(mixed.dtype, torch.float32)
            bias = self.head.bias.to(work)
            return torch.sigmoid(F.linear(mixed.to(work), self.head.weight.to(work), bias))[..., 0]


class AdaptiveScanMamba(nn.Module):
    """The ASM block.

    1. individual score ``s_ind`` (B, L) of each image, from :class:`IndividualScore`;
    2. group scores ``s_g`` (L): G free vectors, interpolated linearly to L tokens, then sigmoid;
    3. ``a_g = s_g + s_ind``; the order of group g sorts tokens by ``a_g``, ascending and stable;
    4. the score is appended as channel D + 1, and tokens are gathered in that order;
    5. a stack of ``depth`` Mamba layers (:class:`~bestiary.shared.nn.mamba.MambaLayer`), one for all groups or
       one per group;
    6. tokens are put back, averaged over groups, and projected: ``LayerNorm(Linear(mean))``.

    The sort has no gradient; scores learn through the appended channel alone. The block replaces its input: there
    is no residual round it unless asked for.

    Paper: arXiv:2508.07237; formulas from the official code. Differs from the official code: any number of tokens
    (there, ``num_slices`` must divide it); a stable sort; the score in float32 under autocast; with a stack per
    group, each group's recomputed gradient uses its own stack (there, the last group's); no parameters that are
    never used.

    Args:
        dim: D.
        spatial_dims: 2 or 3, None to accept either.
        num_groups: G.
        group_length: length of each free vector.
        num_slices: slices of the score's third branch.
        d_state: states per channel of every Mamba.
        d_conv: width of every Mamba's convolution.
        expand: inner width over outer width of every Mamba.
        depth: layers of the stack.
        per_group_stack: a stack for each group (the official "lmls" mode) instead of one for all.
        residual: add the input to the output.
        checkpoint: in training, recompute the stacks in the backward pass instead of keeping their activations
            (the official code always does).
        fused: leave the tokens where they stand and let convolution and scan walk by the order, which all else in the
            stack commutes with; the result is the same, to rounding, as gathering the tokens and putting them back.

    Raises:
        ValueError: if a number is not positive.
    """

    gives_orders = True
    """Says that ``forward`` takes ``return_orders``."""

    def __init__(
        self,
        dim: int,
        spatial_dims: int | None = None,
        num_groups: int = 3,
        group_length: int = 2048,
        num_slices: int = 5,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        depth: int = 2,
        per_group_stack: bool = False,
        residual: bool = False,
        checkpoint: bool = False,
        fused: bool = True,
    ) -> None:
        super().__init__()
        if min(dim, num_groups, group_length, depth) < 1:
            raise ValueError("dim, num_groups, group_length and depth must be positive")
        self.dim, self.spatial_dims, self.num_groups = dim, spatial_dims, num_groups
        self.per_group_stack, self.residual, self.checkpoint = per_group_stack, residual, checkpoint
        self.fused = fused
        options = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        self.score = IndividualScore(dim, num_slices, **options)
        self.group_scores = nn.Parameter(torch.randn(num_groups, group_length))
        stacks = num_groups if per_group_stack else 1
        self.stacks = nn.ModuleList(MambaStack(dim + 1, depth, **options) for _ in range(stacks))
        self.proj = nn.Linear(dim + 1, dim)
        self.proj_norm = nn.LayerNorm(dim)

    def scores(self, tokens_BLD: torch.Tensor) -> torch.Tensor:
        """The adaptive scores (G, B, L), each in (0, 2)."""
        individual_BL = self.score(tokens_BLD)
        length = tokens_BLD.shape[1]
        stretched = F.interpolate(self.group_scores[None], size=length, mode="linear", align_corners=True)[0]
        return torch.sigmoid(stretched)[:, None] + individual_BL

    def forward(self, x: torch.Tensor, return_orders: bool = False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Mix the tokens of x.

        Args:
            x: (B, L, D), (B, D, H, W) or (B, D, Z, H, W); spatial axes are flattened in raster order.
            return_orders: also return the scan orders.

        Returns:
            A tensor of the shape of x; with ``return_orders`` a pair of it and the orders (G, B, L) int64.

        Raises:
            ValueError: if the shape does not fit.
        """
        tokens_BLD, spatial = to_tokens(x, self.dim, self.spatial_dims)
        scores_GBL = self.scores(tokens_BLD)
        orders_GBL = argsort_order(scores_GBL)
        mix = self._mix_in_place if self.fused else self._mix_gathered
        mean_BLD = mix(tokens_BLD, scores_GBL, orders_GBL)

        out_BLD = self.proj_norm(self.proj(mean_BLD))
        out = from_tokens(tokens_BLD + out_BLD if self.residual else out_BLD, spatial)
        return (out, orders_GBL) if return_orders else out

    def _mix_in_place(
        self, tokens_BLD: torch.Tensor, scores_GBL: torch.Tensor, orders_GBL: torch.Tensor
    ) -> torch.Tensor:
        """Steps 4 to 6 up to the mean, (B, L, D + 1), on tokens in image order."""
        recompute = self.checkpoint and self.training
        share = self.num_groups // len(self.stacks)
        parts = zip(self.stacks, scores_GBL.split(share), orders_GBL.split(share), strict=True)
        mixed = [
            run_stack(partial(_run_scored, stack), tokens_BLD, scores, orders, recompute=recompute)
            for stack, scores, orders in parts
        ]
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed)).mean(0)

    def _mix_gathered(
        self, tokens_BLD: torch.Tensor, scores_GBL: torch.Tensor, orders_GBL: torch.Tensor
    ) -> torch.Tensor:
        """The same as the official code does it: gather, mix, put back."""
        G, B, L = scores_GBL.shape
        # group-major on the batch axis: row g * B + b
        order = orders_GBL.reshape(G * B, L)
        inverse = invert_order(order)
        scored = torch.cat([tokens_BLD.expand(G, -1, -1, -1), scores_GBL[..., None]], dim=-1)
        sorted_tokens = gather_tokens(scored.flatten(0, 1), order, inverse)
        recompute = self.checkpoint and self.training
        if self.per_group_stack:
            parts = zip(self.stacks, sorted_tokens.chunk(G), strict=True)
            mixed = torch.cat([run_stack(stack, part, recompute=recompute) for stack, part in parts])
        else:
            mixed = run_stack(self.stacks[0], sorted_tokens, recompute=recompute)
        restored = gather_tokens(mixed, inverse, order)
        return restored.unflatten(0, (G, B)).mean(0)


def _run_scored(
    stack: MambaStack, tokens_BLD: torch.Tensor, scores_GBL: torch.Tensor, orders_GBL: torch.Tensor
) -> torch.Tensor:
    """A stack over the tokens of several groups, which differ in the score channel alone; (G, B, L, D + 1).

    The first Linear is ``W [x; s] = W_x x + w_s s``: the large part is computed once for all groups.
    """
    G = len(scores_GBL)
    scored = torch.cat([tokens_BLD.expand(G, -1, -1, -1), scores_GBL[..., None]], dim=-1).flatten(0, 1)
    first, projected = stack.layers[0].get_submodule("linear"), None
    if type(first) is nn.Linear:  # not one that was quantised or given an adapter: those are more than their weight
        D = tokens_BLD.shape[-1]
        shared = F.linear(tokens_BLD, first.weight[:, :D], first.bias)
        projected = (shared + scores_GBL[..., None] * first.weight[:, D]).flatten(0, 1)
    return stack(scored, orders_GBL.flatten(0, 1), projected).unflatten(0, (G, -1))


class AdaptiveScan:
    """The TokenMixer that gives every wide level an :class:`AdaptiveScanMamba`.

    Args:
        min_channels: a level has a block when its channels exceed this number (strictly).
        num_groups: as :class:`AdaptiveScanMamba`, like all that follow.
        group_length: see there.
        num_slices: see there.
        d_state: see there.
        d_conv: see there.
        expand: see there.
        depth: see there.
        per_group_stack: see there.
        residual: see there.
        checkpoint: see there.
        fused: see there.
    """

    def __init__(
        self,
        min_channels: int = 64,
        num_groups: int = 3,
        group_length: int = 2048,
        num_slices: int = 5,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        depth: int = 2,
        per_group_stack: bool = False,
        residual: bool = False,
        checkpoint: bool = False,
        fused: bool = True,
    ) -> None:
        self.min_channels = min_channels
        self.options = {
            "num_groups": num_groups,
            "group_length": group_length,
            "num_slices": num_slices,
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "depth": depth,
            "per_group_stack": per_group_stack,
            "residual": residual,
            "checkpoint": checkpoint,
            "fused": fused,
        }

    def build(self, dim: int, spatial_dims: int, level: int) -> AdaptiveScanMamba | None:
        """The block of one level, or None where the level is too narrow."""
        return AdaptiveScanMamba(dim, spatial_dims, **self.options) if dim > self.min_channels else None
