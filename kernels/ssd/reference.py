"""The state space dual of Mamba-2 in plain PyTorch: the specification, and what runs where nothing else does.

Shape legend: B batch, L steps, Q steps of a chunk, G groups of B and C, E heads of a group (H = G * E), P head
dimension, N states.

Inside a chunk the recurrence is a matrix product, ``Y = ((C B^T) * decay) X``; between chunks one state is carried.
The product C B^T is made once for a group, not for each of its heads, and only one chunk's (B, H, Q, Q) matrices
live at a time where no gradient is wanted. For (B, L, H, P, N) = (1, 2048, 32, 64, 128) on one core that is 4 to 5
times as fast as repeating B and C for every head and all chunks at once, with a tenth of the memory.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from bestiary.kernels.scan_order import gather_tokens, invert_order

_MAX_CHUNK = 64
"""Longer chunks are cut to this: the work within a chunk grows with its length, and 32 to 64 is fastest, measured."""

_NO_LIMIT = (0.0, float("inf"))


def mamba_chunk_scan_ref(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int = _MAX_CHUNK,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    *,
    scan_order: torch.Tensor | None = None,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`bestiary.kernels.mamba_chunk_scan_combined`; arguments are taken as checked.

    Returns:
        out (B, L, H, P) and the final states (B, H, P, N), always both.
    """
    with torch.autocast(x.device.type, enabled=False):
        work = torch.promote_types(x.dtype, torch.float32)
        inverse = None if scan_order is None else invert_order(scan_order)

        def to_walk(tokens: torch.Tensor) -> torch.Tensor:
            """(B, L, ...) in image order to walking order."""
            if scan_order is not None:
                shape = tokens.shape[2:]
                tokens = gather_tokens(tokens.flatten(2), scan_order, inverse, backend="reference").unflatten(2, shape)
            return tokens.flip(1) if reverse else tokens

        d_BLH = step_sizes(to_walk(dt[..., None])[..., 0], dt_bias, dt_softplus, dt_limit, work)
        xd_BLHP = to_walk(x.to(work)) * d_BLH[..., None]
        run_BL = None if seq_idx is None else run_numbers(to_walk(seq_idx[..., None])[..., 0])
        wide = _wide(work, x.device)
        y_BLHP, states = chunk_scan(
            xd_BLHP,
            d_BLH.to(wide) * A.to(wide),
            to_walk(B.to(work)),
            to_walk(C.to(work)),
            min(chunk_size, _MAX_CHUNK),
            None if initial_states is None else initial_states.to(work),
            run_BL,
        )
        if reverse:
            y_BLHP = y_BLHP.flip(1)
        if inverse is not None:
            y_BLD = gather_tokens(y_BLHP.flatten(2), inverse, scan_order, backend="reference")
            y_BLHP = y_BLD.unflatten(2, x.shape[2:])
        if D is not None:
            skip = D.to(work)
            y_BLHP = y_BLHP + x.to(work) * (skip[:, None] if skip.ndim == 1 else skip)
        if z is not None:
            y_BLHP = y_BLHP * F.silu(z.to(work))
        return y_BLHP.to(out_dtype or x.dtype), states.to(state_dtype or work)


def step_sizes(
    dt: torch.Tensor,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    work: torch.dtype,
) -> torch.Tensor:
    """(..., H) step sizes after bias, softplus and limits, in the dtype ``work``."""
    d = dt.to(work)
    if dt_bias is not None:
        d = d + dt_bias.to(work)
    if dt_softplus:
        d = F.softplus(d)
        if tuple(dt_limit) == _NO_LIMIT:  # a softplus is within these anyway
            return d
    return torch.clamp(d, dt_limit[0], dt_limit[1])


def run_numbers(seq_BL: torch.Tensor) -> torch.Tensor:
    """Sequence ids to numbers that rise by one wherever the id changes: 5 5 2 5 to 0 0 1 2."""
    changed = F.pad(seq_BL[:, 1:] != seq_BL[:, :-1], (1, 0))
    return changed.long().cumsum(1)


