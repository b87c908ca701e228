"""The gated RMS norm in C++, as an op that autograd and torch.compile take whole.

The gradient keeps the inputs alone: the inverse root mean squares come with sums that it makes anyway.
"""

from __future__ import annotations

from typing import Any

import torch

from bestiary.kernels.backends import native
from bestiary.kernels.backends.library import define, differentiate

_INPUTS = "Tensor x, Tensor weight, Tensor? z, float eps, int size, bool norm_first"
_DIMENSIONS = 5  # what the C++ counts rows in


def rms_norm_gated_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> torch.Tensor:
    """See :func:`bestiary.kernels.rms_norm_gated`; arguments are taken as checked."""
    size = group_size or x.shape[-1]
    if x.ndim > _DIMENSIONS:
        x_NF, z_NF = (None if t is None else t.flatten(0, -2) for t in (x, z))
        return _norm(x_NF, weight, z_NF, eps, size, norm_before_gate).view(x.shape)
    return _norm(x, weight, z, eps, size, norm_before_gate)


def _empty(like):
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _forward(x, weight, z, eps, size, norm_first):
    out = _empty(x)
    native.ops().gated_norm_forward(x, weight, z, eps, size, norm_first, out)
    return out


def _fake(x, weight, z, eps, size, norm_first):
    return _empty(x)


def _gradients(x, weight, z, needed):
    inputs = zip((x, weight, z), needed, strict=True)
    return [_empty(t) if need and t is not None else None for t, need in inputs]


def _backward(x, weight, z, eps, size, norm_first, dout, needed):
    grads = _gradients(x, weight, z, needed)
    native.ops().gated_norm_backward(x, weight, z, eps, size, norm_first, dout, *grads)
    return [g for g in grads if g is not None]


def _backward_fake(x, weight, z, eps, size, norm_first, dout, needed):
    return [g for g in _gradients(x, weight, z, needed) if g is not None]


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.eps, ctx.size, ctx.norm_first = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dout: torch.Tensor):
    tensors = list(ctx.saved_tensors)
    needed = list(ctx.needs_input_grad[:3])
    options = (ctx.eps, ctx.size, ctx.norm_first)
    rest = (None,) * 3
    if torch.is_grad_enabled():  # create_graph: the result must be differentiable itself
        from bestiary.kernels.gated_norm.reference import rms_norm_gated_ref

        def function(*arguments):
            return (rms_norm_gated_ref(*arguments, *options),)

        return (*differentiate(function, tensors, [dout], needed), *rest)
    found = iter(_norm_backward(*tensors, *options, dout, needed))
    return (*(next(found) if need and t is not None else None for t, need in zip(tensors, needed, strict=True)), *rest)


_norm = define(f"gated_norm({_INPUTS}) -> Tensor", _forward, _fake, _setup_context, _autograd)
_norm_backward = define(
    f"gated_norm_backward({_INPUTS}, Tensor dout, bool[] needed) -> Tensor[]", _backward, _backward_fake
)
