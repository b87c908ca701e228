"""One decoding step of a Mamba-2 layer between its projections, in plain PyTorch: the specification.

It is also what runs where gradients are wanted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bestiary.kernels.causal_conv1d.update_reference import causal_conv1d_update_ref
from bestiary.kernels.gated_norm.reference import rms_norm_gated_ref
from bestiary.kernels.state_update.reference import selective_state_update_ref


def mamba2_step_ref(
    zxbcdt: torch.Tensor,
    conv_state: torch.Tensor,
    ssm_state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    norm_weight: torch.Tensor,
    rows: torch.Tensor | None,
    ngroups: int,
    eps: float,
    dt_limit: tuple[float, float],
) -> torch.Tensor:
    """See :func:`bestiary.kernels.mamba2_step`; arguments are taken as checked."""
    H, P, N = ssm_state.shape[1:]
    inner, maps = H * P, ngroups * N
    with torch.autocast(zxbcdt.device.type, enabled=False):
        work = torch.promote_types(torch.promote_types(zxbcdt.dtype, ssm_state.dtype), torch.float32)
        z, xBC, dt = zxbcdt.to(work).split([inner, inner + 2 * maps, H], -1)
        xBC = causal_conv1d_update_ref(
            xBC, conv_state.transpose(1, 2), conv_weight, conv_bias, "silu", conv_state_indices=rows
        )
        x, B, C = xBC.split([inner, maps, maps], -1)
        d = F.softplus(dt + dt_bias.to(work)).clamp(*dt_limit)
        y = selective_state_update_ref(
            ssm_state,
            x.unflatten(-1, (H, P)),
            d[..., None].expand(-1, -1, P),
            A[:, None, None].expand(-1, P, N),
            B.unflatten(-1, (ngroups, N)),
            C.unflatten(-1, (ngroups, N)),
            D[:, None].expand(-1, P),
            state_batch_indices=rows,
        )
        out = rms_norm_gated_ref(y.flatten(1), norm_weight, z, eps, inner // ngroups, norm_before_gate=False)
        if rows is not None:  # a gate that is not a number would show in the zeros of padding
            out = out.masked_fill((rows < 0)[:, None], 0)
        return out.to(zxbcdt.dtype)
