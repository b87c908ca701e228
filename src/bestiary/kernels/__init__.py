"""The Mamba kernels: same names, shapes and semantics as mamba-ssm and causal-conv1d, on any machine.

The public functions are loaded on first use, so that importing this package does not import torch. They need
torch alone.

Functions:
    selective_scan_fn, selective_scan_ref: the selective scan of Mamba-1.
    mamba_inner_fn, mamba_inner_fn_no_out_proj, bimamba_inner_fn: what stands between a Mamba block's projections.
    mamba_chunk_scan_combined, mamba_chunk_scan_ref, mamba_split_conv1d_scan_combined, ssd_minimal_discrete: the
        state space dual of Mamba-2.
    causal_conv1d_fn, causal_conv1d_ref: the short causal depthwise convolution before a scan.
    rms_norm_gated, rms_norm_gated_ref: the norm with a gate after a scan of Mamba-2.
    mamba2_step: a decoding step of Mamba-2 between its projections, in one go.
    selective_state_update, causal_conv1d_update, causal_conv1d_varlen_states: single steps, for decoding.
    cross_scan_fn, cross_merge_fn, cross_orders: images and volumes walked in several directions.
    argsort_order, invert_order, gather_tokens, check_order: scan orders and what is done with them.
    backend_report: which implementation each op uses on this machine, and why not the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bestiary.kernels.backends import BackendUnavailableError, backend_report
    from bestiary.kernels.causal_conv1d import causal_conv1d_fn
    from bestiary.kernels.causal_conv1d.reference import causal_conv1d_ref
    from bestiary.kernels.causal_conv1d.update import causal_conv1d_update, causal_conv1d_varlen_states
    from bestiary.kernels.causal_conv1d.update_reference import causal_conv1d_update_ref
    from bestiary.kernels.cross_scan import cross_merge_fn, cross_orders, cross_scan_fn
    from bestiary.kernels.gated_norm import rms_norm_gated
    from bestiary.kernels.gated_norm.reference import rms_norm_gated_ref
    from bestiary.kernels.mamba2_decode import mamba2_step
    from bestiary.kernels.mamba2_decode.reference import mamba2_step_ref
    from bestiary.kernels.mamba_inner import bimamba_inner_fn, mamba_inner_fn, mamba_inner_fn_no_out_proj
    from bestiary.kernels.scan_order import argsort_order, check_order, gather_tokens, invert_order
    from bestiary.kernels.selective_scan import selective_scan_fn
    from bestiary.kernels.selective_scan.reference import selective_scan_ref
    from bestiary.kernels.ssd import mamba_chunk_scan_combined, ssd_minimal_discrete
    from bestiary.kernels.ssd.reference import mamba_chunk_scan_ref
    from bestiary.kernels.ssd.split_conv1d import mamba_split_conv1d_scan_combined
    from bestiary.kernels.state_update import selective_state_update
    from bestiary.kernels.state_update.reference import selective_state_update_ref

_HOME = {
    "BackendUnavailableError": "backends",
    "argsort_order": "scan_order",
    "backend_report": "backends",
    "bimamba_inner_fn": "mamba_inner",
    "causal_conv1d_fn": "causal_conv1d",
    "causal_conv1d_ref": "causal_conv1d.reference",
    "causal_conv1d_update": "causal_conv1d.update",
    "causal_conv1d_update_ref": "causal_conv1d.update_reference",
    "causal_conv1d_varlen_states": "causal_conv1d.update",
    "check_order": "scan_order",
    "cross_merge_fn": "cross_scan",
    "cross_orders": "cross_scan",
    "cross_scan_fn": "cross_scan",
    "gather_tokens": "scan_order",
    "invert_order": "scan_order",
    "mamba2_step": "mamba2_decode",
    "mamba2_step_ref": "mamba2_decode.reference",
    "mamba_chunk_scan_combined": "ssd",
    "mamba_chunk_scan_ref": "ssd.reference",
    "mamba_inner_fn": "mamba_inner",
    "mamba_inner_fn_no_out_proj": "mamba_inner",
    "mamba_split_conv1d_scan_combined": "ssd.split_conv1d",
    "rms_norm_gated": "gated_norm",
    "rms_norm_gated_ref": "gated_norm.reference",
    "selective_scan_fn": "selective_scan",
    "selective_scan_ref": "selective_scan.reference",
    "selective_state_update": "state_update",
    "selective_state_update_ref": "state_update.reference",
    "ssd_minimal_discrete": "ssd",
}

__all__ = [
    "BackendUnavailableError",
    "argsort_order",
    "backend_report",
    "bimamba_inner_fn",
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
    "check_order",
    "cross_merge_fn",
    "cross_orders",
    "cross_scan_fn",
    "gather_tokens",
    "invert_order",
    "mamba2_step",
    "mamba2_step_ref",
    "mamba_chunk_scan_combined",
    "mamba_chunk_scan_ref",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_split_conv1d_scan_combined",
    "rms_norm_gated",
    "rms_norm_gated_ref",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
    "ssd_minimal_discrete",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
