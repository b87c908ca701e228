"""The short causal depthwise convolution in front of a Mamba scan."""

from __future__ import annotations

import torch

from bestiary.kernels.backends.dispatch import implementation
from bestiary.kernels.scan_order import check_order


def causal_conv1d_fn(
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
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution: ``out_t = act(bias + sum_k weight[k] * x_{t-W+1+k})``.

    Drop-in for ``causal_conv1d.causal_conv1d_fn``, for any width, any strides and any dtype; sums are in float32
    (float64 for float64 inputs). Everything is differentiable, final states too.

    Args:
        x: (B, D, L).
        weight: (D, W).
        bias: (D,).
        seq_idx: (B, L) integers, one per token; a tap that falls in another sequence counts as zero.
        initial_states: (B, D, W-1), the inputs before the first; they belong to the first sequence.
        return_final_states: also return the last W-1 inputs, (B, D, W-1), which continue the sequence.
        final_states_out: a (B, D, W-1) tensor to write them to.
        activation: None, ``"silu"`` or ``"swish"`` (the same).
        scan_order: (B, L) permutation: the walk visits token ``scan_order[b, t]`` at step t; the output of a token
            stands where the token stands. ``seq_idx`` belongs to tokens; final states follow the walk.
            With (B, K, L) every row is walked in K orders.
        reverse: walk from the last step to the first.
        out_dtype: dtype of the output, that of ``x`` by default.
        backend: name of a backend, see :mod:`bestiary.kernels.backends`.

    Returns:
        (B, D, L), or ``(out, final_states)``; with several orders (B, K, D, L) and (B, K, D, W-1).

    Raises:
        ValueError: if shapes or options do not fit.
    """
    if x.ndim != 3:
        raise ValueError(f"causal_conv1d_fn needs x (B, D, L), got {tuple(x.shape)}")
    B, D, L = x.shape
    if L < 1:
        raise ValueError("causal_conv1d_fn needs at least one token")
    if weight.ndim != 2 or weight.shape[0] != D or weight.shape[1] < 1:
        raise ValueError(f"causal_conv1d_fn: weight must be (D, W) with D = {D}, got {tuple(weight.shape)}")
    W = weight.shape[1]
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"causal_conv1d_fn: activation must be None, silu or swish, not {activation!r}")
    K = () if scan_order is None or scan_order.ndim != 3 else (scan_order.shape[1],)
    for name, value, shape in (
        ("bias", bias, (D,)),
        ("seq_idx", seq_idx, (B, L)),
        ("initial_states", initial_states, (B, D, W - 1)),
        ("final_states_out", final_states_out, (B, *K, D, W - 1)),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"causal_conv1d_fn: {name} must be {shape}, got {tuple(value.shape)}")
    if scan_order is not None:
        check_order(scan_order, B, L, several=True)
    run = implementation(
        "causal_conv1d", backend, x, weight, bias, initial_states, final_states_out, out_dtype=out_dtype
    )
    options = {"scan_order": scan_order, "reverse": reverse, "out_dtype": out_dtype}
    states = (initial_states, return_final_states, final_states_out)
    return run(x, weight, bias, seq_idx, *states, activation, **options)
