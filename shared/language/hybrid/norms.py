"""The norm before each layer and at the end."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from bestiary.kernels import rms_norm_gated


class RMSNorm(nn.Module):
    """Root mean square norm in float32 (float64 for float64), weight included, rounded once at the end.

    Args:
        size: channels. eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) to the same, in the dtype of ``x``."""
        if x.device.type == "cpu":  # where torch's own is ten operations
            return rms_norm_gated(x, self.weight, None, self.eps)
        work = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(work), self.weight.shape, self.weight.to(work), self.eps).to(x.dtype)
