"""The norm before each layer and at the end."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from bestiary.kernels import rms_norm_gated

SMALL = 2**14
"""Numbers up to which torch's norm is the quicker one where no gradient is wanted."""


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
        # On a CPU torch's own is ten operations, each over all of the input; our op is one, which costs more to call.
        if x.is_cpu and (torch.is_grad_enabled() or x.numel() > SMALL):
            return rms_norm_gated(x, self.weight, None, self.eps)
        weight, work = self.weight, torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(work), weight.shape, weight.to(work), self.eps).to(x.dtype)
