"""All that stands between the two projections of a Mamba-2 block: convolution, scan, gate, norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bestiary.kernels.causal_conv1d import causal_conv1d_fn
from bestiary.kernels.gated_norm import rms_norm_gated
from bestiary.kernels.ssd import mamba_chunk_scan_combined


def mamba_split_conv1d_scan_combined(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    A: torch.Tensor,
    D: torch.Tensor | None,
    chunk_size: int,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: torch.Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: torch.Tensor | None = None,
    outproj_bias: torch.Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
    *,
    scan_order: torch.Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A Mamba-2 block from the output of its first projection to the input of what follows it.

    The parts of ``zxbcdt`` are, in this order: both halves of a gated MLP (where there is one, (B, L, 2 * M)), the
    gate z (H * P), what is convolved (x, B and C: H * P + 2 * G * N), and the step sizes (H). The convolution is
    :func:`bestiary.kernels.causal_conv1d_fn`, the scan :func:`bestiary.kernels.mamba_chunk_scan_combined` with a
    softplus; then the gate, with a norm before or after it if there is a ``rmsnorm_weight``; then the output
    projection if there is one.

    Drop-in for ``mamba_ssm.ops.triton.ssd_combined.mamba_split_conv1d_scan_combined``. Under autocast the output
    projection runs in autocast's dtype, and nothing else does.

    Source: the official code of mamba-ssm. Paper: arXiv:2405.21060 Sec. 7.

    Args:
        zxbcdt: (B, L, 2 * M + 2 * H * P + 2 * G * N + H).
        conv1d_weight: (H * P + 2 * G * N, W).
        conv1d_bias: (H * P + 2 * G * N,).
        dt_bias: (H,).
        A: (H,), negative.
        D: (H,) or (H, P) skip, None for none.
        chunk_size: as in the scan.
        initial_states: (B, H, P, N) of the scan; the convolution starts from zeros.
        seq_idx: (B, L) integers, one per token; convolution and scan start anew where it changes.
        dt_limit: lowest and highest step.
        return_final_states: also return the scan's states after the last step.
        activation: of the convolution: None, ``"silu"`` or ``"swish"``.
        rmsnorm_weight: (H * P,); the norm is over each of the G groups of channels.
        rmsnorm_eps: added to the mean square.
        outproj_weight: (out, M + H * P).
        outproj_bias: (out,).
        headdim: P, needed unless D is (H, P).
        ngroups: G.
        norm_before_gate: ``norm(y) * silu(z)`` if true, ``norm(y * silu(z))`` if not.
        state_dtype: dtype of the returned states, float32 (float64 for float64 inputs) by default.
        scan_order: (B, L) permutation for convolution and scan; outputs stand where the tokens stand.
        reverse: walk from the last step to the first.
        backend: name of a backend, see :mod:`bestiary.kernels.backends`.

    Returns:
        (B, L, M + H * P) or (B, L, out), or ``(out, final_states)`` with final_states (B, H, P, N).

    Raises:
        ValueError: if shapes or options do not fit.
    """
    name = "mamba_split_conv1d_scan_combined"
    if zxbcdt.ndim != 3 or A.ndim != 1:
        raise ValueError(f"{name} needs zxbcdt (B, L, F) and A (H,), got {tuple(zxbcdt.shape)} and {tuple(A.shape)}")
    H = A.shape[0]
    if D is not None and (D.ndim not in (1, 2) or D.shape[0] != H):
        raise ValueError(f"{name}: D must be (H,) or (H, P) with H = {H}, got {tuple(D.shape)}")
    P = D.shape[1] if D is not None and D.ndim == 2 else headdim
    if P is None or (headdim is not None and headdim != P):
        raise ValueError(f"{name}: headdim must be P, and given unless D is (H, P); got {headdim} and P = {P}")
    dim = H * P
    if ngroups < 1 or H % ngroups or dim < 1:
        raise ValueError(f"{name}: ngroups = {ngroups} must be a divisor of the number of heads, {H}, and P >= 1")
    maps = conv1d_weight.shape[0] - dim if conv1d_weight.ndim == 2 else 0
    if conv1d_weight.ndim != 2 or maps < 2 * ngroups or maps % (2 * ngroups):
        raise ValueError(
            f"{name}: conv1d_weight must be (H * P + 2 * G * N, W) with H * P = {dim} and G = {ngroups}, "
            f"got {tuple(conv1d_weight.shape)}"
        )
    mlp = zxbcdt.shape[2] - 2 * dim - maps - H
    if mlp < 0 or mlp % 2:
        raise ValueError(
            f"{name}: zxbcdt must be (B, L, 2 * M + {2 * dim + maps + H}), M an integer >= 0, got {tuple(zxbcdt.shape)}"
        )
    for label, value, shape in (
        ("rmsnorm_weight", rmsnorm_weight, (dim,)),
        ("outproj_bias", outproj_bias, None if outproj_weight is None else (outproj_weight.shape[0],)),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{name}: {label} must be {shape or 'left out'}, got {tuple(value.shape)}")
    if outproj_weight is not None and (outproj_weight.ndim != 2 or outproj_weight.shape[1] != mlp // 2 + dim):
        raise ValueError(f"{name}: outproj_weight must be (out, {mlp // 2 + dim}), got {tuple(outproj_weight.shape)}")

    gated, z, xBC, dt = zxbcdt.split([mlp, dim, dim + maps, H], dim=-1)
    conv = causal_conv1d_fn(
        xBC.transpose(1, 2),
        conv1d_weight,
        conv1d_bias,
        seq_idx,
        activation=activation,
        scan_order=scan_order,
        reverse=reverse,
        backend=backend,
    )
    assert isinstance(conv, torch.Tensor)  # no states were asked for
    x, B, C = conv.transpose(1, 2).split([dim, maps // 2, maps // 2], dim=-1)
    y, states = mamba_chunk_scan_combined(
        x.unflatten(2, (H, P)),
        dt,
        A,
        B.unflatten(2, (ngroups, -1)),
        C.unflatten(2, (ngroups, -1)),
        chunk_size,
        D,
        z.unflatten(2, (H, P)) if rmsnorm_weight is None else None,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
        state_dtype=state_dtype,
        scan_order=scan_order,
        reverse=reverse,
        backend=backend,
    )
    out = y.flatten(2)
    if rmsnorm_weight is not None:
        out = rms_norm_gated(out, rmsnorm_weight, z, rmsnorm_eps, dim // ngroups, norm_before_gate, backend=backend)
    if mlp:
        value, factor = gated.to(torch.promote_types(gated.dtype, torch.float32)).chunk(2, dim=-1)
        out = torch.cat([(F.silu(value) * factor).to(out.dtype), out], dim=-1)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, states) if return_final_states else out
