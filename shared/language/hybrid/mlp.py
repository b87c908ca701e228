"""The MLP layer ``-``: squared ReLU, no gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class _SquaredReLU(torch.autograd.Function):
    """Keeps ``x`` alone for the gradient, ``2 relu(x)``; autograd would make more passes and keep ``relu(x)`` twice."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square()  # in place, torch.compile of torch 2.11 gives wrong gradients

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * F.relu(x) * 2


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """``relu(x)^2``. Paper: arXiv:2109.08668."""
    return _SquaredReLU.apply(x)  # type: ignore[return-value]


class MLP(nn.Module):
    """``down(relu(up(x))^2)``.

    Args:
        hidden_size: width outside. intermediate_size: width inside. bias: give both projections one.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to the same."""
        return self.down_proj(squared_relu(self.up_proj(x)))
