"""The MLP layer ``-``: squared ReLU, no gate."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """``relu(x)^2``. Paper: arXiv:2109.08668."""
    return F.relu(x).square()


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
