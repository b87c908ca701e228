"""One scan direction of a Mamba-1 block: convolution, the projections to step, B and C, and the scan.

Everything between ``in_proj`` and ``out_proj`` is written here once; :func:`bestiary.kernels.mamba_inner_fn`, the
layers of :mod:`bestiary.shared.nn.mamba` and the shim's module all call it.

Shape legend: B batch, E inner channels, L tokens, N states, R rank of the step, W width of the convolution.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bestiary.kernels.causal_conv1d import causal_conv1d_fn
from bestiary.kernels.selective_scan import selective_scan_fn


class BranchWeights(NamedTuple):
    """The parameters of one direction, with mamba-ssm's names for them."""

    conv1d_weight: torch.Tensor
    """(E, 1, W) or (E, W)."""
    conv1d_bias: torch.Tensor | None
    x_proj_weight: torch.Tensor
    """(R + N for each of B and C that is not given, E)."""
    delta_proj_weight: torch.Tensor
    """(E, R)."""
    A: torch.Tensor
    """(E, N), negative."""
    B: torch.Tensor | None = None
    """Given instead of projected: (E, N), (B, N, L) or (B, G, N, L)."""
    C: torch.Tensor | None = None
    D: torch.Tensor | None = None
    delta_bias: torch.Tensor | None = None
    B_proj_bias: torch.Tensor | None = None
    C_proj_bias: torch.Tensor | None = None
    b_rms_weight: torch.Tensor | None = None
    """(N,): RMS-normalise B over its states; likewise C, and the step over its channels (E,)."""
    c_rms_weight: torch.Tensor | None = None
    dt_rms_weight: torch.Tensor | None = None


class ScanInputs(NamedTuple):
    """What a scan takes from the tokens."""

    u_BEL: torch.Tensor
    delta_BEL: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor


class Walk(NamedTuple):
    """How an op visits the tokens, and with which backend."""

    scan_order: torch.Tensor | None = None
    reverse: bool = False
    seq_idx: torch.Tensor | None = None
    backend: str | None = None


