"""The causal depthwise convolution in C++, as an op that autograd and torch.compile take whole.

Shape legend: B batch, K orders of one row, D channels, L tokens, W width.
"""

from __future__ import annotations

from typing import Any

import torch

from bestiary.kernels.backends import native
from bestiary.kernels.backends.library import as_index, define, differentiate, empty_rows

_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial, Tensor? seq, Tensor? order, bool silu, bool reverse, "
    "bool final"
)


def causal_conv1d_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    scan_order: torch.Tensor | None = None,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See :func:`bestiary.kernels.causal_conv1d_fn`; arguments are taken as checked."""
    several = scan_order is not None and scan_order.ndim == 3
    K = scan_order.shape[1] if several else 1  # type: ignore[union-attr]
    order = scan_order[:, None] if scan_order is not None and not several else scan_order
    initial = None if initial_states is None else initial_states[:, None].expand(-1, K, -1, -1)
    final_wanted = return_final_states or final_states_out is not None
    out, final = _conv(
        x[:, None].expand(-1, K, -1, -1), weight, bias, initial, as_index(seq_idx), order, activation is not None,
        reverse, final_wanted, out_dtype or x.dtype,
    )  # fmt: skip
    if not several:
        out, final = out.squeeze(1), final.squeeze(1)  # a plain index would copy the gradient
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return (out, final) if return_final_states else out


def _outputs(x, weight, final, out_dtype):
    states = x.new_empty((*x.shape[:3], weight.shape[1] - 1 if final else 0))
    return empty_rows(x, out_dtype), states


def _forward(x, weight, bias, initial, seq, order, silu, reverse, final, out_dtype):
    out, states = _outputs(x, weight, final, out_dtype)
    native.ops().conv_forward(x, weight, bias, initial, seq, order, silu, reverse, out)
    if final:
        states.copy_(final_states(x, weight.shape[1] - 1, initial, order, reverse))
    return out, states


def _fake(x, weight, bias, initial, seq, order, silu, reverse, final, out_dtype):
    return _outputs(x, weight, final, out_dtype)


def final_states(x, n, initial, order, reverse):
    """The last n inputs along the walk, (B, K, D, n): the states before the first where the row is shorter."""
    L = x.shape[3]
    steps = torch.arange(max(0, L - n), L, device=x.device)
    tokens = L - 1 - steps if reverse else steps
    if order is None:
        own = x[..., tokens]
    else:
        index = order[:, :, tokens].long()
        own = torch.gather(x, 3, index[:, :, None].expand(-1, -1, x.shape[2], -1))
    if n > L:
        before = x.new_zeros((*x.shape[:3], n)) if initial is None else initial.to(x.dtype)
        own = torch.cat([before[..., L:], own], dim=3)
    return own


def _gradients(x, weight, bias, initial, needed):
    grads = (empty_rows(x, x.dtype), torch.empty_like(weight), bias, initial)
    grads = (*grads[:2], *(None if t is None else t.new_empty(t.shape) for t in (bias, initial)))
    return [g if need else None for g, need in zip(grads, needed, strict=True)]


def _backward(x, weight, bias, initial, seq, order, silu, reverse, final, dout, dfinal, needed):
    grads = _gradients(x, weight, bias, initial, needed)
    inputs = (x, weight, bias, initial, seq, order, silu, reverse)
    native.ops().conv_backward(*inputs, dout, dfinal if final else None, *grads)
    return [g for g in grads if g is not None]


def _backward_fake(x, weight, bias, initial, seq, order, silu, reverse, final, dout, dfinal, needed):
    return [g for g in _gradients(x, weight, bias, initial, needed) if g is not None]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.silu, ctx.reverse, ctx.final, ctx.out_dtype = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dout: torch.Tensor, dfinal: torch.Tensor):
    *tensors, seq, order = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:4])
    rest = (None,) * 6
    if torch.is_grad_enabled():  # create_graph: the result must be differentiable itself

        def function(*arguments):
            return _reference(*arguments, seq, order, ctx.silu, ctx.reverse, ctx.final, ctx.out_dtype)

        return (*differentiate(function, tensors, [dout, dfinal][: 1 + ctx.final], needed), *rest)
    found = iter(_conv_backward(*tensors, seq, order, ctx.silu, ctx.reverse, ctx.final, dout, dfinal, needed))
    return (*(next(found) if need and t is not None else None for t, need in zip(tensors, needed, strict=True)), *rest)


def _reference(x, weight, bias, initial, seq, order, silu, reverse, final, out_dtype):
    from bestiary.kernels.causal_conv1d.reference import causal_conv1d_ref

    rows = []
    for k in range(x.shape[1]):
        past, own = (None if t is None else t[:, k] for t in (initial, order))
        rows.append(
            causal_conv1d_ref(
                x[:, k],
                weight,
                bias,
                seq,
                past,
                final,
                None,
                "silu" if silu else None,
                scan_order=own,
                reverse=reverse,
                out_dtype=out_dtype,
            )
        )
    if not final:
        return (torch.stack(rows, 1),)
    return tuple(torch.stack(part, 1) for part in zip(*rows, strict=True))


_conv = define(
    f"causal_conv1d({_INPUTS}, ScalarType out_dtype) -> (Tensor, Tensor)", _forward, _fake, _setup_context, _autograd
)
_conv_backward = define(
    f"causal_conv1d_backward({_INPUTS}, Tensor dout, Tensor dfinal, bool[] needed) -> Tensor[]",
    _backward,
    _backward_fake,
)
