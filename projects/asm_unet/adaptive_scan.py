"""The adaptive scan Mamba block: tokens are scored, sorted by score, mixed by Mamba, and put back.

Shape legend: B batch, L tokens, D channels, G score groups.

Paper: arXiv:2508.07237, abstract (scan order from group commonality plus individual variation); every formula is
from the official code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from bestiary.kernels import argsort_order, gather_tokens, invert_order
from bestiary.shared.nn.mamba import MambaStack, SlicedMamba
from bestiary.shared.nn.mixers import WideLevels, from_tokens, random_order, run_stack, to_tokens

ScoreTerms = Literal["both", "individual", "group"]
Order = Literal["score", "raster", "random"]


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
        score_terms: what the score is made of: ``both``, the ``individual`` term alone (the groups then do not
            differ, so num_groups must be 1) or the ``group`` term alone (every image is then walked alike).
        order: by the ``score``; or, as controls, in ``raster`` order, or in one fixed ``random`` order a group.
        score_channel: append the score to the tokens. Without it, the channel holds zeros and nothing could train the
            scores: they are buffers, as they were initialised. The order is then in effect that of the group scores,
            since the individual ones hardly vary.

    Attributes:
        transplant: None, or what replaces the orders (G, B, L) by others of that shape before the scan; for
            experiments on trained weights, see :mod:`bestiary.projects.asm_unet.orders`.

    Raises:
        ValueError: if a number is not positive or an option does not exist.
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
        score_terms: ScoreTerms = "both",
        order: Order = "score",
        score_channel: bool = True,
    ) -> None:
        super().__init__()
        if min(dim, num_groups, group_length, depth) < 1:
            raise ValueError("dim, num_groups, group_length and depth must be positive")
        for name, value, known in (("score_terms", score_terms, ScoreTerms), ("order", order, Order)):
            if value not in get_args(known):
                raise ValueError(f"{name} is one of {', '.join(get_args(known))}, not {value!r}")
        if score_terms == "individual" and num_groups > 1:
            raise ValueError("without the group term the groups do not differ: num_groups must be 1")
        self.dim, self.spatial_dims, self.num_groups = dim, spatial_dims, num_groups
        self.per_group_stack, self.residual, self.checkpoint = per_group_stack, residual, checkpoint
        self.fused = fused
        self.order, self.score_channel = order, score_channel
        changed = [f"{score_terms} score"] if score_terms != "both" else []
        changed += [f"{order} order"] if order != "score" else []
        changed += [] if score_channel else ["no score channel"]
        self.report_name = ", ".join(changed) or "ASM-UNet"
        self.transplant: Callable[[torch.Tensor], torch.Tensor] | None = None
        options: dict[str, Any] = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        individual, group = score_terms != "group", score_terms != "individual"
        self.score = IndividualScore(dim, num_slices, **options) if individual else None
        self.group_scores = nn.Parameter(torch.randn(num_groups, group_length)) if group else None
        if not score_channel:
            # No gradient can reach them, and distributed training would wait for one.
            for module in self.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    delattr(module, name)
                    module.register_buffer(name, parameter.detach())
        stacks = num_groups if per_group_stack else 1
        self.stacks = nn.ModuleList(MambaStack(dim + 1, depth, **options) for _ in range(stacks))
        self.proj = nn.Linear(dim + 1, dim)
        self.proj_norm = nn.LayerNorm(dim)

    def score_parts(self, tokens_BLD: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The terms of the score: individual (B, L) and group (G, L), each in (0, 1); None for one there is not."""
        individual_BL = None if self.score is None else self.score(tokens_BLD)
        if self.group_scores is None:
            return individual_BL, None
        length = tokens_BLD.shape[1]
        stretched = F.interpolate(self.group_scores[None], size=length, mode="linear", align_corners=True)[0]
        return individual_BL, torch.sigmoid(stretched)

    def scores(self, tokens_BLD: torch.Tensor) -> torch.Tensor:
        """The adaptive scores (G, B, L), each in (0, 2)."""
        individual_BL, group_GL = self.score_parts(tokens_BLD)
        if group_GL is None:
            assert individual_BL is not None
            return individual_BL.expand(self.num_groups, -1, -1)
        if individual_BL is None:
            return group_GL[:, None].expand(-1, len(tokens_BLD), -1)
        return group_GL[:, None] + individual_BL

    def orders(self, scores_GBL: torch.Tensor) -> torch.Tensor:
        """The scan orders (G, B, L) int64 that these scores give."""
        G, B, L = scores_GBL.shape
        if self.order == "raster":
            return torch.arange(L, device=scores_GBL.device).expand(G, B, L)
        if self.order == "random":
            return random_order(G, L).to(scores_GBL.device)[:, None].expand(G, B, L)
        return argsort_order(scores_GBL)

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
        orders_GBL = self.orders(scores_GBL)
        if self.transplant is not None:
            orders_GBL = self.transplant(orders_GBL)
        if not self.score_channel:
            scores_GBL = torch.zeros_like(scores_GBL)
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
    stack: nn.Module, tokens_BLD: torch.Tensor, scores_GBL: torch.Tensor, orders_GBL: torch.Tensor
) -> torch.Tensor:
    """A stack over the tokens of several groups, which differ in the score channel alone; (G, B, L, D + 1).

    The first Linear is ``W [x; s] = W_x x + w_s s``: the large part is computed once for all groups.
    """
    assert isinstance(stack, MambaStack)
    G = len(scores_GBL)
    scored = torch.cat([tokens_BLD.expand(G, -1, -1, -1), scores_GBL[..., None]], dim=-1).flatten(0, 1)
    first, projected = stack.layers[0].get_submodule("linear"), None
    if type(first) is nn.Linear:  # not one that was quantised or given an adapter: those are more than their weight
        D = tokens_BLD.shape[-1]
        shared = F.linear(tokens_BLD, first.weight[:, :D], first.bias)
        projected = (shared + scores_GBL[..., None] * first.weight[:, D]).flatten(0, 1)
    return stack(scored, orders_GBL.flatten(0, 1), projected).unflatten(0, (G, -1))


class AdaptiveScan(WideLevels):
    """The TokenMixer that gives every wide level an :class:`AdaptiveScanMamba`.

    Its options are ``min_channels`` and those of the block, see :class:`~bestiary.shared.nn.mixers.WideLevels`.
    """

    block = AdaptiveScanMamba
