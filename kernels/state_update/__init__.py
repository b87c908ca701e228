"""One step of a selective scan, for decoding with Mamba-1 and Mamba-2."""

from __future__ import annotations

import torch

from bestiary.kernels.backends.dispatch import implementation
from bestiary.kernels.backends.library import needs_grad
from bestiary.kernels.state_update.rows import check_rows


def selective_state_update(
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
    backend: str | None = None,
) -> torch.Tensor:
    """One step of a scan; the state is updated in place.

    With ``d = softplus(dt + dt_bias)`` (or without the softplus)::

        state = state * exp(d * A) + d * x * B
        out = sum_n state * C + D * x,    times silu(z) where z is given

    Drop-in for ``mamba_ssm.ops.triton.selective_state_update.selective_state_update``; ``D`` and ``dt_bias`` may be
    None here. Sums are float32 (float64 if input or state are) whatever the dtype of the state, and the output is
    made from the new state before that is rounded.

    Where gradients are on and an input requires one, the step is differentiable, on every backend by the reference.
    The new state then carries gradients from step to step only if the state required grad: begin with
    ``torch.zeros(..., requires_grad=True).clone()``.

    Source: the official code of mamba-ssm.

    Args:
        state: (B, D, N) for Mamba-1 or (B, H, P, N) for Mamba-2, of any floating dtype; more or fewer rows than B
            with ``state_batch_indices``.
        x: (B, D) or (B, H, P).
        dt: as x. If it, A and dt_bias are expanded from one number per head (stride 0), fewer exponentials are made.
        A: (D, N) or (H, P, N).
        B: (B, N), or (B, G, N) with G a divisor of H.
        C: as B.
        D: (D,) or (H, P) skip.
        z: as x, gate.
        dt_bias: (D,) or (H, P).
        dt_softplus: apply softplus (threshold 20, as torch's) to the biased dt.
        state_batch_indices: (B,) the row of ``state`` of each sequence, none twice; negative for a padded slot, whose
            output is 0 and which writes no state.
        out_dtype: dtype of the output, that of ``x`` by default.
        backend: name of a backend, see :mod:`bestiary.kernels.backends`.

    Returns:
        out, of the shape of x.

    Raises:
        ValueError: if shapes do not fit, or if ``state`` is a leaf that requires grad.
    """
    name = "selective_state_update"
    if state.ndim not in (3, 4):
        raise ValueError(f"{name} needs state (B, D, N) or (B, H, P, N), got {tuple(state.shape)}")
    rows, heads, N = x.shape, state.shape[1:-1], state.shape[-1]
    if rows[1:] != heads:
        raise ValueError(f"{name}: x must be (B, {', '.join(map(str, heads))}), got {tuple(rows)}")
    batch = rows[0]
    H = heads[0] if len(heads) == 2 else 1
    for label, value, shape in (
        ("dt", dt, rows),
        ("A", A, (*heads, N)),
        ("D", D, heads),
        ("z", z, rows),
        ("dt_bias", dt_bias, heads),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name}: {label} must be {tuple(shape)}, got {tuple(value.shape)}")
    for label, value in (("B", B), ("C", C)):
        shape = value.shape
        grouped = len(shape) == 3 and shape[::2] == (batch, N) and shape[1] > 0 and H % shape[1] == 0
        if not grouped and shape != (batch, N):
            raise ValueError(
                f"{name}: {label} must be (B, N) = ({batch}, {N}) or (B, G, N) with G a divisor of {H}, "
                f"got {tuple(shape)}"
            )
    check_rows(name, "state", state, "state_batch_indices", state_batch_indices, batch)
    tensors = (state, x, dt, A, B, C, D, z, dt_bias)
    run = implementation("state_update", backend, *tensors, out_dtype=out_dtype)
    if needs_grad(*tensors):  # the backend was asked for all the same, so that a wrong name is an error
        run = implementation("state_update", "reference")
    return run(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, out_dtype=out_dtype)
