"""The root mean square norm with a gate that ends a Mamba-2 block."""

from __future__ import annotations

import torch

from bestiary.kernels.backends.dispatch import implementation


def rms_norm_gated(
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Root mean square norm over groups of channels, with a gate before or after it.

    ``norm(x) * weight * silu(z)`` if the norm is before the gate, else ``norm(x * silu(z)) * weight``. All in
    float32 (float64 for float64 inputs), rounded once at the end. Everything is differentiable.

    Drop-in for ``mamba_ssm.ops.triton.layernorm_gated.rmsnorm_fn`` without a bias (which it takes third).
    Source: the official code of mamba-ssm (layernorm_gated).

    Args:
        x: (..., F), of any strides; rows that are slices of wider ones are not copied.
        weight: (F,).
        z: (..., F) gate; without it the norm alone.
        eps: added to the mean square.
        group_size: channels that share a mean square, all F by default.
        norm_before_gate: which comes first.
        backend: name of a backend, see :mod:`bestiary.kernels.backends`.

    Returns:
        (..., F) in the dtype of ``x``.

    Raises:
        ValueError: if shapes do not fit.
    """
    name = "rms_norm_gated"
    shape = x.shape
    if not shape or not shape[-1]:
        raise ValueError(f"{name} needs x (..., F) with F >= 1, got {tuple(shape)}")
    channels = shape[-1]
    size = group_size or channels
    if size < 1 or channels % size:
        raise ValueError(f"{name}: group_size = {size} must be a divisor of the {channels} channels")
    if tuple(weight.shape) != (channels,):
        raise ValueError(f"{name}: weight must be ({channels},), got {tuple(weight.shape)}")
    if z is not None and z.shape != shape:
        raise ValueError(f"{name}: z must be as x, {tuple(shape)}, got {tuple(z.shape)}")
    run = implementation("gated_norm", backend, x, weight, z)
    return run(x, weight, z, eps, size, norm_before_gate)
