"""The state after each of several sequences that are packed in one row."""

from __future__ import annotations

import itertools

import torch

from bestiary.kernels.ssd.reference import step_sizes


def sequence_numbers(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """(1, L) int32: the number of the sequence that each token belongs to."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens.to(cu_seqlens.dtype), right=True).int()[None]


@torch.no_grad()
def varlen_states(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    cu_seqlens: torch.Tensor,
    dt_bias: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    state_dtype: torch.dtype | None,
) -> torch.Tensor:
    """States after the last token of every sequence, without gradient.

    A state is one product: every token of the sequence, decayed to its end, times its input map. So this costs a
    fraction of the scan. Shapes as in :func:`bestiary.kernels.mamba_chunk_scan_combined`, with a batch of one.

    Returns:
        (nseq, H, P, N); zero for an empty sequence. The initial state belongs to the first that is not empty.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    wide = work if x.device.type == "mps" else torch.float64
    _, _, H, P = x.shape
    G, N = B.shape[2:]
    with torch.autocast(x.device.type, enabled=False):
        d_LH = step_sizes(dt[0], dt_bias, dt_softplus, dt_limit, work)
        xd_LHP = x[0].to(work) * d_LH[..., None]
        log_a_LH = d_LH.to(wide) * A.to(wide)
        start = None if initial_states is None else initial_states[0].to(work)
        edges = cu_seqlens.tolist()
        states = []
        for lo, hi in itertools.pairwise(edges):
            if lo == hi:
                states.append(xd_LHP.new_zeros(H, P, N))
                continue
            cs = log_a_LH[lo:hi].cumsum(0)
            kept = (xd_LHP[lo:hi] * (cs[-1] - cs).to(work).exp()[..., None]).unflatten(1, (G, H // G))
            state = torch.einsum("lgep,lgn->gepn", kept, B[0, lo:hi].to(work)).flatten(0, 1)
            if start is not None:
                state, start = state + cs[-1].to(work).exp()[:, None, None] * start, None
            states.append(state)
        return torch.stack(states).to(state_dtype or work)
