"""The state space dual (SSD) of Mamba-2: a scan with one decay per head, as matrix products."""

from __future__ import annotations

import torch

from bestiary.kernels.backends import choose_backend
from bestiary.kernels.backends.dispatch import implementation
from bestiary.kernels.scan_order import check_order


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
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
    *,
    scan_order: torch.Tensor | None = None,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The scan of Mamba-2: a state (P, N) per head, with one decay for all of it.

    With ``d = clamp(softplus(dt + dt_bias), *dt_limit)`` (or without the softplus)::

        S_t = exp(d_t * A) * S_{t-1} + d_t * x_t B_t^T            S (B, H, P, N)
        y_t = S_t C_t + D * x_t
        out_t = y_t * silu(z_t)                                   where z is given

    Drop-in for ``mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined``. States and sums are float32
    (float64 for float64 inputs) whatever the dtype of the rest. Everything but varlen states is differentiable.
    Steps are clamped without the softplus too, so negative ones become 0 under the default limits, as upstream.

    Two things differ from upstream in packed rows. The state is reset wherever ``seq_idx`` changes, so an id that
    comes again begins a new sequence, where upstream may join what stands in one chunk. And ``initial_states``
    belong to the first sequence whatever its id, where upstream drops them unless that is 0.

    Source: the official code of mamba-ssm. Paper: arXiv:2405.21060 Sec. 6.

    Args:
        x: (B, L, H, P) input.
        dt: (B, L, H) step sizes before bias, softplus and limits.
        A: (H,), negative for a stable scan.
        B: (B, L, G, N), head h belongs to group ``h // (H / G)``.
        C: as B.
        chunk_size: steps that are computed as one matrix product, at most; it changes speed and rounding only, and
            L need not be a multiple of it.
        D: (H,) or (H, P) skip.
        z: (B, L, H, P) gate.
        dt_bias: (H,).
        initial_states: (B, H, P, N) states before the first step, zero by default.
        seq_idx: (B, L) integers, one per token: the state is reset where it changes along the walk.
        cu_seqlens: (nseq + 1,) integers from 0 to L where packed sequences begin and end, for a batch of one. If
            ``seq_idx`` is not given, it is taken from them; if it is, it must say the same.
        dt_softplus: apply softplus (threshold 20, as torch's) to the biased steps.
        dt_limit: lowest and highest step; outside there is no gradient for ``dt`` and ``dt_bias``.
        return_final_states: also return the states after the last step.
        return_varlen_states: also return the states after each sequence of ``cu_seqlens``, without gradient.
        state_dtype: dtype of the returned states, float32 (float64 for float64 inputs) by default.
        scan_order: (B, L) permutation: the walk visits token ``scan_order[b, t]`` at step t, and a token's output
            stands where the token stands, as if all inputs were gathered first and the output scattered back.
        reverse: walk from the last step to the first; final states are then those after step 0.
        out_dtype: dtype of the output, that of ``x`` by default.
        backend: name of a backend, see :mod:`bestiary.kernels.backends`.

    Returns:
        out (B, L, H, P), or a tuple ``(out[, final_states][, varlen_states])`` with final_states (B, H, P, N) and
        varlen_states (nseq, H, P, N).

    Raises:
        ValueError: if shapes or options do not fit.
    """
    name = "mamba_chunk_scan_combined"
    if x.ndim != 4:
        raise ValueError(f"{name} needs x (B, L, H, P), got {tuple(x.shape)}")
    batch, L, H, P = x.shape
    if L < 1:
        raise ValueError(f"{name} needs at least one token")
    if chunk_size < 1:
        raise ValueError(f"{name}: chunk_size must be 1 or more, not {chunk_size}")
    check_maps(name, B, C, batch, L, H)
    if D is not None and tuple(D.shape) not in ((H,), (H, P)):
        raise ValueError(f"{name}: D must be (H,) = ({H},) or (H, P) = ({H}, {P}), got {tuple(D.shape)}")
    for label, value, shape in (
        ("dt", dt, (batch, L, H)),
        ("A", A, (H,)),
        ("z", z, (batch, L, H, P)),
        ("dt_bias", dt_bias, (H,)),
        ("initial_states", initial_states, (batch, H, P, B.shape[3])),
        ("seq_idx", seq_idx, (batch, L)),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name}: {label} must be {shape}, got {tuple(value.shape)}")
    if len(dt_limit) != 2 or not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"{name}: dt_limit must be (lowest, highest), not {tuple(dt_limit)}")
    if scan_order is not None:
        check_order(scan_order, batch, L)
    if return_varlen_states and cu_seqlens is None:
        raise ValueError(f"{name}: return_varlen_states needs cu_seqlens")
    if cu_seqlens is not None:
        _check_cu_seqlens(name, cu_seqlens, batch, L, scan_order)
        if seq_idx is None:
            from bestiary.kernels.ssd.varlen import sequence_numbers

            seq_idx = sequence_numbers(cu_seqlens, L)
    run = implementation("ssd", backend, x, dt, A, B, C, D, z, dt_bias, initial_states, out_dtype=out_dtype)
    out, final_states = run(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D,
        z,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus,
        (float(dt_limit[0]), float(dt_limit[1])),
        scan_order=scan_order,
        reverse=reverse,
        out_dtype=out_dtype,
        state_dtype=state_dtype,
    )
    results = (out, final_states) if return_final_states else (out,)
    if return_varlen_states and cu_seqlens is not None:
        from bestiary.kernels.ssd.varlen import varlen_states

        x, dt, B = (t.flip(1) if reverse else t for t in (x, dt, B))
        edges = L - cu_seqlens.flip(0) if reverse else cu_seqlens
        states = varlen_states(x, dt, A, B, edges, dt_bias, initial_states, dt_softplus, dt_limit, state_dtype)
        results = (*results, states.flip(0) if reverse else states)
    return results if len(results) > 1 else out


def ssd_minimal_discrete(
    X: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    block_len: int,
    initial_states: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan of Mamba-2 on discrete inputs: ``S_t = exp(A_t) S_{t-1} + X_t B_t^T``, ``y_t = S_t C_t``.

    Drop-in for ``mamba_ssm.modules.ssd_minimal.ssd_minimal_discrete``. It is plain PyTorch on every backend; models
    use :func:`mamba_chunk_scan_combined`.

    Paper: arXiv:2405.21060 Listing 1.

    Args:
        X: (B, L, H, P), already multiplied by the step sizes.
        A: (B, L, H), already multiplied by the step sizes.
        B: (B, L, H, N), or with a divisor of H as number of groups.
        C: as B.
        block_len: steps that are computed as one matrix product; a divisor of L, as upstream.
        initial_states: (B, 1, H, P, N) as upstream, or (B, H, P, N).
        backend: name of a backend; only checked.

    Returns:
        Y (B, L, H, P) and the final states (B, H, P, N), in the dtype of ``X``.

    Raises:
        ValueError: if shapes do not fit.
    """
    from bestiary.kernels.ssd.reference import chunk_scan

    name = "ssd_minimal_discrete"
    if X.ndim != 4:
        raise ValueError(f"{name} needs X (B, L, H, P), got {tuple(X.shape)}")
    batch, L, H, P = X.shape
    if L < 1 or block_len < 1 or L % block_len:
        raise ValueError(f"{name}: L = {L} must be a multiple of block_len = {block_len}")
    if tuple(A.shape) != (batch, L, H):
        raise ValueError(f"{name}: A must be {(batch, L, H)}, got {tuple(A.shape)}")
    check_maps(name, B, C, batch, L, H)
    if initial_states is not None:
        states = initial_states[:, 0] if initial_states.ndim == 5 else initial_states
        shape = (batch, H, P, B.shape[3])
        if tuple(states.shape) != shape or (initial_states.ndim == 5 and initial_states.shape[1] != 1):
            raise ValueError(
                f"{name}: initial_states must be {shape} or {(batch, 1, *shape[1:])}, got {tuple(initial_states.shape)}"
            )
        initial_states = states
    choose_backend("ssd", backend)
    with torch.autocast(X.device.type, enabled=False):
        work = torch.promote_types(X.dtype, torch.float32)
        start = None if initial_states is None else initial_states.to(work)
        Y, final = chunk_scan(X.to(work), A.to(work), B.to(work), C.to(work), block_len, start)
    return Y.to(X.dtype), final.to(X.dtype)


def check_maps(name: str, B: torch.Tensor, C: torch.Tensor, batch: int, L: int, H: int) -> None:
    """Raise ValueError unless B and C are (B, L, G, N) with G a divisor of H.

    Args:
        name: the function that asks, for the message.
        B: the input map.
        C: the output map.
        batch: rows expected.
        L: steps expected.
        H: heads.
    """
    shape = tuple(B.shape)
    if B.ndim != 4 or shape[:2] != (batch, L) or shape[2] < 1 or H % shape[2]:
        raise ValueError(f"{name}: B must be (B, L, G, N) = ({batch}, {L}, G, N), G a divisor of {H}, got {shape}")
    if tuple(C.shape) != shape:
        raise ValueError(f"{name}: C must be as B, {shape}, got {tuple(C.shape)}")


def _check_cu_seqlens(name: str, cu_seqlens: torch.Tensor, batch: int, L: int, scan_order: torch.Tensor | None) -> None:
    if batch != 1:
        raise ValueError(f"{name}: cu_seqlens needs a batch of one row, got {batch}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: cu_seqlens must be (nseq + 1,) of int32 or int64, got {tuple(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}"
        )
    if scan_order is not None:
        raise ValueError(f"{name}: cu_seqlens does not go with scan_order; give seq_idx")
    if not torch.compiler.is_compiling():
        edges = cu_seqlens.tolist()
        if edges[0] != 0 or edges[-1] != L or edges != sorted(edges):
            raise ValueError(f"{name}: cu_seqlens must rise from 0 to {L}, got {edges}")
