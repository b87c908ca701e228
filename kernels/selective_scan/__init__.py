"""The selective scan of Mamba-1."""

from __future__ import annotations

import torch

from bestiary.kernels.backends.dispatch import implementation
from bestiary.kernels.scan_order import check_order


def selective_scan_fn(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: torch.Tensor | None = None,
    scan_order: torch.Tensor | None = None,
    reverse: bool = False,
    seq_idx: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The selective scan: a diagonal state space whose step, input and output maps depend on the token.

    With ``Dt = softplus(delta + delta_bias)`` (or without the softplus)::

        h_t = exp(Dt_t * A) * h_{t-1} + (Dt_t * u_t) * B_t        h (B, D, N)
        y_t = sum_n C_t * h_t + D * u_t
        out_t = y_t * silu(z_t)                                   where z is given

    Drop-in for ``mamba_ssm.ops.selective_scan_interface.selective_scan_fn``. States are float32 (float64 for
    float64 inputs) whatever the dtype of the rest. Everything is differentiable, the last state too, which
    upstream's is not. Complex A runs in the reference: variable B and C then have a last axis of 2L (real and
    imaginary parts by turns), and y is twice the real part of the sum.

    Source: the official code of mamba-ssm. Paper: arXiv:2312.00752 Sec. 3.

    Args:
        u: (B, D, L) input.
        delta: (B, D, L) step sizes before bias and softplus.
        A: (D, N), negative for a stable scan.
        B: (D, N) constant, (B, N, L), or (B, G, N, L) where channel d belongs to group ``d // (D / G)``.
        C: as B.
        D: (D,) skip.
        z: (B, D, L) gate.
        delta_bias: (D,).
        delta_softplus: apply softplus (threshold 20, as torch's) to the biased delta.
        return_last_state: also return the state after the last step.
        initial_state: (B, D, N) state before the first step, zero by default.
        scan_order: (B, L) permutation: the walk visits token ``scan_order[b, t]`` at step t, and a token's output
            stands where the token stands, as if all inputs were gathered first and the output scattered back. With
            (B, K, L) every row is walked in K orders.
        reverse: walk from the last step to the first; the last state is then the one after step 0.
        seq_idx: (B, L) integers, one per token: the state is reset where it changes along the walk. The initial
            state belongs to the first sequence.
        out_dtype: dtype of the output, that of ``u`` by default.
        backend: name of a backend, see :mod:`bestiary.kernels.backends`.

    Returns:
        (B, D, L), or ``(out, last_state)`` with last_state (B, D, N) float32 (float64 for float64 inputs). With
        several orders (B, K, D, L) and (B, K, D, N).

    Raises:
        ValueError: if shapes do not fit.
    """
    if u.ndim != 3:
        raise ValueError(f"selective_scan_fn needs u (B, D, L), got {tuple(u.shape)}")
    batch, dim, length = u.shape
    if length < 1:
        raise ValueError("selective_scan_fn needs at least one token")
    if A.ndim != 2 or A.shape[0] != dim:
        raise ValueError(f"selective_scan_fn: A must be (D, N) with D = {dim}, got {tuple(A.shape)}")
    N = A.shape[1]
    for name, value, shape in (
        ("delta", delta, (batch, dim, length)),
        ("z", z, (batch, dim, length)),
        ("D", D, (dim,)),
        ("delta_bias", delta_bias, (dim,)),
        ("initial_state", initial_state, (batch, dim, N)),
        ("seq_idx", seq_idx, (batch, length)),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"selective_scan_fn: {name} must be {shape}, got {tuple(value.shape)}")
    for name, value in (("B", B), ("C", C)):
        _check_map(name, value, batch, dim, N, 2 * length if A.is_complex() else length)
    if scan_order is not None:
        check_order(scan_order, batch, length, several=True)
    run = implementation(
        "selective_scan", backend, u, delta, A, B, C, D, z, delta_bias, initial_state, out_dtype=out_dtype
    )
    options = {
        "initial_state": initial_state,
        "scan_order": scan_order,
        "reverse": reverse,
        "seq_idx": seq_idx,
        "out_dtype": out_dtype,
    }
    return run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, **options)


def _check_map(name: str, value: torch.Tensor, batch: int, dim: int, N: int, length: int) -> None:
    shape = tuple(value.shape)
    fits = (
        shape == (dim, N)
        or shape == (batch, N, length)
        or (value.ndim == 4 and shape[1] > 0 and dim % shape[1] == 0 and shape == (batch, shape[1], N, length))
    )
    if not fits:
        raise ValueError(
            f"selective_scan_fn: {name} must be (D, N) = ({dim}, {N}), (B, N, L) = ({batch}, {N}, {length}) or "
            f"(B, G, N, L) with G a divisor of {dim}, got {shape}"
        )