def scan_branch(
    x_BEL: torch.Tensor,
    z_BEL: torch.Tensor | None,
    weights: BranchWeights,
    walk: Walk,
    delta_softplus: bool = True,
    eps: float = 1e-6,
    full_precision: bool = False,
    out_dtype: torch.dtype | None = None,
    conv_state: torch.Tensor | None = None,
    ssm_state: torch.Tensor | None = None,
    return_states: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Convolution and scan of one direction.

    Args:
        x_BEL: (B, E, L), any strides; transposed (B, L, E) memory is walked as it lies, without a copy.
        z_BEL: (B, E, L) gate, or None for no gate.
        weights: the parameters.
        walk: order, direction, sequences and backend of convolution and scan.
        delta_softplus: apply softplus to the biased step.
        eps: of the RMS norms.
        full_precision: leave autocast for the projection to the step and the scan, in float32 or wider.
        out_dtype: dtype of the output, by default that of the scan's input.
        conv_state: (B, E, W-1) inputs before the first.
        ssm_state: (B, E, N) state before the first step.
        return_states: also return both states after the last step.

    Returns:
        ``(y, conv_state, ssm_state)`` with y (B, E, L); the states are None unless asked for.
    """
    inputs, conv_state = scan_inputs(x_BEL, weights, walk, eps, full_precision, conv_state, return_states)
    with _precision(x_BEL, full_precision):
        if z_BEL is not None and full_precision:
            z_BEL = z_BEL.to(inputs.u_BEL.dtype)
        found = run_scan(inputs, weights, walk, z_BEL, delta_softplus, out_dtype, ssm_state, return_states)
    return found[0], conv_state, found[1]


def scan_inputs(
    x_BEL: torch.Tensor,
    weights: BranchWeights,
    walk: Walk,
    eps: float = 1e-6,
    full_precision: bool = False,
    conv_state: torch.Tensor | None = None,
    return_state: bool = False,
) -> tuple[ScanInputs, torch.Tensor | None]:
    """The convolved input and the step, B and C projected from it, and the convolution's state if asked for."""
    kernel = weights.conv1d_weight
    u_BEL = causal_conv1d_fn(
        x_BEL,
        kernel[:, 0] if kernel.ndim == 3 else kernel,
        weights.conv1d_bias,
        walk.seq_idx,
        conv_state,
        return_state,
        activation="silu",
        scan_order=walk.scan_order,
        reverse=walk.reverse,
        backend=walk.backend,
    )
    last = None
    if isinstance(u_BEL, tuple):
        u_BEL, last = u_BEL
    R, N = weights.delta_proj_weight.shape[1], weights.A.shape[1]
    projected = F.linear(u_BEL.transpose(1, 2), weights.x_proj_weight)
    with _precision(x_BEL, full_precision):
        if full_precision:
            # a step in half precision would round the decay of every step; these are small tensors
            work = torch.promote_types(projected.dtype, torch.float32)
            projected, u_BEL = projected.to(work), u_BEL.to(work)
        sizes = [R] + [N for given in (weights.B, weights.C) if given is None]
        dt_BLR, *maps = projected.split(sizes, dim=-1)
        delta_BLE = F.linear(
            dt_BLR, weights.delta_proj_weight.to(work) if full_precision else weights.delta_proj_weight
        )
        if weights.dt_rms_weight is not None:
            delta_BLE = _rms(delta_BLE, weights.dt_rms_weight, eps)
        first, last_map = (maps[0], maps[-1]) if maps else (None, None)
        B = _input_map(weights.B, first, weights.B_proj_bias, weights.b_rms_weight, eps)
        C = _input_map(weights.C, last_map, weights.C_proj_bias, weights.c_rms_weight, eps)
    return ScanInputs(u_BEL, delta_BLE.transpose(1, 2), B, C), last


def run_scan(
    inputs: ScanInputs,
    weights: BranchWeights,
    walk: Walk,
    z_BEL: torch.Tensor | None,
    delta_softplus: bool = True,
    out_dtype: torch.dtype | None = None,
    ssm_state: torch.Tensor | None = None,
    return_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scan, and the state after it if asked for."""
    y_BEL = selective_scan_fn(
        inputs.u_BEL,
        inputs.delta_BEL,
        weights.A,
        inputs.B,
        inputs.C,
        weights.D,
        z_BEL,
        weights.delta_bias,
        delta_softplus,
        return_state,
        initial_state=ssm_state,
        scan_order=walk.scan_order,
        reverse=walk.reverse,
        seq_idx=walk.seq_idx,
        out_dtype=out_dtype,
        backend=walk.backend,
    )
    return y_BEL if isinstance(y_BEL, tuple) else (y_BEL, None)


def step_branch(
    x_BE: torch.Tensor,
    z_BE: torch.Tensor,
    conv_state: torch.Tensor,
    ssm_state: torch.Tensor,
    weights: BranchWeights,
    full_precision: bool = False,
) -> torch.Tensor:
    """One token of :func:`scan_branch`, gated; both states are brought forward in place.

    Args:
        x_BE: (B, E).
        z_BE: (B, E) gate.
        conv_state: (B, E, at least W-1).
        ssm_state: (B, E, N).
        weights: the parameters; B and C must be projected, not given, and without norms.
        full_precision: as :func:`scan_branch`.

    Returns:
        (B, E) in the dtype of x.
    """
    from bestiary.kernels.causal_conv1d.update import causal_conv1d_update
    from bestiary.kernels.state_update import selective_state_update

    kernel = weights.conv1d_weight
    kernel = kernel[:, 0] if kernel.ndim == 3 else kernel
    u_BE = causal_conv1d_update(x_BE, conv_state, kernel, weights.conv1d_bias, "silu")
    R, N = weights.delta_proj_weight.shape[1], weights.A.shape[1]
    projected = F.linear(u_BE, weights.x_proj_weight)
    delta_proj = weights.delta_proj_weight
    with _precision(x_BE, full_precision):
        if full_precision:
            work = torch.promote_types(projected.dtype, torch.float32)
            projected, u_BE, z_BE, delta_proj = (t.to(work) for t in (projected, u_BE, z_BE, delta_proj))
        dt_BR, B_BN, C_BN = projected.split([R, N, N], dim=-1)
        y_BE = selective_state_update(
            ssm_state,
            u_BE,
            F.linear(dt_BR, delta_proj),
            weights.A,
            B_BN,
            C_BN,
            weights.D,
            z=z_BE,
            dt_bias=weights.delta_bias,
            dt_softplus=True,
        )
    return y_BE.to(x_BE.dtype)


def add_branch(
    module: nn.Module,
    suffix: str,
    d_inner: int,
    d_state: int,
    d_conv: int,
    dt_rank: int,
    conv_bias: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Give a module the parameters of one direction: ``conv1d{suffix}``, …, ``A{suffix}_log``, ``D{suffix}``.

    A and D are float32 whatever ``dtype`` says, as upstream; the random numbers are drawn in upstream's order.
    """
    kwargs = {"device": device, "dtype": dtype}
    conv = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=conv_bias, **kwargs)
    setattr(module, f"conv1d{suffix}", conv)
    setattr(module, f"x_proj{suffix}", nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False, **kwargs))
    setattr(module, f"dt_proj{suffix}", nn.Linear(dt_rank, d_inner, **kwargs))
    setattr(module, f"A{suffix}_log", init_A_log(d_inner, d_state, device))
    setattr(module, f"D{suffix}", nn.Parameter(torch.ones(d_inner, device=device)))


