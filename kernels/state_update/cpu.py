"""One step of a state space model in C++, in place. It has no gradient: where one is asked for, the reference runs."""

from __future__ import annotations

import torch

from bestiary.kernels.backends import native
from bestiary.kernels.backends.library import define


def selective_state_update_cpu(
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
) -> torch.Tensor:
    """See :func:`bestiary.kernels.selective_state_update`; arguments are taken as checked."""
    single = state.ndim == 3  # Mamba-1: one head of many channels

    def rows(t: torch.Tensor | None) -> torch.Tensor | None:
        return t[:, None] if single and t is not None else t

    def params(t: torch.Tensor | None) -> torch.Tensor | None:
        return t[None] if single and t is not None else t

    B, C = (t[:, None] if t.ndim == 2 else t for t in (B, C))
    dtype = out_dtype or x.dtype
    out = _update(
        rows(state), rows(x), rows(dt), params(A), B, C, params(D), rows(z), params(dt_bias), dt_softplus,
        state_batch_indices, dtype,
    )  # fmt: skip
    return out[:, 0] if single else out


def _run(state, x, dt, A, B, C, D, z, bias, softplus, slots, out_dtype):
    out = torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format)
    native.ops().state_update(state, x, dt, A, B, C, D, z, bias, softplus, slots, out)
    return out


def _fake(state, x, dt, A, B, C, D, z, bias, softplus, slots, out_dtype):
    return torch.empty_like(x, dtype=out_dtype, memory_format=torch.contiguous_format)


_update = define(
    "state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? bias, bool softplus, Tensor? slots, ScalarType out_dtype) -> Tensor",
    _run,
    _fake,
)
