"""One decoding step of a Mamba-2 layer, all that stands between its two projections."""

from __future__ import annotations

import math

import torch

from bestiary.kernels.backends.dispatch import implementation
from bestiary.kernels.backends.library import needs_grad
from bestiary.kernels.state_update.rows import check_rows


def mamba2_step(
    zxbcdt: torch.Tensor,
    conv_state: torch.Tensor,
    ssm_state: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    norm_weight: torch.Tensor,
    *,
    headdim: int,
    ngroups: int,
    eps: float = 1e-5,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    rows: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """One token of a Mamba-2 layer, from its first projection to its last; both states are updated in place.

    With ``z, xBC, dt`` the parts of ``zxbcdt`` and ``d = clamp(softplus(dt + dt_bias), *dt_limit)``::

        x, B, C = silu(convolution of conv_state and xBC)
        ssm_state = ssm_state * exp(d * A) + d * x * B
        y = sum_n ssm_state * C + D * x
        out = rms(y * silu(z)) * norm_weight,    rms over groups of I / G channels

    What :func:`bestiary.kernels.causal_conv1d_update`, :func:`bestiary.kernels.selective_state_update` and
    :func:`bestiary.kernels.rms_norm_gated` do one after the other. For one sequence their calls cost more than what
    they compute; this is one call. All sums are float32 (float64 if input or state are), and nothing is rounded on the
    way. Where gradients are on and an input requires one, the reference runs, as for those functions.

    Shape legend: B batch, H heads of P channels, I = H P, G groups of N states, C = I + 2 G N, W width.

    Paper: arXiv:2405.21060 Sec. 7.

    Args:
        zxbcdt: (B, I + C + H), of any strides.
        conv_state: (B, W - 1, C) the last inputs of the convolution, the newest at the end.
        ssm_state: (B, H, P, N), of any floating dtype, rounded to nearest. More or fewer rows than B in both states
            with ``rows``.
        conv_weight: (C, W).
        conv_bias: (C,) or None.
        dt_bias: (H,).
        A: (H,), negative.
        D: (H,) skip.
        norm_weight: (I,).
        headdim: P.
        ngroups: G.
        eps: added to the mean square.
        dt_limit: bounds of the step sizes.
        rows: (B,) int32 or int64, the row of the states of each sequence, none twice; negative for padding, whose
            output is 0 and which writes no state.
        backend: name of a backend, see :mod:`bestiary.kernels.backends`.

    Returns:
        out (B, I) in the dtype of ``zxbcdt``.

    Raises:
        ValueError: if shapes do not fit, or if a state is a leaf that requires grad.
    """
    name = "mamba2_step"
    if zxbcdt.ndim != 2 or ssm_state.ndim != 4 or conv_weight.ndim != 2:
        raise ValueError(
            f"{name} needs zxbcdt (B, I + C + H), ssm_state (B, H, P, N) and conv_weight (C, W), got "
            f"{tuple(zxbcdt.shape)}, {tuple(ssm_state.shape)} and {tuple(conv_weight.shape)}"
        )
    slots, H, P, N = ssm_state.shape
    if headdim != P or ngroups < 1 or H % ngroups or not H * P * N:
        raise ValueError(
            f"{name}: headdim = {headdim} must be P and ngroups = {ngroups} a divisor of H, with ssm_state "
            f"(B, H, P, N) = {tuple(ssm_state.shape)}"
        )
    batch, inner = zxbcdt.shape[0], H * P
    channels, width = inner + 2 * ngroups * N, conv_weight.shape[1]
    for label, value, shape in (
        ("zxbcdt", zxbcdt, (batch, inner + channels + H)),
        ("conv_state", conv_state, (slots, width - 1, channels)),
        ("conv_weight", conv_weight, (channels, width)),
        ("conv_bias", conv_bias, (channels,)),
        ("dt_bias", dt_bias, (H,)),
        ("A", A, (H,)),
        ("D", D, (H,)),
        ("norm_weight", norm_weight, (inner,)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name}: {label} must be {shape}, got {tuple(value.shape)}")
    check_rows(name, "conv_state", conv_state, "rows", rows, batch)
    check_rows(name, "ssm_state", ssm_state, "rows", rows, batch)
    tensors = (zxbcdt, conv_state, ssm_state, conv_weight, conv_bias, dt_bias, A, D, norm_weight)
    run = implementation("mamba2_decode", backend, *tensors)
    if needs_grad(*tensors):  # the backend was asked for all the same, so that a wrong name is an error
        run = implementation("mamba2_decode", "reference")
    return run(*tensors, rows, ngroups, eps, dt_limit)