def init_A_log(d_inner: int, d_state: int, device: torch.device | str | None = None) -> nn.Parameter:
    """``log(1 … N)`` in every channel."""
    states = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
    return nn.Parameter(torch.log(states).repeat(d_inner, 1))


def branch_weights(module: nn.Module, suffix: str = "") -> BranchWeights:
    """The parameters that :func:`add_branch` gave, as the ops take them."""
    conv, x_proj = getattr(module, f"conv1d{suffix}"), getattr(module, f"x_proj{suffix}")
    dt_proj, A_log = getattr(module, f"dt_proj{suffix}"), getattr(module, f"A{suffix}_log")
    # in half precision A would lose digits that every step multiplies
    A = -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
    return BranchWeights(
        conv.weight,
        conv.bias,
        x_proj.weight,
        dt_proj.weight,
        A,
        D=getattr(module, f"D{suffix}"),
        delta_bias=dt_proj.bias,
    )


def init_dt(
    dt_proj: nn.Linear,
    dt_min: float = 1e-3,
    dt_max: float = 0.1,
    floor: float = 1e-4,
    how: str = "random",
    scale: float = 1.0,
) -> None:
    """Weight uniform in +-scale * rank^-0.5; bias such that softplus(bias) is log-uniform in [dt_min, dt_max].

    Args:
        dt_proj: (rank) to (E).
        dt_min: smallest step.
        dt_max: largest step.
        floor: lower bound of the step.
        how: "random", or "constant" for a weight of scale * rank^-0.5 everywhere.
        scale: see there.

    Raises:
        ValueError: for another ``how``.
    """
    bound = scale * dt_proj.in_features**-0.5
    with torch.no_grad():
        if how == "random":
            dt_proj.weight.uniform_(-bound, bound)
        elif how == "constant":
            dt_proj.weight.fill_(bound)
        else:
            raise ValueError(f"dt_init must be random or constant, not {how!r}")
        dt_proj.bias.copy_(dt_bias_init(torch.rand_like(dt_proj.bias), dt_min, dt_max, floor))


def dt_bias_init(uniform: torch.Tensor, dt_min: float, dt_max: float, floor: float) -> torch.Tensor:
    """From numbers uniform in [0, 1) to biases whose softplus is log-uniform in [dt_min, dt_max]."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(uniform * (high - low) + low).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


def _precision(like: torch.Tensor, full: bool):
    return torch.autocast(like.device.type, enabled=False) if full else nullcontext()


def _input_map(
    given: torch.Tensor | None,
    projected: torch.Tensor | None,
    bias: torch.Tensor | None,
    rms_weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """B or C: as given, or the projected one (B, L, N) as (B, N, L), a view where nothing is done to it."""
    if given is not None:
        if rms_weight is None:
            return given
        if given.ndim < 3:
            raise ValueError("mamba_inner_fn: a constant B or C cannot be RMS-normalised")
        return _rms(given.transpose(-1, -2), rms_weight, eps).transpose(-1, -2)
    assert projected is not None
    value_BLN = projected
    if bias is not None:
        value_BLN = value_BLN + bias.to(value_BLN.dtype)
    if rms_weight is not None:
        value_BLN = _rms(value_BLN, rms_weight, eps)
    return value_BLN.transpose(1, 2)


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    work = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(work)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(work)).to(x.dtype)
