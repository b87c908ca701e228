"""One step of the causal convolution in C++, in place.

It has no gradient: where one is asked for, the reference runs.
"""

from __future__ import annotations

import torch

from bestiary.kernels.backends import native
from bestiary.kernels.backends.library import define


def causal_conv1d_update_cpu(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`bestiary.kernels.causal_conv1d_update`; arguments are taken as checked."""
    return _update(x, conv_state, weight, bias, activation is not None, cache_seqlens, conv_state_indices)


def _run(x, state, weight, bias, silu, lengths, slots):
    out = torch.empty_like(x)  # channels contiguous where those of x are
    native.ops().conv_update(x, state, weight, bias, silu, lengths, slots, out)
    return out


def _fake(x, state, weight, bias, silu, lengths, slots):
    return torch.empty_like(x)


_update = define(
    "causal_conv1d_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu, Tensor? lengths, "
    "Tensor? slots) -> Tensor",
    _run,
    _fake,
)
