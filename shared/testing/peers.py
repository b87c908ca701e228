"""What else computes the kernels' functions on a CPU, for the benchmark to compare with.

Each is what its users run. Where a library is missing its function is None.

Shape legend: B batch, D channels, N states, L tokens, H heads, P channels of a head, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F


def scan_loop(u, delta, A, B, C, D, z, bias) -> torch.Tensor:
    """One step a token, with a select for each: what mamba-ssm's ``selective_scan_ref`` does, in own words."""
    dt = F.softplus(delta + bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    entry = torch.einsum("bdl,bnl->bdln", dt * u, B)
    h = torch.zeros_like(decay[:, :, 0])
    outs = []
    for i in range(u.shape[2]):
        h = decay[:, :, i] * h + entry[:, :, i]
        outs.append(torch.einsum("bdn,bn->bd", h, C[:, :, i]))
    return (torch.stack(outs, dim=2) + u * D[:, None]) * F.silu(z)


def compiled_scan(steps: int = 32) -> Callable[..., torch.Tensor]:
    """A chunk of steps under torch.compile, in a Python loop over chunks: the best that inductor does with a scan."""
    # Versions for other shapes are dropped, and fullgraph makes it an error to have more than Dynamo keeps: it would
    # go on in eager mode, ten times slower, and the comparison would be worth nothing.
    torch._dynamo.reset()

    @torch.compile(dynamic=False, fullgraph=True)
    def chunk(h, u, delta, A, B, C, D, z, bias):
        dt = F.softplus(delta + bias[:, None])
        outs = []
        for i in range(steps):
            h = torch.exp(dt[:, :, i, None] * A) * h + (dt[:, :, i] * u[:, :, i])[..., None] * B[:, None, :, i]
            outs.append((h * C[:, None, :, i]).sum(-1))
        return h, (torch.stack(outs, dim=2) + u * D[:, None]) * F.silu(z)

    def run(u, delta, A, B, C, D, z, bias):
        if u.shape[2] % steps:
            raise ValueError(f"the compiled scan needs a multiple of {steps} tokens")
        h, outs = u.new_zeros(*u.shape[:2], A.shape[1]), []
        # split and not slices: their gradient is one concatenation
        for u_k, delta_k, B_k, C_k, z_k in zip(*(t.split(steps, dim=2) for t in (u, delta, B, C, z)), strict=True):
            h, out = chunk(h, u_k, delta_k, A, B_k, C_k, D, z_k, bias)
            outs.append(out)
        return torch.cat(outs, dim=2)

    return run


def transformers_scan(mambapy: bool) -> Callable[..., torch.Tensor] | None:
    """The Mamba of transformers without CUDA kernels: its loop, or with ``mambapy`` the parallel scan of mambapy."""
    try:
        from transformers.models.mamba import modeling_mamba

        if mambapy:
            import_module("mambapy.pscan")
    except ImportError:
        return None
    scan = modeling_mamba.mamba_selective_scan

    def run(u, delta, A, B, C, D, z, bias):
        return scan(u, delta, A, B, C, D, z, bias, True, use_mambapy=mambapy)

    return run


def transformers_ssd(chunk: int = 64) -> Callable[..., torch.Tensor] | None:
    """The Mamba-2 of transformers without CUDA kernels, at the chunk that suits a CPU (256, its default, is slower)."""
    try:
        from transformers.models.mamba2 import modeling_mamba2
    except ImportError:
        return None
    scan = modeling_mamba2.mamba2_chunk_scan

    def run(x, dt, A, B, C, D, bias):
        return scan(x, dt, A, B, C, chunk, D=D, dt_bias=bias, dt_softplus=True)

    return run


def gathered(scan: Callable[..., torch.Tensor], order_BL: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A scan in an order by copies: every input gathered, the output scattered back; channel-last throughout."""

    def pick(t_BEL: torch.Tensor) -> torch.Tensor:
        t_BLE = t_BEL.transpose(1, 2)
        return t_BLE.gather(1, order_BL[..., None].expand_as(t_BLE)).transpose(1, 2)

    def run(u, delta, A, B, C, D, z, bias):
        out = scan(pick(u), pick(delta), A, pick(B), pick(C), D, pick(z), bias).transpose(1, 2)
        index = order_BL[..., None].expand_as(out)
        return torch.zeros_like(out).scatter(1, index, out).transpose(1, 2)

    return run


def oned_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The depthwise convolution that torch has, and silu."""
    padded = F.conv1d(x, weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[1])
    return F.silu(padded[..., : x.shape[2]])


def with_gradients(
    run: Callable[..., Any], inputs: list[torch.Tensor], seed: int = 1
) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward: the output and the gradients of all inputs, for one fixed gradient of the output."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    kept: list[torch.Tensor] = []

    def step() -> list[torch.Tensor]:
        out = run(*leaves)
        if not kept:
            g = torch.Generator().manual_seed(seed)
            values = torch.randn(out.shape, generator=g, dtype=torch.float32)
            kept.append(torch.empty_like(out).copy_(values).detach())  # in the output's layout
        return [out.detach(), *torch.autograd.grad(out, leaves, kept[0])]

    return step


def without_gradients(run: Callable[..., Any], inputs: list[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
    """Forward alone."""

    def step() -> list[torch.Tensor]:
        with torch.no_grad():
            return [run(*inputs)]

    return step
