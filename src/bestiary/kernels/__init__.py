"""The Mamba kernels: same names, shapes and semantics as mamba-ssm and causal-conv1d, on any machine.

The public functions are loaded on first use, so that importing this package does not import torch. They need
torch alone.

Functions:
    selective_scan_fn, selective_scan_ref: the selective scan of Mamba-1.
    causal_conv1d_fn, causal_conv1d_ref: the short causal depthwise convolution before it.
    argsort_order, invert_order, gather_tokens, check_order: scan orders and what is done with them.
    backend_report: which implementation each op uses on this machine, and why not the others.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bestiary.kernels.backends import BackendUnavailableError, backend_report
    from bestiary.kernels.causal_conv1d import causal_conv1d_fn
    from bestiary.kernels.causal_conv1d.reference import causal_conv1d_ref
    from bestiary.kernels.scan_order import argsort_order, check_order, gather_tokens, invert_order
    from bestiary.kernels.selective_scan import selective_scan_fn
    from bestiary.kernels.selective_scan.reference import selective_scan_ref

_HOME = {
    "BackendUnavailableError": "backends",
    "argsort_order": "scan_order",
    "backend_report": "backends",
    "causal_conv1d_fn": "causal_conv1d",
    "causal_conv1d_ref": "causal_conv1d.reference",
    "check_order": "scan_order",
    "gather_tokens": "scan_order",
    "invert_order": "scan_order",
    "selective_scan_fn": "selective_scan",
    "selective_scan_ref": "selective_scan.reference",
}

__all__ = [
    "BackendUnavailableError",
    "argsort_order",
    "backend_report",
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "check_order",
    "gather_tokens",
    "invert_order",
    "selective_scan_fn",
    "selective_scan_ref",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
