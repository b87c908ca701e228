"""The state space dual of Mamba-2 in plain PyTorch: the specification, and what runs where nothing else does.

Shape legend: B batch, L tokens, H heads, P channels of a head, G groups of B and C, R heads of a group (H = G * R),
N states, Q tokens of a chunk.

C B^T is computed once for each group and not for each of its heads, products over heads are batched matrix products,
and the state is carried from chunk to chunk, so nothing of size (L, Q, H) is ever held at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bestiary.kernels.scan_order import gather_tokens, invert_order

_CHUNK = 64
"""Tokens of a chunk. Results do not depend on it; on a CPU 32 to 64 is fastest, whatever the caller's chunk_size."""


def mamba_chunk_scan_ref(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int = _CHUNK,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    *,
    scan_order: torch.Tensor | None = None,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`bestiary.kernels.mamba_chunk_scan_combined`; arguments are taken as checked.

    Returns:
        The output (B, L, H, P) and the last state (B, H, P, N).
    """
    with torch.autocast(x.device.type, enabled=False):
        work = torch.promote_types(x.dtype, torch.float32)
        inverse = None if scan_order is None else invert_order(scan_order)

        def to_walk(t: torch.Tensor) -> torch.Tensor:
            """(B, L, ...) in image order to walking order."""
            if scan_order is not None:
                t = gather_tokens(t.flatten(2), scan_order, inverse, backend="reference").unflatten(2, t.shape[2:])
            return t.flip(1) if reverse else t

        d_BLH = step_sizes(dt.to(work), dt_bias, dt_softplus, dt_limit)
        run_BL = None if seq_idx is None else _runs(to_walk(seq_idx[..., None])[..., 0])
        walk = [to_walk(t) for t in (x.to(work), d_BLH, B.to(work), C.to(work))]
        y_BLHP, state = _chunks(*walk, A.to(work), initial_states, run_BL, min(chunk_size, _CHUNK))
        y_BLHP = y_BLHP.flip(1) if reverse else y_BLHP
        if inverse is not None:
            y_BLHP = gather_tokens(y_BLHP.flatten(2), inverse, scan_order, backend="reference").view_as(y_BLHP)
        if D is not None:
            y_BLHP = y_BLHP + x.to(work) * (D.to(work) if D.ndim == 2 else D.to(work)[:, None])
        if z is not None:
            y_BLHP = y_BLHP * F.silu(z.to(work))
        return y_BLHP.to(out_dtype or x.dtype), state.to(state_dtype or work)


def step_sizes(
    dt: torch.Tensor, dt_bias: torch.Tensor | None, softplus: bool, limit: tuple[float, float]
) -> torch.Tensor:
    """``clamp(softplus(dt + dt_bias))``, (B, L, H)."""
    d = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    d = F.softplus(d) if softplus else d
    return d if limit == (0.0, float("inf")) and softplus else d.clamp(*limit)


def _runs(seq_BL: torch.Tensor) -> torch.Tensor:
    """The number of the run that each step belongs to: ids may recur, runs do not."""
    change = F.pad(seq_BL[:, 1:] != seq_BL[:, :-1], (1, 0))
    return change.cumsum(1)


def discrete_scan(
    X: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, initial: torch.Tensor | None, Q: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`bestiary.kernels.ssd_minimal_discrete`: each head has maps of its own, decays are given."""
    with torch.autocast(X.device.type, enabled=False):
        work = torch.promote_types(X.dtype, torch.float32)
        x, log_a, B, C = (t.to(work) for t in (X, A, B, C))
        y, state = _chunks(x, torch.ones_like(log_a), B, C, log_a, initial, None, Q)
        return y.to(X.dtype), state


def _chunks(x, d, B, C, A, initial, run, Q):
    """Chunk by chunk, all in walking order. A is (H,), or (B, L, H) where decays do not follow from d."""
    batch, L, H, P = x.shape
    G, N = B.shape[2:]
    R = H // G
    state = x.new_zeros(batch, H, P, N) if initial is None else initial.to(x.dtype)
    state = state.unflatten(1, (G, R))
    ys = []
    # split once: slicing in the loop would make the backward pass quadratic in L
    log_a = d * A if A.ndim == 1 else A
    parts = [t.split(Q, 1) for t in (*(t.unflatten(2, (G, R)) for t in (x, d, log_a)), B, C)]
    runs = [None] * len(parts[0]) if run is None else run.split(Q, 1)
    before = None if run is None else run[:, :1]
    for x_c, d_c, a_c, B_c, C_c, run_c in zip(*parts, runs, strict=True):
        q = x_c.shape[1]
        x_BGRQP = x_c.permute(0, 2, 3, 1, 4)
        d_BGRQ = d_c.permute(0, 2, 3, 1)
        B_BGQN, C_BGQN = B_c.transpose(1, 2), C_c.transpose(1, 2)
        cs = a_c.permute(0, 2, 3, 1).cumsum(-1)
        causal = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
        keep_in = keep_out = None
        if run_c is not None:
            causal = causal & (run_c[:, :, None] == run_c[:, None, :])[:, None, None]
            keep_in = (run_c == before)[:, None, None]
            keep_out = (run_c == run_c[:, -1:])[:, None, None]
        # masked before exp, which would overflow above the diagonal
        decay = (cs[..., :, None] - cs[..., None, :]).masked_fill(~causal, -torch.inf).exp()
        CB = torch.matmul(C_BGQN, B_BGQN.transpose(-1, -2))
        M = CB[:, :, None] * decay * d_BGRQ[..., None, :]
        y = torch.matmul(M, x_BGRQP)
        into = cs.exp() if keep_in is None else cs.exp() * keep_in
        y = y + torch.matmul(C_BGQN[:, :, None], state.transpose(-1, -2)) * into[..., None]
        ys.append(y.permute(0, 3, 1, 2, 4).flatten(2, 3))
        out = (cs[..., -1:] - cs).exp() * d_BGRQ
        out = out if keep_out is None else out * keep_out
        last = cs[..., -1:].exp()
        if keep_in is not None:
            last = last * keep_in[..., -1:]
            before = run_c[:, -1:]
        state = state * last[..., None] + torch.matmul((x_BGRQP * out[..., None]).transpose(-1, -2), B_BGQN[:, :, None])
    return torch.cat(ys, 1), state.flatten(1, 2)
