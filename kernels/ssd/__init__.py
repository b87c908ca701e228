"""The state space dual of Mamba-2."""

from __future__ import annotations

import torch

from bestiary.kernels.backends.dispatch import implementation
from bestiary.kernels.scan_order import check_order

_INF = float("inf")


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, _INF),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
    *,
    scan_order: torch.Tensor | None = None,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Mamba-2's scan: one decay a head, so that chunks become matrix products.

    With ``d = clamp(softplus(dt + dt_bias), dt_limit)``::

        h_t = exp(d_t * A) * h_{t-1} + d_t * x_t B_t^T        h (B, H, P, N)
        y_t = h_t C_t + D * x_t,   out_t = y_t * silu(z_t)    where z is given

    Drop-in for ``mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined``. States and decays are float32
    (float64 for float64 inputs) whatever the dtype of the rest; everything but the states of ``cu_seqlens`` is
    differentiable.

    Differs from mamba-ssm where rows are packed: the state is reset wherever ``seq_idx`` changes along the walk, and
    ``initial_states`` belong to the first run, whatever its number; there, ids that recur share a chunk's state, and
    the initial states belong to sequence 0. Ids that count up from 0 give the same.

    Paper: arXiv:2405.21060 Sec. 6. Source: the official code of mamba-ssm.

    Args:
        x: (B, L, H, P).
        dt: (B, L, H).
        A: (H,), negative for a stable scan.
        B: (B, L, G, N), G a divisor of H.
        C: as B.
        chunk_size: accepted; results do not depend on it, and on the CPU speed does not either.
        D: (H,) or (H, P) skip.
        z: (B, L, H, P) gate.
        dt_bias: (H,).
        initial_states: (B, H, P, N).
        seq_idx: (B, L) integers: rows of several sequences.
        cu_seqlens: (sequences + 1,) first tokens of packed sequences, for ``return_varlen_states``; needs B = 1.
        dt_softplus: apply softplus to the biased dt.
        dt_limit: the range that d is clamped to.
        return_final_states: also return the state after the last step, (B, H, P, N).
        return_varlen_states: also return the states after each sequence, (sequences, H, P, N), without gradient.
        state_dtype: dtype of the final states, float32 by default (float64 for float64 inputs).
        scan_order: (B, L) permutation, as in :func:`bestiary.kernels.selective_scan_fn`.
        reverse: walk from the last step to the first.
        out_dtype: dtype of the output, that of ``x`` by default.
        backend: name of a backend, see :mod:`bestiary.kernels.backends`.

    Returns:
        out (B, L, H, P), followed by what was asked for.

    Raises:
        ValueError: if shapes or options do not fit.
    """
    _check(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, dt_limit)
    batch, L, H, _ = x.shape
    if scan_order is not None:
        check_order(scan_order, batch, L)
    if return_varlen_states or cu_seqlens is not None:
        _check_lengths(cu_seqlens, return_varlen_states, batch, L, scan_order is not None or reverse)
        if seq_idx is None and cu_seqlens is not None:
            steps = torch.arange(L, device=x.device)
            seq_idx = torch.bucketize(steps, cu_seqlens[1:].to(steps), right=True)[None].int()
    run = implementation("ssd", backend, x, dt, A, B, C, D, z, dt_bias, initial_states)
    tail = (dt_softplus, (float(dt_limit[0]), float(dt_limit[1])))
    options = {"scan_order": scan_order, "reverse": reverse, "out_dtype": out_dtype, "state_dtype": state_dtype}
    out, last = run(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, *tail, **options)
    found = [out]
    if return_final_states:
        found.append(last)
    if return_varlen_states:
        assert cu_seqlens is not None
        ends, states = cu_seqlens.tolist(), []
        with torch.no_grad():
            for i, (lo, hi) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
                start = initial_states if i == 0 else None
                if lo == hi:
                    empty = x.new_zeros(1, H, x.shape[3], B.shape[3], dtype=last.dtype)
                    states.append(empty if start is None else start.to(last.dtype))
                    continue
                part = [t[:, lo:hi] for t in (x, dt)] + [A] + [t[:, lo:hi] for t in (B, C)]
                options = {"state_dtype": state_dtype}
                states.append(run(*part, chunk_size, None, None, dt_bias, start, None, *tail, **options)[1])
        found.append(torch.cat(states))
    return found[0] if len(found) == 1 else tuple(found)


def _check(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, dt_limit) -> None:
    name = "mamba_chunk_scan_combined"
    if x.ndim != 4:
        raise ValueError(f"{name} needs x (B, L, H, P), got {tuple(x.shape)}")
    batch, L, H, P = x.shape
    if L < 1:
        raise ValueError(f"{name} needs at least one token")
    if B.ndim != 4 or B.shape[:2] != x.shape[:2] or B.shape[2] < 1 or H % B.shape[2]:
        raise ValueError(f"{name}: B must be (B, L, G, N) with G a divisor of {H}, got {tuple(B.shape)}")
    if int(chunk_size) < 1:
        raise ValueError(f"{name}: chunk_size must be positive, not {chunk_size}")
    if not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"{name}: dt_limit must be a range, not {dt_limit}")
    N = B.shape[3]
    for label, value, shapes in (
        ("dt", dt, [(batch, L, H)]),
        ("A", A, [(H,)]),
        ("C", C, [tuple(B.shape)]),
        ("D", D, [(H,), (H, P)]),
        ("z", z, [(batch, L, H, P)]),
        ("dt_bias", dt_bias, [(H,)]),
        ("initial_states", initial_states, [(batch, H, P, N)]),
        ("seq_idx", seq_idx, [(batch, L)]),
    ):
        if value is not None and tuple(value.shape) not in shapes:
            raise ValueError(f"{name}: {label} must be {' or '.join(map(str, shapes))}, got {tuple(value.shape)}")


def _check_lengths(cu_seqlens: torch.Tensor | None, wanted: bool, batch: int, L: int, moved: bool) -> None:
    name = "mamba_chunk_scan_combined"
    if cu_seqlens is None:
        raise ValueError(f"{name}: return_varlen_states needs cu_seqlens")
    if batch != 1:
        raise ValueError(f"{name}: cu_seqlens needs a batch of one packed row, not {batch}")
    if cu_seqlens.ndim != 1 or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != L or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"{name}: cu_seqlens must rise from 0 to {L}, got {cu_seqlens.tolist()}")
    if wanted and moved:
        raise ValueError(f"{name}: return_varlen_states does not go with scan_order or reverse")


def ssd_minimal_discrete(
    X: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    block_len: int,
    initial_states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan on inputs that are already multiplied by the step sizes, in plain PyTorch.

    Drop-in for ``mamba_ssm.modules.ssd_minimal.ssd_minimal_discrete``.

    Paper: arXiv:2405.21060 Listing 1.

    Args:
        X: (B, L, H, P), ``x * d``.
        A: (B, L, H), ``d * A``: the logarithm of each step's decay.
        B: (B, L, H, N).
        C: (B, L, H, N).
        block_len: must divide L, as upstream's; results do not depend on it.
        initial_states: (B, H, P, N), or (B, 1, H, P, N) as upstream has it.

    Returns:
        Y (B, L, H, P) and the last state (B, H, P, N).

    Raises:
        ValueError: if shapes do not fit.
    """
    if X.ndim != 4 or tuple(A.shape) != tuple(X.shape[:3]) or B.shape[:3] != X.shape[:3] or C.shape != B.shape:
        raise ValueError(
            f"ssd_minimal_discrete needs X (B, L, H, P), A (B, L, H), B and C (B, L, H, N), got "
            f"{', '.join(str(tuple(t.shape)) for t in (X, A, B, C))}"
        )
    if block_len < 1 or X.shape[1] % block_len:
        raise ValueError(f"ssd_minimal_discrete: block_len must divide L = {X.shape[1]}, got {block_len}")
    if initial_states is not None and initial_states.ndim == 5:
        initial_states = initial_states[:, 0]
    from bestiary.kernels.ssd.reference import discrete_scan

    return discrete_scan(X, A, B, C, initial_states, block_len)
