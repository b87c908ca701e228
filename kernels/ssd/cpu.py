"""Mamba-2's scan in C++, as an op that autograd and torch.compile take whole.

Shape legend: B batch, L tokens, H heads, P channels of a head, G groups, N states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bestiary.kernels.backends import native
from bestiary.kernels.backends.library import as_index, define, differentiate, needs_grad

_KEPT = 256  # csrc/ssd.h: tokens between states that the forward keeps

_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? bias, Tensor? initial, Tensor? seq, "
    "Tensor? order, bool softplus, float low, float high, bool reverse"
)


def chunk_scan_cpu(
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
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    *,
    scan_order: torch.Tensor | None = None,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`bestiary.kernels.mamba_chunk_scan_combined`; arguments are taken as checked."""
    skip = D if D is None or D.ndim == 2 else D[:, None].expand(-1, x.shape[3])
    order = None if scan_order is None else scan_order[:, None]
    wanted = out_dtype or x.dtype
    out, last, _ = _scan(
        x, dt, A, B, C, skip, dt_bias, initial_states, as_index(seq_idx), order, dt_softplus, *dt_limit, reverse,
        wanted if z is None else torch.float32, needs_grad(x, dt, A, B, C, D, dt_bias, initial_states),
    )  # fmt: skip
    if z is not None:
        with torch.autocast(x.device.type, enabled=False):
            out = (out * F.silu(z.float())).to(wanted)
    return out, last if state_dtype is None else last.to(state_dtype)


def _outputs(x, B, out_dtype, save):
    batch, L, H, P = x.shape
    lanes, N = native.lanes(), B.shape[3]
    size = -(-P // lanes) * lanes * -(-N // lanes) * lanes
    out = x.new_empty(x.shape, dtype=out_dtype)
    last = x.new_empty((batch, H, P, N), dtype=torch.float32)
    return out, last, x.new_empty(batch * H * -(-L // _KEPT) * size if save else 0, dtype=torch.float32)


def _forward(x, dt, A, B, C, D, bias, initial, seq, order, softplus, low, high, reverse, out_dtype, save):
    out, last, saved = _outputs(x, B, out_dtype, save)
    inputs = (x, dt, A, B, C, D, bias, initial, seq, order, softplus, low, high, reverse)
    native.ops().ssd_forward(*inputs, out, last, saved if save else None)
    return out, last, saved


def _forward_fake(x, dt, A, B, C, D, bias, initial, seq, order, softplus, low, high, reverse, out_dtype, save):
    return _outputs(x, B, out_dtype, save)


def _empty_gradients(tensors: tuple, needed: list[bool]) -> list[torch.Tensor | None]:
    """As the kernel writes them: gradients of B and C are float32 and dense."""
    return [
        t.new_empty(t.shape, dtype=torch.float32 if i in (3, 4) else t.dtype) if need and t is not None else None
        for i, (t, need) in enumerate(zip(tensors, needed, strict=True))
    ]


def _finish(tensors: tuple, grads: list[torch.Tensor | None]) -> list[torch.Tensor]:
    return [g.to(t.dtype) for t, g in zip(tensors, grads, strict=True) if g is not None]


def _backward(
    x, dt, A, B, C, D, bias, initial, seq, order, softplus, low, high, reverse, dout, dlast, saved, needed
):  # fmt: skip
    tensors = (x, dt, A, B, C, D, bias, initial)
    grads = _empty_gradients(tensors, needed)
    native.ops().ssd_backward(*tensors, seq, order, softplus, low, high, reverse, dout, dlast, saved, *grads)
    return _finish(tensors, grads)


def _backward_fake(
    x, dt, A, B, C, D, bias, initial, seq, order, softplus, low, high, reverse, dout, dlast, saved, needed
):  # fmt: skip
    tensors = (x, dt, A, B, C, D, bias, initial)
    return _finish(tensors, _empty_gradients(tensors, needed))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.softplus, ctx.low, ctx.high, ctx.reverse, ctx.out_dtype, save = inputs
    if save:
        ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _autograd(ctx: Any, dout: torch.Tensor, dlast: torch.Tensor, _: torch.Tensor):
    *tensors, seq, order, saved = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:8])
    rest = (None,) * 8
    if torch.is_grad_enabled():  # create_graph: the result must be differentiable itself
        from bestiary.kernels.ssd.reference import mamba_chunk_scan_ref

        def function(x, dt, A, B, C, D, bias, initial):
            return mamba_chunk_scan_ref(
                x, dt, A, B, C, 64, D, None, bias, initial, seq, ctx.softplus, (ctx.low, ctx.high),
                scan_order=None if order is None else order[:, 0], reverse=ctx.reverse, out_dtype=ctx.out_dtype,
            )  # fmt: skip

        return (*differentiate(function, tensors, [dout, dlast], needed), *rest)
    limits = (ctx.softplus, ctx.low, ctx.high, ctx.reverse)
    found = iter(_scan_backward(*tensors, seq, order, *limits, dout, dlast, saved, needed))
    return (*(next(found) if need and t is not None else None for t, need in zip(tensors, needed, strict=True)), *rest)


_scan = define(
    f"ssd({_INPUTS}, ScalarType out_dtype, bool save) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _autograd,
)
_scan_backward = define(
    f"ssd_backward({_INPUTS}, Tensor dout, Tensor dlast, Tensor saved, bool[] needed) -> Tensor[]",
    _backward,
    _backward_fake,
)
