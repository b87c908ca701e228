"""The public functions of mamba-ssm and causal-conv1d, ours behind them, with their calls counted.

Loaded by the shim's modules when a name is first asked for. Nothing is computed here.
"""

from __future__ import annotations

from typing import Any

import torch

from bestiary import kernels
from bestiary.kernels.mamba_inner import branch
from bestiary.kernels.shim.counts import counted

_OPS = {
    "bimamba_inner_fn": "selective_scan",
    "causal_conv1d_update": "causal_conv1d_update",
    "mamba_chunk_scan_combined": "ssd",
    "mamba_inner_fn": "selective_scan",
    "mamba_inner_fn_no_out_proj": "selective_scan",
    "mamba_split_conv1d_scan_combined": "ssd",
    "selective_scan_fn": "selective_scan",
    "selective_state_update": "state_update",
}
"""Functions that are ours as they are, and the op that does their work."""

prefill_branch = counted("selective_scan", "Mamba.forward with a cache")(branch.scan_branch)
step_branch = counted("state_update", "Mamba.step")(branch.step_branch)


def __getattr__(name: str) -> Any:
    if name not in _OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = globals()[name] = counted(_OPS[name])(getattr(kernels, name))
    return function


@counted("causal_conv1d")
def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | str | None = None,
    initial_states: torch.Tensor | str | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    **options: Any,
) -> Any:
    """:func:`bestiary.kernels.causal_conv1d_fn`; old code passes the activation as fourth or fifth argument."""
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    if isinstance(initial_states, str):
        initial_states, activation = None, initial_states
    return kernels.causal_conv1d_fn(
        x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation, **options
    )


def selective_scan_ref(*args: Any, **kwargs: Any) -> Any:
    """:func:`bestiary.kernels.selective_scan_fn` in plain PyTorch."""
    return kernels.selective_scan_fn(*args, **kwargs, backend="reference")


def causal_conv1d_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """:func:`bestiary.kernels.causal_conv1d_fn` in plain PyTorch; upstream's reference has no ``seq_idx``."""
    return kernels.causal_conv1d_fn(
        x, weight, bias, None, initial_states, return_final_states, final_states_out, activation, backend="reference"
    )


def mamba_inner_ref(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    A: torch.Tensor,
    *rest: Any,
    **options: Any,
) -> torch.Tensor:
    """:func:`bestiary.kernels.mamba_inner_fn` in plain PyTorch, nothing recomputed."""
    return kernels.mamba_inner_fn(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A,
        *rest, **{"checkpoint_lvl": 0, "backend": "reference"} | options,
    )  # fmt: skip
