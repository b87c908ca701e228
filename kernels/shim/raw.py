"""The raw extension modules that forks call by themselves: ``selective_scan_cuda`` and its relatives.

Each has ``fwd`` and ``bwd`` without autograd, with the argument order of the C++ they stand for; gradients come from
our differentiable ops. Argument lists changed between versions of causal-conv1d and are told apart by length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bestiary import kernels
from bestiary.kernels.shim.counts import counted

Tensors = list[torch.Tensor | None]


@counted("selective_scan", "selective_scan_cuda.fwd")
def scan_fwd(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, cu_seqlens=None) -> Tensors:
    """``selective_scan_cuda.fwd``: ``[out, x]``, with z ``[out before the gate, x, out]``.

    x is (B, D, 1, 2N): the last state at odd places, the product of all decays at even ones, as upstream has them for
    its last chunk.
    """
    _no_cu_seqlens(cu_seqlens)
    with torch.no_grad():
        out, x = _scan_with_state(u, delta, A, B, C, D, delta_bias, delta_softplus)
        if z is None:
            return [out, x]
        gated = kernels.selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        assert isinstance(gated, torch.Tensor)
        return [out, x, gated]


@counted("selective_scan", "selective_scan_cuda.bwd")
def scan_bwd(
    u, delta, A, B, C, D, z, delta_bias, dout, x=None, out=None, dz=None, delta_softplus=False, recompute_out_z=False,
    cu_seqlens=None,
) -> Tensors:  # fmt: skip
    """``selective_scan_cuda.bwd``: ``[du, ddelta, dA, dB, dC, dD, ddelta_bias]``, with z also dz, and out if asked for.

    ``dz`` may be memory to write to; x and out of the forward pass are not needed.
    """
    _no_cu_seqlens(cu_seqlens)
    grads, y = _scan_gradients([u, delta, A, B, C, D, delta_bias, z], dout, delta_softplus)
    *grads, grad_z = grads
    if z is None:
        return grads
    if dz is not None:
        grad_z = dz.copy_(grad_z)
    return [*grads, grad_z, y] if recompute_out_z else [*grads, grad_z]


@counted("selective_scan", "selective_scan_cuda_core.fwd")
def core_fwd(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, nrows=1) -> Tensors:
    """VMamba's ``selective_scan_cuda_core.fwd``: ``[out, x]``; there is no gate."""
    with torch.no_grad():
        return list(_scan_with_state(u, delta, A, B, C, D, delta_bias, delta_softplus))


@counted("selective_scan", "selective_scan_cuda_oflex.fwd")
def oflex_fwd(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, nrows=1, out_float=True) -> Tensors:
    """VMamba's ``selective_scan_cuda_oflex.fwd``: as the core one, with a float32 output if ``out_float``."""
    with torch.no_grad():
        dtype = torch.promote_types(u.dtype, torch.float32) if out_float else None
        return list(_scan_with_state(u, delta, A, B, C, D, delta_bias, delta_softplus, dtype))


@counted("selective_scan", "selective_scan_cuda_core.bwd")
def core_bwd(u, delta, A, B, C, D, delta_bias, dout, x=None, delta_softplus=False, nrows=1) -> Tensors:
    """VMamba's ``selective_scan_cuda_core.bwd``: ``[du, ddelta, dA, dB, dC, dD, ddelta_bias]``."""
    grads, _ = _scan_gradients([u, delta, A, B, C, D, delta_bias, None], dout, delta_softplus)
    return grads[:7]


oflex_bwd = counted("selective_scan", "selective_scan_cuda_oflex.bwd")(core_bwd.__wrapped__)


@counted("causal_conv1d", "causal_conv1d_cuda.causal_conv1d_fwd")
def conv_fwd(x, weight, bias, *rest) -> torch.Tensor | None:
    """``causal_conv1d_cuda.causal_conv1d_fwd``: x, weight, bias, then one of

    ``silu`` | ``seq_idx, silu`` | ``seq_idx, initial_states, final_states_out, silu`` |
    ``seq_idx, initial_states, out, final_states_out, silu`` (which writes to out and returns nothing).
    """
    seq_idx = initial = final = target = None
    if len(rest) == 2:
        seq_idx = rest[0]
    elif len(rest) == 4:
        seq_idx, initial, final = rest[:3]
    elif len(rest) == 5:
        seq_idx, initial, target, final = rest[:4]
    elif len(rest) != 1:
        raise TypeError(f"causal_conv1d_fwd takes 4, 5, 7 or 8 arguments, got {3 + len(rest)}")
    with torch.no_grad():
        out = kernels.causal_conv1d_fn(x, weight, bias, seq_idx, initial, False, final, _activation(rest[-1]))
    assert isinstance(out, torch.Tensor)
    if target is None:
        return out
    target.copy_(out)
    return None


