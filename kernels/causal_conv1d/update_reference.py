"""One step of the causal convolution in plain PyTorch: the specification, and what runs where gradients are wanted."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bestiary.kernels.backends.library import needs_grad
from bestiary.kernels.state_update.rows import read_rows, write_rows


def causal_conv1d_update_ref(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`bestiary.kernels.causal_conv1d_update`; arguments are taken as checked."""
    W, room = weight.shape[1], conv_state.shape[2]
    with torch.autocast(x.device.type, enabled=False):
        work = torch.promote_types(x.dtype, torch.float32)
        keep = needs_grad(x, conv_state, weight, bias)
        state, real = read_rows(conv_state, conv_state_indices, torch.promote_types(conv_state.dtype, work), keep)
        x_BDS = (x[..., None] if x.ndim == 2 else x).to(work)
        S = x_BDS.shape[2]
        if cache_seqlens is None:
            past = state[..., room - (W - 1) :]
            new = torch.cat([state, x_BDS.to(state.dtype)], 2)[..., -room:] if room else state
        else:
            # A ring: the input of step t stands at t % room. Of more new inputs than there is room the last stay.
            seen_B1 = cache_seqlens.long()[:, None]
            back = torch.arange(-(W - 1), 0, device=x.device)
            past = state.gather(2, _columns((seen_B1 + back) % room, state)) if W > 1 else state[..., :0]
            last = min(S, room)
            ahead = torch.arange(S - last, S, device=x.device)
            columns = _columns((seen_B1 + ahead) % room, state)
            new = state.scatter(2, columns, x_BDS[..., S - last :].to(state.dtype))
        padded = torch.cat([past.to(work), x_BDS], 2)
        out = F.conv1d(
            padded, weight.to(work)[:, None], None if bias is None else bias.to(work), groups=weight.shape[0]
        )
        if activation is not None:
            out = F.silu(out)
        if real is not None:
            out = out.masked_fill(~real[:, None, None], 0)
        write_rows(conv_state, new, conv_state_indices, real)
        return (out[..., 0] if x.ndim == 2 else out).to(x.dtype)


def _columns(index_BS: torch.Tensor, state_BDR: torch.Tensor) -> torch.Tensor:
    return index_BS[:, None].expand(-1, state_BDR.shape[1], -1)
