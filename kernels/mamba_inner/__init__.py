"""What stands between the projections of a Mamba-1 block, as one function.

The functions here are compositions of :func:`bestiary.kernels.causal_conv1d_fn` and
:func:`bestiary.kernels.selective_scan_fn`: they run on every backend, on any strides, under torch.compile, and as
often differentiated as those are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bestiary.kernels.mamba_inner.branch import BranchWeights, Walk, run_scan, scan_branch, scan_inputs


def mamba_inner_fn(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    B_proj_bias: torch.Tensor | None = None,
    C_proj_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: torch.Tensor | None = None,
    c_rms_weight: torch.Tensor | None = None,
    dt_rms_weight: torch.Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    *,
    scan_order: torch.Tensor | None = None,
    reverse: bool = False,
    seq_idx: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """A Mamba-1 block after ``in_proj``: convolution, projections, gated scan, ``out_proj``.

    With D inner channels, N states and rank R::

        x, z = xz.chunk(2);  u = silu(conv1d(x));  dt, B, C = x_proj(u)      B and C unless given
        out = out_proj(selective_scan(u, delta_proj(dt), A, B, C, D, z, delta_bias))

    Drop-in for ``mamba_ssm.ops.selective_scan_interface.mamba_inner_fn``. Under autocast the projections follow it;
    the scan is in float32 inside (float64 for float64 inputs).

    Source: the official code of mamba-ssm. Paper: arXiv:2312.00752 Sec. 3.4. Differs from it: complex A is not
    supported; ``checkpoint_lvl=1`` runs the scan's forward again too.

    Args:
        xz: (B, 2D, L), any strides.
        conv1d_weight: (D, 1, W) or (D, W).
        conv1d_bias: (D,).
        x_proj_weight: (R + 2N, D); N rows less for each of B and C that is given.
        delta_proj_weight: (D, R).
        out_proj_weight: (d_model, D).
        out_proj_bias: (d_model,).
        A: (D, N), negative.
        B: None for the projected one, else (D, N), (B, N, L) or (B, G, N, L).
        C: as B.
        D: (D,) skip.
        delta_bias: (D,).
        B_proj_bias: (N,), added to a projected B.
        C_proj_bias: (N,), added to a projected C.
        delta_softplus: apply softplus to the biased step.
        checkpoint_lvl: 1 computes convolution and step again in the backward pass instead of keeping them; 0 keeps
            them. The results are the same.
        b_rms_weight: (N,), RMS-normalises B over its states.
        c_rms_weight: (N,), likewise C.
        dt_rms_weight: (D,), likewise the projected step over its channels, before the bias.
        b_c_dt_rms_eps: of these norms.
        scan_order: (B, L) permutation that convolution and scan walk by; tokens stay where they stand.
        reverse: walk from the last step to the first.
        seq_idx: (B, L) integers: convolution and state start anew where it changes along the walk.
        backend: name of a backend, see :mod:`bestiary.kernels.backends`.

    Returns:
        (B, L, d_model).

    Raises:
        ValueError: if shapes or options do not fit.
    """
    weights = BranchWeights(
        conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias,
        b_rms_weight, c_rms_weight, dt_rms_weight,
    )  # fmt: skip
    walk = Walk(scan_order, reverse, seq_idx, backend)
    y_BDL = _inner(xz, weights, walk, delta_softplus, checkpoint_lvl, b_c_dt_rms_eps)
    return F.linear(y_BDL.transpose(1, 2), out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    B_proj_bias: torch.Tensor | None = None,
    C_proj_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    *,
    scan_order: torch.Tensor | None = None,
    reverse: bool = False,
    seq_idx: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """:func:`mamba_inner_fn` without the output projection, so that several directions can be summed before it.

    Source: the forks of mamba-ssm by Vision Mamba (arXiv:2401.09417) and SegMamba (arXiv:2401.13560).

    Args:
        xz: (B, 2D, L).
        conv1d_weight: this and all that follow as :func:`mamba_inner_fn`.
        conv1d_bias: see there.
        x_proj_weight: see there.
        delta_proj_weight: see there.
        A: see there.
        B: see there.
        C: see there.
        D: see there.
        delta_bias: see there.
        B_proj_bias: see there.
        C_proj_bias: see there.
        delta_softplus: see there.
        checkpoint_lvl: see there.
        scan_order: see there.
        reverse: see there.
        seq_idx: see there.
        backend: see there.

    Returns:
        (B, D, L).

    Raises:
        ValueError: if shapes or options do not fit.
    """
    weights = BranchWeights(
        conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias
    )
    return _inner(xz, weights, Walk(scan_order, reverse, seq_idx, backend), delta_softplus, checkpoint_lvl)


def bimamba_inner_fn(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    A: torch.Tensor,
    A_b: torch.Tensor,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    B_proj_bias: torch.Tensor | None = None,
    C_proj_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    *,
    scan_order: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Two scans over one convolution and one set of projections: forward with A, backward with ``A_b``, summed.

    Source: Vision Mamba's fork of mamba-ssm (arXiv:2401.09417), ``bimamba_type="v1"``. Differs from it: a constant B
    or C (D, N) is the same in both directions (there, its states are reversed in the second).

    Args:
        xz: (B, 2D, L).
        conv1d_weight: as :func:`mamba_inner_fn`, like all that is not explained.
        conv1d_bias: see there.
        x_proj_weight: see there.
        delta_proj_weight: see there.
        out_proj_weight: see there.
        out_proj_bias: see there.
        A: (D, N) of the forward scan.
        A_b: (D, N) of the backward scan.
        B: see there.
        C: see there.
        D: see there.
        delta_bias: see there.
        B_proj_bias: see there.
        C_proj_bias: see there.
        delta_softplus: see there.
        checkpoint_lvl: see there.
        scan_order: see there.
        seq_idx: see there.
        backend: see there.

    Returns:
        (B, L, d_model).

    Raises:
        ValueError: if shapes or options do not fit.
    """
    weights = BranchWeights(
        conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias
    )
    walk = Walk(scan_order, False, seq_idx, backend)
    x, z = _halves(xz, weights)

    def both(x: torch.Tensor, z: torch.Tensor, A_b: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
        own = BranchWeights(*tensors)  # type: ignore[arg-type]
        inputs, _ = scan_inputs(x, own, walk)
        forward, _ = run_scan(inputs, own, walk, z, delta_softplus)
        backward, _ = run_scan(inputs, own._replace(A=A_b), walk._replace(reverse=True), z, delta_softplus)
        return forward + backward

    y_BDL = _recomputed(both, checkpoint_lvl, x, z, A_b, *weights)
    return F.linear(y_BDL.transpose(1, 2), out_proj_weight, out_proj_bias)


def _inner(
    xz: torch.Tensor, weights: BranchWeights, walk: Walk, delta_softplus: bool, checkpoint_lvl: int, eps: float = 1e-6
) -> torch.Tensor:
    """The gated scan of one direction, (B, 2D, L) to (B, D, L)."""
    x, z = _halves(xz, weights)

    def gated(x: torch.Tensor, z: torch.Tensor, *tensors: torch.Tensor | None) -> torch.Tensor:
        return scan_branch(x, z, BranchWeights(*tensors), walk, delta_softplus, eps)[0]  # type: ignore[arg-type]

    return _recomputed(gated, checkpoint_lvl, x, z, *weights)


def _recomputed(function, level: int, *tensors: torch.Tensor | None) -> torch.Tensor:
    if level not in (0, 1):
        raise ValueError(f"mamba_inner_fn: checkpoint_lvl must be 0 or 1, not {level!r}")
    if level == 1 and torch.is_grad_enabled():
        # nothing in it is random; tensors are passed, not captured, so that torch.compile sees them
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
    return function(*tensors)


def _halves(xz: torch.Tensor, weights: BranchWeights) -> tuple[torch.Tensor, torch.Tensor]:
    if xz.ndim != 3 or xz.shape[1] % 2:
        raise ValueError(f"mamba_inner_fn needs xz (B, 2D, L), got {tuple(xz.shape)}")
    D = xz.shape[1] // 2
    if weights.A.is_complex():
        raise ValueError("mamba_inner_fn does not support complex A")
    kernel = weights.conv1d_weight
    if kernel.shape[0] != D or kernel.ndim not in (2, 3) or (kernel.ndim == 3 and kernel.shape[1] != 1):
        raise ValueError(f"mamba_inner_fn: conv1d_weight must be (D, 1, W) with D = {D}, got {tuple(kernel.shape)}")
    if weights.delta_proj_weight.ndim != 2 or weights.delta_proj_weight.shape[0] != D:
        shape = tuple(weights.delta_proj_weight.shape)
        raise ValueError(f"mamba_inner_fn: delta_proj_weight must be (D, R) with D = {D}, got {shape}")
    if weights.A.ndim != 2 or weights.A.shape[0] != D:
        raise ValueError(f"mamba_inner_fn: A must be (D, N) with D = {D}, got {tuple(weights.A.shape)}")
    rows = weights.delta_proj_weight.shape[1] + weights.A.shape[1] * sum(m is None for m in (weights.B, weights.C))
    if tuple(weights.x_proj_weight.shape) != (rows, D):
        raise ValueError(
            f"mamba_inner_fn: x_proj_weight must be {(rows, D)} (rank, and N for each of B and C that is not given), "
            f"got {tuple(weights.x_proj_weight.shape)}"
        )
    x, z = xz.chunk(2, dim=1)
    return x, z
