"""The selective scan in C++, as an op that autograd and torch.compile take whole.

Shape legend: B batch, K orders of one row, G groups of B and C, E channels of an order, N states, L tokens. The op
knows rows and orders apart, so that several orders of one input are views of it and not copies.
"""

from __future__ import annotations

from math import lcm
from typing import Any

import torch

from bestiary.kernels.backends import native
from bestiary.kernels.backends.library import as_index, define, differentiate, empty_rows, needs_grad

_CHUNK = 64  # csrc/tile.h: steps between saved states

_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, Tensor? h0, "
    "Tensor? seq, Tensor? order, bool softplus, bool reverse"
)


def selective_scan_cpu(
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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See :func:`bestiary.kernels.selective_scan_fn`; arguments are taken as checked."""
    several = scan_order is not None and scan_order.ndim == 3
    K = scan_order.shape[1] if several else 1  # type: ignore[union-attr]

    def rows(x: torch.Tensor | None) -> torch.Tensor | None:
        """(B, ...) to (B, K, ...), a view."""
        return None if x is None else x[:, None].expand(-1, K, *x.shape[1:])

    def maps(m: torch.Tensor) -> torch.Tensor:
        """Constant (D, N) to (K, D, N); variable ones to (B, K, G, N, L)."""
        if m.ndim == 2:
            return m[None].expand(K, -1, -1)
        return m[:, None].expand(-1, K, -1, -1, -1)

    def params(p: torch.Tensor | None) -> torch.Tensor | None:
        return None if p is None else p[None].expand(K, *p.shape)

    B, C = (m[:, None] if m.ndim == 3 else m for m in (B, C))  # one group
    if B.ndim == 4 and C.ndim == 4 and B.shape[1] != C.shape[1] and min(B.shape[1], C.shape[1]) > 0:
        # groups of different sizes: as many as both can be cut into
        groups = lcm(B.shape[1], C.shape[1])
        B, C = (m.repeat_interleave(groups // m.shape[1], dim=1) for m in (B, C))
    order = None if scan_order is None else (scan_order if several else scan_order[:, None])
    out, last, _ = _scan(
        rows(u), rows(delta), params(A), maps(B), maps(C), params(D), rows(z), params(delta_bias), rows(initial_state),
        as_index(seq_idx), order, delta_softplus, reverse, out_dtype or u.dtype,
        needs_grad(u, delta, A, B, C, D, z, delta_bias, initial_state),
    )  # fmt: skip
    if not several:
        out, last = out.squeeze(1), last.squeeze(1)  # a plain index would copy the gradient
    return (out, last) if return_last_state else out


def _saved_size(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> int:
    """Floats that the forward keeps: the state of each block of channels before each chunk."""
    batch, K, E, L = u.shape
    lanes, N = native.lanes(), A.shape[-1]
    G = B.shape[2] if B.ndim == 5 else C.shape[2] if C.ndim == 5 else 1
    return batch * K * G * -(-(E // G) // lanes) * -(-L // _CHUNK) * -(-N // 4) * 4 * lanes


def _outputs(u, A, B, C, out_dtype, save):
    last = u.new_empty((*u.shape[:3], A.shape[-1]), dtype=torch.float32)
    saved = u.new_empty(_saved_size(u, A, B, C) if save else 0, dtype=torch.float32)
    return empty_rows(u, out_dtype), last, saved


def _forward(u, delta, A, B, C, D, z, bias, h0, seq, order, softplus, reverse, out_dtype, save):
    out, last, saved = _outputs(u, A, B, C, out_dtype, save)
    inputs = (u, delta, A, B, C, D, z, bias, h0, seq, order, softplus, reverse)
    native.ops().scan_forward(*inputs, out, last, saved if save else None)
    return out, last, saved


def _forward_fake(u, delta, A, B, C, D, z, bias, h0, seq, order, softplus, reverse, out_dtype, save):
    return _outputs(u, A, B, C, out_dtype, save)


def _empty_gradients(tensors: tuple, needed: list[bool]) -> list[torch.Tensor | None]:
    """As the kernel writes them: gradients of variable B and C are float32, a row of states for each token."""

    def empty(i: int, t: torch.Tensor) -> torch.Tensor:
        if not tensors[0].numel():  # no work, so that nothing would be written
            return t.new_zeros((*t.shape[:3], t.shape[4], t.shape[3]) if t.ndim == 5 else t.shape)
        if t.ndim == 5:
            return t.new_empty((*t.shape[:3], t.shape[4], t.shape[3]), dtype=torch.float32)
        if i in (0, 1, 6):  # u, delta, z
            return empty_rows(t, t.dtype)
        return t.new_empty(t.shape)

    return [
        empty(i, t) if need and t is not None else None for i, (t, need) in enumerate(zip(tensors, needed, strict=True))
    ]


def _finish(tensors: tuple, grads: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """As autograd wants them, those that exist."""
    pairs = [(t, g) for t, g in zip(tensors, grads, strict=True) if g is not None]
    return [(g.transpose(3, 4) if t.ndim == 5 else g).to(t.dtype) for t, g in pairs]


def _backward(u, delta, A, B, C, D, z, bias, h0, seq, order, softplus, reverse, dout, dlast, saved, needed):
    tensors = (u, delta, A, B, C, D, z, bias, h0)
    grads = _empty_gradients(tensors, needed)
    native.ops().scan_backward(*tensors, seq, order, softplus, reverse, dout, dlast, saved, *grads)
    return _finish(tensors, grads)


def _backward_fake(u, delta, A, B, C, D, z, bias, h0, seq, order, softplus, reverse, dout, dlast, saved, needed):
    tensors = (u, delta, A, B, C, D, z, bias, h0)
    return _finish(tensors, _empty_gradients(tensors, needed))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.softplus, ctx.reverse, ctx.out_dtype, save = inputs
    if save:
        ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _autograd(ctx: Any, dout: torch.Tensor, dlast: torch.Tensor, _: torch.Tensor):
    *tensors, seq, order, saved = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:9])
    rest = (None,) * 6
    if torch.is_grad_enabled():  # create_graph: the result must be differentiable itself

        def function(*arguments):
            return _reference(*arguments, seq, order, ctx.softplus, ctx.reverse, ctx.out_dtype)

        return (*differentiate(function, tensors, [dout, dlast], needed), *rest)
    found = iter(_scan_backward(*tensors, seq, order, ctx.softplus, ctx.reverse, dout, dlast, saved, needed))
    return (*(next(found) if need and t is not None else None for t, need in zip(tensors, needed, strict=True)), *rest)


def _reference(u, delta, A, B, C, D, z, bias, h0, seq, order, softplus, reverse, out_dtype):
    """The op in plain PyTorch, an order at a time."""
    from bestiary.kernels.selective_scan.reference import selective_scan_ref

    outs, lasts = [], []
    for k in range(u.shape[1]):
        B_k, C_k = (m[k] if m.ndim == 3 else m[:, k] for m in (B, C))
        u_k, delta_k, z_k, h0_k, order_k = (None if t is None else t[:, k] for t in (u, delta, z, h0, order))
        A_k, D_k, bias_k = (None if t is None else t[k] for t in (A, D, bias))
        out, last = selective_scan_ref(
            u_k, delta_k, A_k, B_k, C_k, D_k, z_k, bias_k, softplus, True,  # pyright: ignore[reportArgumentType]
            initial_state=h0_k, scan_order=order_k, reverse=reverse, seq_idx=seq, out_dtype=out_dtype,
        )  # fmt: skip
        outs.append(out)
        lasts.append(last)
    return torch.stack(outs, 1), torch.stack(lasts, 1)


_scan = define(
    f"selective_scan({_INPUTS}, ScalarType out_dtype, bool save) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup_context,
    _autograd,
)
_scan_backward = define(
    f"selective_scan_backward({_INPUTS}, Tensor dout, Tensor dlast, Tensor saved, bool[] needed) -> Tensor[]",
    _backward,
    _backward_fake,
)
