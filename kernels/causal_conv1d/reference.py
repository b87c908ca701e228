"""The causal depthwise convolution in plain PyTorch: the specification, and what runs where nothing else does."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bestiary.kernels.scan_order import gather_tokens, invert_order


def causal_conv1d_ref(
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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See :func:`bestiary.kernels.causal_conv1d_fn`; arguments are taken as checked."""
    if scan_order is not None and scan_order.ndim == 3:
        return _several(
            scan_order, x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation,
            reverse=reverse, out_dtype=out_dtype,
        )  # fmt: skip
    work = torch.promote_types(x.dtype, torch.float32)
    W, L = weight.shape[1], x.shape[2]
    walk, seq = x.to(work), seq_idx
    inverse = None
    if scan_order is not None:
        inverse = invert_order(scan_order)
        walk = gather_tokens(walk.transpose(1, 2), scan_order, inverse, backend="reference").transpose(1, 2)
        seq = None if seq is None else seq.gather(1, scan_order.long())
    if reverse:
        walk = walk.flip(2)
        seq = None if seq is None else seq.flip(1)
    past = walk.new_zeros(*walk.shape[:2], W - 1) if initial_states is None else initial_states.to(work)
    padded = torch.cat([past, walk], dim=2)
    b = None if bias is None else bias.to(work)
    with torch.autocast(x.device.type, enabled=False):
        if seq is None:
            out = F.conv1d(padded, weight.to(work)[:, None], b, groups=weight.shape[0])
        else:
            out = _packed(padded, weight.to(work), b, seq, L)
        if activation is not None:
            out = F.silu(out)
    if reverse:
        out = out.flip(2)
    if inverse is not None:
        out = gather_tokens(out.transpose(1, 2), inverse, scan_order, backend="reference").transpose(1, 2)
    out = out.to(out_dtype or x.dtype)
    if not return_final_states and final_states_out is None:
        return out
    final = padded[..., padded.shape[2] - (W - 1) :].to(x.dtype)
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return (out, final) if return_final_states else out


def _several(
    orders: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    past: torch.Tensor | None,
    final: bool,
    final_out: torch.Tensor | None,
    activation: str | None,
    **options,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Each of K orders in turn; outputs (B, K, ...)."""
    rows = [
        causal_conv1d_ref(x, weight, bias, seq_idx, past, True, None, activation, scan_order=order, **options)
        for order in orders.unbind(1)
    ]
    out, states = (torch.stack(part, 1) for part in zip(*rows, strict=True))
    if final_out is not None:
        states = final_out.copy_(states)
    return (out, states) if final else out


def _packed(
    padded: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seq: torch.Tensor, L: int
) -> torch.Tensor:
    """The convolution of packed rows: tap by tap, because each tap may fall in another sequence."""
    W = weight.shape[1]
    before = seq[:, :1].expand(-1, W - 1)
    seq_padded = torch.cat([before, seq], dim=1)
    out = padded.new_zeros(()) if bias is None else bias[:, None]
    for k in range(W):
        same = (seq_padded[:, k : k + L] == seq)[:, None]
        out = out + weight[:, k, None] * padded[..., k : k + L].masked_fill(~same, 0)
    return out
