"""One matrix product for each group of rows, in one call: what a layer of experts is made of.

torch's ``grouped_mm`` does the work. It is an op of ours here, because torch 2.14's can be traced in half precision
alone and refuses gradients with strides of zero.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """``x[i] @ weight[e].T`` for the rows i of each group e. Under autocast in its dtype.

    Args:
        x: (R, in), rows sorted by group.
        weight: (E, out, in).
        ends: (E,) int32, where each group's rows end.

    Returns:
        (R, out).
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return _grouped_linear(x, weight, ends)
    return _product(x, weight.transpose(-2, -1), ends)


def _product(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(R, in) times (E, in, out) to (R, out); or (in, R) times (R, out) to (E, in, out)."""
    if a.dtype != torch.float64 and all(s == 1 or s * a.element_size() % 16 == 0 for s in a.stride() + b.stride()):
        return F.grouped_mm(a, b, offs=ends)
    # torch has no grouped product in float64, which is for checks of gradients, nor of rows that do not fill 16 bytes,
    # which no model has: neither is there for speed.
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    if b.ndim == 3:
        return torch.cat([rows @ matrix for rows, matrix in zip(a.split(sizes), b, strict=True)])
    return torch.stack([p @ q for p, q in zip(a.split(sizes, 1), b.split(sizes), strict=True)])


@torch.library.custom_op("bestiary_language::grouped_linear", mutates_args=())
def _grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    # torch pads the rows of some results; what is traced must know the strides.
    return _product(x, weight.transpose(-2, -1), ends).contiguous()


@_grouped_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("bestiary_language::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grad = grad.contiguous()
    return _product(grad, weight, ends).contiguous(), _product(grad.t(), x, ends).contiguous()


@_grouped_linear_backward.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor):
    return torch.empty_like(x), torch.empty_like(weight)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: torch.Tensor):
    x, weight, ends = ctx.saved_tensors
    dx, dweight = _grouped_linear_backward(grad, x, weight, ends)
    return dx, dweight, None


_grouped_linear.register_autograd(_backward, setup_context=_keep)
