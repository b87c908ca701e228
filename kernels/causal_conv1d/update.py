"""Single steps of the causal convolution, for decoding, and the states to begin them with."""

from __future__ import annotations

import torch

from bestiary.kernels.backends.dispatch import implementation
from bestiary.kernels.backends.library import needs_grad
from bestiary.kernels.state_update.rows import check_rows, may_look_at


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """The convolution of :func:`bestiary.kernels.causal_conv1d_fn` for one or a few new inputs.

    ``conv_state`` holds the inputs before them and is updated in place. Drop-in for
    ``causal_conv1d.causal_conv1d_update``, for any width, strides and dtype; sums are float32 (float64 for float64
    inputs). Differentiable, on every backend by the reference; the state carries gradients on only if it required
    grad before (see :func:`bestiary.kernels.selective_state_update`).

    Args:
        x: (B, D) one input of each sequence, or (B, D, S) several.
        conv_state: (B, D, state_len) with state_len >= W - 1, the last inputs, the newest at the end; more or fewer
            rows than B with ``conv_state_indices``.
        weight: (D, W).
        bias: (D,).
        activation: None, ``"silu"`` or ``"swish"`` (the same).
        cache_seqlens: (B,) integers, the inputs that each sequence has had. ``conv_state`` is then a ring, where the
            input of step t stands at ``t % state_len``.
        conv_state_indices: (B,) the row of ``conv_state`` of each sequence, none twice; negative for a padded slot,
            whose output is 0 and which writes no state.
        backend: name of a backend, see :mod:`bestiary.kernels.backends`.

    Returns:
        out, of the shape and dtype of x.

    Raises:
        ValueError: if shapes or options do not fit, or if ``conv_state`` is a leaf that requires grad.
    """
    name = "causal_conv1d_update"
    if x.ndim not in (2, 3) or (x.ndim == 3 and x.shape[2] < 1):
        raise ValueError(f"{name} needs x (B, D) or (B, D, S) with S >= 1, got {tuple(x.shape)}")
    batch, D = x.shape[:2]
    if weight.ndim != 2 or weight.shape[0] != D or weight.shape[1] < 1:
        raise ValueError(f"{name}: weight must be (D, W) with D = {D}, got {tuple(weight.shape)}")
    W = weight.shape[1]
    if conv_state.ndim != 3 or conv_state.shape[1] != D or conv_state.shape[2] < W - 1:
        raise ValueError(
            f"{name}: conv_state must be (B, D, state_len) with D = {D} and state_len >= {W - 1}, "
            f"got {tuple(conv_state.shape)}"
        )
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{name}: activation must be None, silu or swish, not {activation!r}")
    if bias is not None and tuple(bias.shape) != (D,):
        raise ValueError(f"{name}: bias must be ({D},), got {tuple(bias.shape)}")
    if cache_seqlens is not None:
        if tuple(cache_seqlens.shape) != (batch,) or cache_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name}: cache_seqlens must be ({batch},) of int32 or int64, "
                f"got {tuple(cache_seqlens.shape)} {cache_seqlens.dtype}"
            )
        if batch and may_look_at(cache_seqlens) and int(cache_seqlens.min()) < 0:
            raise ValueError(f"{name}: cache_seqlens must not be negative, got {int(cache_seqlens.min())}")
        if conv_state.shape[2] < 1:
            raise ValueError(f"{name}: with cache_seqlens conv_state must hold one input at least")
    check_rows(name, "conv_state", conv_state, "conv_state_indices", conv_state_indices, batch)
    tensors = (x, conv_state, weight, bias)
    run = implementation("causal_conv1d_update", backend, *tensors)
    if needs_grad(*tensors):  # the backend was asked for all the same, so that a wrong name is an error
        run = implementation("causal_conv1d_update", "reference")
    return run(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


def causal_conv1d_varlen_states(x: torch.Tensor, cu_seqlens: torch.Tensor, state_len: int) -> torch.Tensor:
    """The last inputs of each of several sequences in one row, to go on with :func:`causal_conv1d_update`.

    Drop-in for ``causal_conv1d.causal_conv1d_varlen_states``, and differentiable.

    Args:
        x: (T, D) tokens of all sequences.
        cu_seqlens: (nseq + 1,) integers from 0 to T where sequences begin and end.
        state_len: how many inputs to keep.

    Returns:
        (nseq, D, state_len) in the dtype of ``x``, the newest at the end, zeros in front where a sequence is shorter.

    Raises:
        ValueError: if shapes do not fit.
    """
    name = "causal_conv1d_varlen_states"
    if x.ndim != 2:
        raise ValueError(f"{name} needs x (T, D), got {tuple(x.shape)}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: cu_seqlens must be (nseq + 1,) of int32 or int64, got {tuple(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}"
        )
    if state_len < 0:
        raise ValueError(f"{name}: state_len must be 0 or more, not {state_len}")
    edges = cu_seqlens.long()
    tokens = edges[1:, None] + torch.arange(-state_len, 0, device=x.device)
    if x.shape[0] == 0:
        return x.new_zeros(len(tokens), x.shape[1], state_len)
    absent = tokens < edges[:-1, None]
    return x[tokens.clamp(min=0)].masked_fill(absent[..., None], 0).transpose(1, 2)
