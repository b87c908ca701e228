"""Gathering tokens in a scan order, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch


class _Permute(torch.autograd.Function):
    """Rows by index, with the inverse as gradient.

    Plain indexing would be as right, but its gradient adds row by row into zeros; a permutation needs no adding.
    The gradient is this function again, so it can be differentiated any number of times.
    """

    @staticmethod
    def forward(ctx: Any, x_BLD: torch.Tensor, order_BL: torch.Tensor, inverse_BL: torch.Tensor | None):
        ctx.save_for_backward(order_BL, inverse_BL)
        rows = torch.arange(x_BLD.shape[0], device=x_BLD.device)[:, None]
        return x_BLD[rows, order_BL]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        order_BL, inverse_BL = ctx.saved_tensors
        if inverse_BL is None:
            steps = torch.arange(order_BL.shape[1], device=order_BL.device).expand_as(order_BL)
            inverse_BL = torch.empty_like(order_BL).scatter_(1, order_BL, steps)
        return _Permute.apply(grads[0], inverse_BL, order_BL), None, None


def gather_tokens_ref(
    x_BLD: torch.Tensor, order_BL: torch.Tensor, inverse_BL: torch.Tensor | None = None
) -> torch.Tensor:
    """See :func:`bestiary.kernels.gather_tokens`; arguments are taken as checked."""
    inverse = None if inverse_BL is None else inverse_BL.long()
    out: Any = _Permute.apply(x_BLD, order_BL.long().contiguous(), inverse)
    return out
