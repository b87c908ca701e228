"""The norms of mamba-ssm: with a residual added before them, or a gate after them. Plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def layer_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    x1: torch.Tensor | None = None,
    weight1: torch.Tensor | None = None,
    bias1: torch.Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """``norm(dropout(rowscale * x) + dropout(x1) + residual)``, sums and statistics in float32 or wider.

    Signature of ``mamba_ssm.ops.triton.layer_norm.layer_norm_fn``.

    Args:
        x: (…, D).
        weight: (D,).
        bias: (D,) or None.
        residual: (…, D), added before the norm.
        x1: (…, D), added before the norm.
        weight1: (D,) of a second norm of the same sum.
        bias1: (D,) of it.
        eps: of the norm.
        dropout_p: dropout of x and x1.
        rowscale: (…), a factor for each row of x.
        prenorm: also return the sum, in the residual's dtype.
        residual_in_fp32: where there is no residual yet, return the sum in float32.
        is_rms_norm: RMS norm instead of layer norm.
        return_dropout_mask: not supported.

    Returns:
        The normed tensor in the dtype of x; then the second where ``weight1`` is given; then the sum if ``prenorm``.

    Raises:
        NotImplementedError: for ``return_dropout_mask``.
    """
    if return_dropout_mask:
        raise NotImplementedError("layer_norm_fn of the shim does not return dropout masks")
    work = torch.promote_types(x.dtype, torch.float32)
    total = x.to(work)
    if rowscale is not None:
        total = total * rowscale.to(work)[..., None]
    total = F.dropout(total, dropout_p) if dropout_p else total
    if x1 is not None:
        total = total + (F.dropout(x1.to(work), dropout_p) if dropout_p else x1.to(work))
    kept = torch.promote_types(x.dtype, torch.float32) if residual_in_fp32 else x.dtype
    if residual is not None:
        total, kept = total + residual.to(work), residual.dtype
    if is_rms_norm:
        normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    else:
        normed = F.layer_norm(total, total.shape[-1:], eps=eps)
    outputs = []
    for w, b in ((weight, bias), (weight1, bias1)):
        if w is not None:
            y = normed * w.to(work)
            outputs.append((y if b is None else y + b.to(work)).to(x.dtype))
    if prenorm:
        outputs.append(total.to(kept))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def rms_norm_fn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """:func:`layer_norm_fn` with ``is_rms_norm``."""
    return layer_norm_fn(x, weight, bias, *args, **kwargs, is_rms_norm=True)


def layer_norm_fn_v1(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """The same in the argument order of mamba-ssm 1.x (``mamba_ssm.ops.triton.layernorm``)."""
    return layer_norm_fn(
        x, weight, bias, residual, eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32, is_rms_norm=is_rms_norm
    )


def rms_norm_fn_v1(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Any:
    """RMS norm in the argument order of mamba-ssm 1.x."""
    return layer_norm_fn_v1(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True)


def rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-6, is_rms_norm: bool = True
) -> torch.Tensor:
    """The norm alone."""
    return layer_norm_fn(x, weight, bias, eps=eps, is_rms_norm=is_rms_norm)


class RMSNorm(nn.Module):
    """RMS norm that can add a residual first; ``weight`` (D,), no bias.

    Args:
        hidden_size: D.
        eps: of the norm.
        dropout_p: dropout of the input in training.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        self.eps, self.dropout_p = eps, dropout_p
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """As :func:`layer_norm_fn`."""
        dropout = self.dropout_p if self.training else 0.0
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual,
            eps=self.eps,
            dropout_p=dropout,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def gated_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> torch.Tensor:
    """``norm(x) * silu(z)``, or ``norm(x * silu(z))``, the norm over groups of channels.

    Signature of ``layernorm_fn`` in ``mamba_ssm.ops.triton.layernorm_gated``.

    Args:
        x: (…, D).
        weight: (D,).
        bias: (D,) or None.
        z: (…, D) gate.
        eps: of the norm.
        group_size: channels that are normed together, D by default.
        norm_before_gate: the gate multiplies the normed tensor; else the tensor before the norm.
        is_rms_norm: RMS norm instead of layer norm.

    Returns:
        (…, D) in the dtype of x.
    """
    if is_rms_norm and bias is None:
        from bestiary.kernels.gated_norm import rms_norm_gated

        return rms_norm_gated(x, weight, z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate)
    work = torch.promote_types(x.dtype, torch.float32)
    total, gate = x.to(work), None if z is None else F.silu(z.to(work))
    if gate is not None and not norm_before_gate:
        total = total * gate
    grouped = total.unflatten(-1, (-1, group_size or x.shape[-1]))
    if not is_rms_norm:
        grouped = grouped - grouped.mean(-1, keepdim=True)
    normed = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(work)
    if bias is not None:
        normed = normed + bias.to(work)
    if gate is not None and norm_before_gate:
        normed = normed * gate
    return normed.to(x.dtype)


def gated_rms_norm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> torch.Tensor:
    """:func:`gated_norm_fn` as RMS norm: ``rmsnorm_fn`` in ``mamba_ssm.ops.triton.layernorm_gated``."""
    return gated_norm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


class GatedLayerNorm(nn.Module):
    """Layer norm with a gate: ``LayerNorm`` in ``mamba_ssm.ops.triton.layernorm_gated``.

    Args:
        hidden_size: D.
        eps: of the norm.
        group_size: as :func:`gated_norm_fn`.
        norm_before_gate: see there.
        device: of the weights.
        dtype: of the weights.
    """

    rms = False

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        bias = None if self.rms else nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """(…, D) to (…, D)."""
        bias: torch.Tensor | None = self.bias  # type: ignore[assignment]
        return gated_norm_fn(x, self.weight, bias, z, self.eps, self.group_size, self.norm_before_gate, self.rms)


class GatedRMSNorm(GatedLayerNorm):
    """RMS norm with a gate: ``RMSNorm`` in ``mamba_ssm.ops.triton.layernorm_gated``; arguments as the layer norm."""

    rms = True