@counted("causal_conv1d", "causal_conv1d_cuda.causal_conv1d_bwd")
def conv_bwd(x, weight, bias, dout, *rest) -> tuple[torch.Tensor | None, ...]:
    """``causal_conv1d_cuda.causal_conv1d_bwd``: x, weight, bias, dout, then one of

    ``dx, silu`` | ``seq_idx, dx, silu`` | ``seq_idx, initial_states, dfinal_states, dx, return_dinitial_states, silu``.

    ``dx`` may be memory to write to. Returns ``(dx, dweight, dbias)``, in the last form also ``dinitial_states``.
    """
    seq_idx = initial = dfinal = None
    if len(rest) == 2:
        target = rest[0]
    elif len(rest) == 3:
        seq_idx, target = rest[:2]
    elif len(rest) == 6:
        seq_idx, initial, dfinal, target = rest[:4]
    else:
        raise TypeError(f"causal_conv1d_bwd takes 6, 7 or 10 arguments, got {4 + len(rest)}")
    with torch.enable_grad():
        leaves = _leaves([x, weight, bias, initial])
        own, w, b, h = leaves
        found = kernels.causal_conv1d_fn(own, w, b, seq_idx, h, dfinal is not None, None, _activation(rest[-1]))
        outputs, into = (list(found), [dout, dfinal]) if isinstance(found, tuple) else ([found], [dout])
        dx, dw, db, dinitial = _gradients(outputs, leaves, into)
    if target is not None:
        dx = target.copy_(dx)
    return (dx, dw, db, dinitial) if len(rest) == 6 else (dx, dw, db)


@counted("causal_conv1d_update", "causal_conv1d_cuda.causal_conv1d_update")
def conv_update(x, conv_state, weight, bias, silu, *rest) -> torch.Tensor:
    """``causal_conv1d_cuda.causal_conv1d_update``: ``…, silu[, cache_seqlens[, conv_state_indices]]``."""
    return kernels.causal_conv1d_update(x, conv_state, weight, bias, _activation(silu), *rest)


def _activation(silu: Any) -> str | None:
    return "silu" if silu in (True, "silu", "swish") else None


def _scan_with_state(u, delta, A, B, C, D, delta_bias, delta_softplus, out_dtype=None):
    out, last = kernels.selective_scan_fn(
        u, delta, A, B, C, D, None, delta_bias, delta_softplus, True, out_dtype=out_dtype
    )
    steps = delta.to(last.dtype)
    if delta_bias is not None:
        steps = steps + delta_bias.to(last.dtype)[:, None]
    steps = F.softplus(steps) if delta_softplus else steps
    decay = torch.exp(steps.sum(-1)[..., None] * A.to(last.dtype))
    return out, torch.stack([decay, last], dim=-1).flatten(-2)[:, :, None]


def _scan_gradients(inputs: list, dout: torch.Tensor, delta_softplus: bool) -> tuple[Tensors, torch.Tensor]:
    """Gradients for u, delta, A, B, C, D, delta_bias and z, and the output."""
    with torch.enable_grad():
        leaves = _leaves(inputs)
        u, delta, A, B, C, D, delta_bias, z = leaves
        y = kernels.selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, out_dtype=dout.dtype)
        assert isinstance(y, torch.Tensor)
        return _gradients([y], leaves, [dout]), y.detach()


def _leaves(tensors: list) -> list:
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def _gradients(outputs: list, leaves: list, into: list) -> Tensors:
    found = iter(torch.autograd.grad(outputs, [t for t in leaves if t is not None], into))
    return [None if t is None else next(found) for t in leaves]


def _no_cu_seqlens(cu_seqlens: Any) -> None:
    if cu_seqlens is not None:
        raise NotImplementedError("the shim's selective_scan_cuda has no cu_seqlens; use selective_scan_fn's seq_idx")