def chunk_scan(
    xd_BLHP: torch.Tensor,
    log_a_BLH: torch.Tensor,
    B_BLGN: torch.Tensor,
    C_BLGN: torch.Tensor,
    chunk_size: int,
    S0_BHPN: torch.Tensor | None = None,
    run_BL: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan without what is done token by token: ``S_t = exp(log_a_t) S_{t-1} + xd_t B_t^T``, ``y_t = S_t C_t``.

    Args:
        xd_BLHP: inputs, times step sizes.
        log_a_BLH: step sizes times A, in any precision at least that of the inputs; float64 costs nothing here and
            keeps the differences of its cumulative sums exact where decays are strong.
        B_BLGN: input maps.
        C_BLGN: output maps.
        chunk_size: steps of a chunk; the last one may be shorter.
        S0_BHPN: states before the first step.
        run_BL: numbers from :func:`run_numbers`; the state is reset where they rise.

    Returns:
        y (B, L, H, P) and the last states (B, H, P, N).
    """
    batch, _, heads, P = xd_BLHP.shape
    G, N = B_BLGN.shape[2:]
    E = heads // G
    x_BGLEP = xd_BLHP.unflatten(2, (G, E)).transpose(1, 2)
    log_a_BGEL = log_a_BLH.unflatten(2, (G, E)).permute(0, 2, 3, 1)
    S = xd_BLHP.new_zeros(batch, G, E, P, N) if S0_BHPN is None else S0_BHPN.unflatten(1, (G, E))
    # split once: indexing in the loop would make the backward pass quadratic in L
    chunks = zip(
        x_BGLEP.split(chunk_size, 2),
        log_a_BGEL.split(chunk_size, 3),
        B_BLGN.transpose(1, 2).split(chunk_size, 2),
        C_BLGN.transpose(1, 2).split(chunk_size, 2),
        strict=True,
    )
    runs = None if run_BL is None else run_BL.split(chunk_size, 1)
    before_B1 = None if run_BL is None else torch.zeros_like(run_BL[:, :1])
    ys = []
    for i, (x, log_a, B, C) in enumerate(chunks):
        run = None if runs is None else runs[i]
        cs = log_a.cumsum(-1)
        carried, leaving, through = cs, cs[..., -1:] - cs, cs[..., -1]
        if run is not None:
            # A token sees the carried state only in the run that the last chunk ended with, and reaches the next
            # chunk only in the run that this one ends with.
            last_B1 = run[:, -1:]
            carried = carried.masked_fill((run != before_B1)[:, None, None], -torch.inf)
            leaving = leaving.masked_fill((run != last_B1)[:, None, None], -torch.inf)
            through = through.masked_fill((last_B1 != before_B1)[:, None], -torch.inf)
            before_B1 = last_B1
        carried, leaving, through = (_exp(exponent.to(x.dtype)) for exponent in (carried, leaving, through))
        M_BGEQQ = (C @ B.transpose(-1, -2))[:, :, None] * _decay(cs, run, x.dtype)
        y_BGQEP = (M_BGEQQ @ x.transpose(2, 3)).transpose(2, 3)
        from_state = (C @ S.flatten(2, 3).transpose(-1, -2)).unflatten(3, (E, P))
        y_BGQEP = y_BGQEP + from_state * carried.transpose(2, 3)[..., None]
        kept = (x * leaving.transpose(2, 3)[..., None]).flatten(3)
        S = through[..., None, None] * S + (kept.transpose(-1, -2) @ B).unflatten(2, (E, P))
        ys.append(y_BGQEP.transpose(1, 2))
    return torch.cat(ys, 1).flatten(2, 3), S.flatten(1, 2)


def _decay(cs_BGEQ: torch.Tensor, run_BQ: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """(B, G, E, Q, Q): exp(cs_i - cs_j) where token i sees token j, 0 elsewhere, in ``dtype``.

    What is not seen is made -inf before the exponential: there the difference may be large and positive.
    """
    Q = cs_BGEQ.shape[-1]
    past = torch.ones(Q, Q, dtype=torch.bool, device=cs_BGEQ.device).tril(-1)
    if run_BQ is not None:
        past = past & (run_BQ[:, :, None] == run_BQ[:, None, :])[:, None, None]
    if cs_BGEQ.dtype == dtype:
        exponent = cs_BGEQ[..., :, None] - cs_BGEQ[..., None, :]
    else:
        # float64 sums as two float32 numbers each: their difference is as good as float64's, which would cost
        # twice the memory here. The first is a constant to autograd, the second carries the gradient.
        high = cs_BGEQ.detach().to(dtype)
        low = (cs_BGEQ - high).to(dtype)
        exponent = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
    # The diagonal is 0 by definition, and said to be: as a difference it would send a gradient to both sums, and what
    # should cancel there would leave its rounding, which is most of the gradient where decays are strong.
    itself = torch.full((Q, Q), -torch.inf, dtype=dtype, device=cs_BGEQ.device).fill_diagonal_(0)
    return _exp(torch.where(past, exponent, itself))


def _exp(exponent: torch.Tensor) -> torch.Tensor:
    """exp, and 0 instead of numbers (4e-31 in float32) so small that products with them may be subnormal.

    Processors take many times longer for subnormal numbers: strong decays made the whole scan 2.6 times as slow.
    """
    return F.threshold(exponent, 0.8 * math.log(torch.finfo(exponent.dtype).tiny), -torch.inf).exp()


def _wide(work: torch.dtype, device: torch.device) -> torch.dtype:
    # Apple's GPUs have no float64.
    return work if device.type == "mps" else torch.float64
