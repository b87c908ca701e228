"""The selective scan in plain PyTorch: the specification, and what runs where nothing else does.

Shape legend: L steps, B batch, G groups of B and C, E channels of a group (D = G * E), N states.

There are two forms of the same recurrence. :func:`recurrence` is the definition, in operations that autograd can
differentiate any number of times. :class:`_ChunkedScan` is what trains: it walks a chunk of the sequence at a
time, keeps one state per chunk and computes the chunk again in the backward pass, so nothing of the size
(L, B, D, N) is ever held; it uses the definition for gradients of gradients. On one core, forward and backward,
(B, D, L, N) = (6, 66, 512, 16) took 27 ms against 48 ms for the definition, and (2, 256, 1120, 16) 69 ms against
296 ms; a two-level scan (square-root chunks in parallel) was slower than both except for very few channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bestiary.kernels.scan_order import gather_tokens, invert_order

_CHUNK_ELEMENTS = 1 << 18
"""Size of the (T, B, D, N) tensors of one chunk, about what a core's cache holds; larger is slower, measured."""


def selective_scan_ref(
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
    if scan_order is not None and scan_order.ndim == 3:
        options = {"initial_state": initial_state, "reverse": reverse, "seq_idx": seq_idx, "out_dtype": out_dtype}
        rows = [
            selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True, scan_order=order, **options)
            for order in scan_order.unbind(1)
        ]
        out, last = (torch.stack(part, 1) for part in zip(*rows, strict=True))
        return (out, last) if return_last_state else out
    with torch.autocast(u.device.type, enabled=False):
        batch, dim, length = u.shape
        work = torch.promote_types(u.dtype, torch.float32)
        dt = delta.to(work)
        if delta_bias is not None:
            dt = dt + delta_bias.to(work)[:, None]
        if delta_softplus:
            dt = F.softplus(dt)
        inverse = None if scan_order is None else invert_order(scan_order)

        def to_walk(x: torch.Tensor) -> torch.Tensor:
            """(B, F, L) in image order to (L, B, F) in walking order, contiguous."""
            if scan_order is not None:
                x = gather_tokens(x.transpose(1, 2), scan_order, inverse, backend="reference").transpose(1, 2)
            x = x.permute(2, 0, 1)
            # a flipped tensor may have any strides, and what is written with out= must be dense to be compiled
            return (x.flip(0) if reverse else x).contiguous()

        state_dtype = torch.promote_types(work, torch.complex32) if A.is_complex() else work
        B, C = (_grouped(_map(m, work, state_dtype), batch, length) for m in (B, C))
        if B.shape[1] != C.shape[1]:  # one of the two is per group, the other per channel or common
            B, C = (m.repeat_interleave(dim // m.shape[1], dim=1) for m in (B, C))
        G, N = B.shape[1], A.shape[1]
        u_LBGE, dt_LBGE = (to_walk(x).reshape(length, batch, G, dim // G) for x in (u.to(work), dt))
        B_LBGN, C_LBGN = (to_walk(m.flatten(1, 2)).reshape(length, batch, G, N) for m in (B, C))
        A_GEN = A.to(state_dtype).reshape(G, dim // G, N)
        shape = (batch, G, dim // G, N)
        h0 = A_GEN.new_zeros(shape) if initial_state is None else initial_state.to(state_dtype).reshape(shape)
        keep_LB = None if seq_idx is None else _keep(to_walk(seq_idx[:, None])[..., 0], work)
        arguments = (u_LBGE, dt_LBGE, A_GEN, B_LBGN, C_LBGN, h0, keep_LB)
        if A.is_complex():  # rare: each state stands for itself and its conjugate
            y_LBGE, h = recurrence(*arguments)
            y_LBGE = 2 * y_LBGE.real
        else:
            y_LBGE, h = _ChunkedScan.apply(*arguments)  # type: ignore[misc]

        y_LBD = y_LBGE.flatten(2)
        y_BLD = (y_LBD.flip(0) if reverse else y_LBD).transpose(0, 1)
        if scan_order is not None:
            y_BLD = gather_tokens(y_BLD, inverse, scan_order, backend="reference")  # type: ignore[arg-type]
        y = y_BLD.transpose(1, 2)
        if D is not None:
            y = y + u.to(work) * D.to(work)[:, None]
        if z is not None:
            y = y * F.silu(z.to(work))
        y = y.to(out_dtype or u.dtype)
        return (y, h.flatten(1, 2)) if return_last_state else y


def recurrence(
    u_LBGE: torch.Tensor,
    dt_LBGE: torch.Tensor,
    A_GEN: torch.Tensor,
    B_LBGN: torch.Tensor,
    C_LBGN: torch.Tensor,
    h0_BGEN: torch.Tensor,
    keep_LB: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: ``h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t``, ``y_t = C_t h_t``, step by step.

    Args:
        u_LBGE: input, time first.
        dt_LBGE: step sizes.
        A_GEN: state matrix.
        B_LBGN: input map.
        C_LBGN: output map.
        h0_BGEN: state before the first step.
        keep_LB: 0 where the state is reset before the step, 1 elsewhere; None for no resets.

    Returns:
        y (L, B, G, E) and the last state (B, G, E, N).
    """
    a = torch.exp(dt_LBGE[..., None] * A_GEN)
    if keep_LB is not None:
        a = a * keep_LB[:, :, None, None, None]
    x = (dt_LBGE * u_LBGE)[..., None] * B_LBGN[:, :, :, None]
    # unbind once: indexing a and x in the loop would make the backward pass quadratic in L
    h, states = h0_BGEN, []
    for a_t, x_t in zip(a.unbind(0), x.unbind(0), strict=True):
        h = a_t * h + x_t
        states.append(h)
    y = (torch.stack(states) * C_LBGN[:, :, :, None]).sum(-1)
    return y, h


class _ChunkedScan(torch.autograd.Function):
    """:func:`recurrence`, a chunk at a time and with its gradient by hand; arguments the same."""

    @staticmethod
    def forward(ctx: Any, u, dt, A, B, C, h0, keep):
        y, h, starts = torch.empty_like(u), h0, []
        for lo, hi in _chunks(dt, A):
            starts.append(h)
            x = (dt[lo:hi] * u[lo:hi])[..., None] * B[lo:hi, :, :, None]
            for a_t, x_t in zip(_decay(dt, A, keep, lo, hi).unbind(0), x.unbind(0), strict=True):
                h = torch.addcmul(x_t, a_t, h, out=x_t)
            h = h.clone()  # h is a view of x, which now becomes C * h
            torch.sum(x.mul_(C[lo:hi, :, :, None]), -1, out=y[lo:hi])
        ctx.save_for_backward(u, dt, A, B, C, h0, keep, *starts[1:])
        return y, h

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        u, dt, A, B, C, h0, keep, *starts = ctx.saved_tensors
        dy, dh = grads
        if torch.is_grad_enabled():  # create_graph: the result must be differentiable itself
            # aliases, because one input may be a function of another and only the direct gradient is wanted here
            inputs = [t.view_as(t) for t in (u, dt, A, B, C, h0)]
            wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need and t.requires_grad]
            outputs = recurrence(*inputs, keep_LB=keep)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            outputs, into = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, wanted, into, create_graph=True))
            return *(next(found) if any(t is w for w in wanted) else None for t in inputs), None
        return *_chunked_gradient(u, dt, A, B, C, [h0, *starts], keep, dy, dh), None


def _chunked_gradient(u, dt, A, B, C, starts, keep, dy, dh):
    """Gradients for u, dt, A, B, C and h0, last chunk first.

    With ``g_t = dLoss/dh_t = C_t dy_t + a_{t+1} g_{t+1}`` and ``q_t = g_t a_t h_{t-1}``. The product a_t h_{t-1}
    is kept as such: h_t - dt_t u_t B_t would cancel where a is small.
    """
    du, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (u, dt, B, C))
    dA = torch.zeros_like(A)
    carry = dh
    for (lo, hi), start in zip(reversed(_chunks(dt, A)), reversed(starts), strict=True):
        u_c, dt_c, dy_c = u[lo:hi], dt[lo:hi], dy[lo:hi]
        B_c, C_c = B[lo:hi, :, :, None], C[lo:hi, :, :, None]
        a, x = _decay(dt, A, keep, lo, hi), dt_c * u_c
        h, q = x[..., None] * B_c, torch.empty_like(a)
        before = start
        for a_t, h_t, q_t in zip(a.unbind(0), h.unbind(0), q.unbind(0), strict=True):
            before = h_t.add_(torch.mul(a_t, before, out=q_t))
        torch.sum(h.mul_(dy_c[..., None]), -2, out=dC[lo:hi])
        g = torch.mul(dy_c[..., None], C_c, out=h)
        for a_t, g_t in zip(reversed(a.unbind(0)), reversed(g.unbind(0)), strict=True):
            carry = torch.mul(a_t, g_t.add_(carry), out=a_t)
        carry = carry.clone()  # it is a view of a, which is free from here on
        torch.sum(torch.mul(g, x[..., None], out=a), -2, out=dB[lo:hi])
        q.mul_(g)
        s = g.mul_(B_c).sum(-1)
        torch.mul(s, dt_c, out=du[lo:hi])
        dA += torch.mul(q, dt_c[..., None], out=g).sum((0, 1))
        torch.addcmul(q.mul_(A).sum(-1), u_c, s, out=ddt[lo:hi])
    return du, ddt, dA, dB, dC, carry


def _chunks(dt: torch.Tensor, A: torch.Tensor) -> list[tuple[int, int]]:
    """Where the chunks begin and end. At least 8 steps, so that the work per step hides the cost of a call."""
    L, per_step = dt.shape[0], max(1, dt[0].numel() * A.shape[-1])
    T = max(8, _CHUNK_ELEMENTS // per_step)
    return [(lo, min(lo + T, L)) for lo in range(0, L, T)]


def _decay(dt: torch.Tensor, A: torch.Tensor, keep: torch.Tensor | None, lo: int, hi: int) -> torch.Tensor:
    a = torch.exp_(dt[lo:hi, ..., None] * A)
    return a if keep is None else a.mul_(keep[lo:hi, :, None, None, None])


def _map(m: torch.Tensor, work: torch.dtype, state_dtype: torch.dtype) -> torch.Tensor:
    """B or C in the dtype of the state; with a complex one, a map that varies has 2L real numbers for L tokens."""
    if state_dtype.is_complex and m.ndim > 2 and not m.is_complex():
        return torch.view_as_complex(m.to(work).unflatten(-1, (-1, 2)).contiguous())
    return m.to(state_dtype)


def _grouped(m: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Any form of B or C as (B, G, N, L); a constant one is a group per channel, without copying."""
    if m.ndim == 2:
        return m[None, :, :, None].expand(batch, -1, -1, length)
    return m[:, None] if m.ndim == 3 else m


def _keep(seq_LB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    keep = torch.ones(seq_LB.shape, dtype=dtype, device=seq_LB.device)
    keep[1:] = (seq_LB[1:] == seq_LB[:-1]).to(dtype)
    return keep
