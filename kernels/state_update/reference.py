"""One step of a selective scan in plain PyTorch: the specification, and what runs where gradients are wanted.

Shape legend: B batch, H heads (1 for Mamba-1), P channels of a head, G groups of B and C, N states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bestiary.kernels.backends.library import needs_grad
from bestiary.kernels.state_update.rows import read_rows, write_rows


def selective_state_update_ref(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See :func:`bestiary.kernels.selective_state_update`; arguments are taken as checked."""
    gradient = needs_grad(state, x, dt, A, B, C, D, z, dt_bias)
    with torch.autocast(x.device.type, enabled=False):
        work = torch.promote_types(torch.promote_types(x.dtype, state.dtype), torch.float32)
        old, real = read_rows(state, state_batch_indices, work, keep=gradient)
        one_head = state.ndim == 3
        if one_head:  # (B, D, N) is one head of D channels
            old, x_BHP, dt, A = old[:, None], x[:, None], dt[:, None], A[None]
            D, dt_bias = (None if t is None else t[None] for t in (D, dt_bias))
        else:
            x_BHP = x
        H = x_BHP.shape[1]
        B_BHN, C_BHN = (_per_head(m, H).to(work) for m in (B, C))
        if not gradient and _is_per_head(dt, A, dt_bias):  # one exponential per head instead of P * N
            dt, A, dt_bias = dt[..., :1], A[..., :1, :1], None if dt_bias is None else dt_bias[..., :1]
        d = dt.to(work)
        if dt_bias is not None:
            d = d + dt_bias.to(work)
        if dt_softplus:
            d = F.softplus(d)
        x_BHP = x_BHP.to(work)
        decay = torch.exp(d[..., None] * A.to(work))
        new = old * decay + (d * x_BHP)[..., None] * B_BHN[:, :, None]
        out = (new @ C_BHN[..., None])[..., 0]
        if D is not None:
            out = out + x_BHP * D.to(work)
        if one_head:
            out, new = out[:, 0], new[:, 0]
        if z is not None:
            out = out * F.silu(z.to(work))
        if real is not None:
            out = out.masked_fill(~real.view(-1, *[1] * (out.ndim - 1)), 0)
        write_rows(state, new, state_batch_indices, real)
        return out.to(out_dtype or x.dtype)


def _per_head(m: torch.Tensor, H: int) -> torch.Tensor:
    """(B, N) or (B, G, N) to (B, H, N)."""
    m = m[:, None] if m.ndim == 2 else m
    G = m.shape[1]
    return m if G == H else m[:, :, None].expand(-1, -1, H // G, -1).flatten(1, 2)


def _is_per_head(dt: torch.Tensor, A: torch.Tensor, dt_bias: torch.Tensor | None) -> bool:
    """Whether step and decay are one number per head, expanded to its channels and states."""
    return (
        dt.stride(-1) == 0
        and A.stride(-1) == 0
        and A.stride(-2) == 0
        and (dt_bias is None or dt_bias.stride(-1) == 0)
        and A.numel() > 0
    )
