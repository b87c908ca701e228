"""The gated RMS norm in plain PyTorch: the specification, and what is differentiated twice."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm_gated_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> torch.Tensor:
    """See :func:`bestiary.kernels.rms_norm_gated`; arguments are taken as checked."""
    channels = x.shape[-1]
    size = group_size or channels
    with torch.autocast(x.device.type, enabled=False):
        work = torch.promote_types(x.dtype, torch.float32)
        y = x.to(work)
        gate = None if z is None else F.silu(z.to(work))
        if gate is not None and not norm_before_gate:
            y = y * gate
        groups = y.unflatten(-1, (channels // size, size))
        y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2)
        y = y * weight.to(work)
        if gate is not None and norm_before_gate:
            y = y * gate
        return y.to(x.dtype)
