"""Which implementation of an op runs: the registry of backends and the reasons why one is absent.

``BESTIARY_KERNELS=auto|reference|cpu|triton|cuda`` picks a backend for every op. ``auto`` (the default) takes
the first available of :data:`BACKENDS`; a named backend that an op does not have is an error that says why.

This module imports no torch: the report is also for machines where torch is what is broken.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from bestiary.kernels.backends import native

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""All names, in the order in which ``auto`` tries them."""

ENV = "BESTIARY_KERNELS"

_NOT_WRITTEN = {
    "cuda": "no binding to mamba-ssm or causal-conv1d for this op in this version",
    "triton": "no Triton kernel for this op in this version",
    "cpu": "no C++ kernel for this op: plain PyTorch is all it needs",
}

_IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "causal_conv1d": {
        "reference": "bestiary.kernels.causal_conv1d.reference:causal_conv1d_ref",
        "cpu": "bestiary.kernels.causal_conv1d.cpu:causal_conv1d_cpu",
    },
    "causal_conv1d_update": {
        "reference": "bestiary.kernels.causal_conv1d.update_reference:causal_conv1d_update_ref",
        "cpu": "bestiary.kernels.causal_conv1d.update_cpu:causal_conv1d_update_cpu",
    },
    "gated_norm": {
        "reference": "bestiary.kernels.gated_norm.reference:rms_norm_gated_ref",
        "cpu": "bestiary.kernels.gated_norm.cpu:rms_norm_gated_cpu",
    },
    "mamba2_decode": {
        "reference": "bestiary.kernels.mamba2_decode.reference:mamba2_step_ref",
        "cpu": "bestiary.kernels.mamba2_decode.cpu:mamba2_step_cpu",
    },
    "scan_order": {"reference": "bestiary.kernels.scan_order.reference:gather_tokens_ref"},
    "selective_scan": {
        "reference": "bestiary.kernels.selective_scan.reference:selective_scan_ref",
        "cpu": "bestiary.kernels.selective_scan.cpu:selective_scan_cpu",
    },
    "ssd": {
        "reference": "bestiary.kernels.ssd.reference:mamba_chunk_scan_ref",
        "cpu": "bestiary.kernels.ssd.cpu:chunk_scan_cpu",
    },
    "state_update": {
        "reference": "bestiary.kernels.state_update.reference:selective_state_update_ref",
        "cpu": "bestiary.kernels.state_update.cpu:selective_state_update_cpu",
    },
}
_PROBES: dict[tuple[str, str], Callable[[], str | None]] = {
    (op, "cpu"): native.why_absent for op, targets in _IMPLEMENTATIONS.items() if "cpu" in targets
}


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


def register(op: str, backend: str, target: str, probe: Callable[[], str | None] | None = None) -> None:
    """Add an implementation of an op.

    Args:
        op: the op's folder name, for example ``"selective_scan"``.
        backend: one of :data:`BACKENDS`.
        target: ``"module:function"``, imported when it is first used.
        probe: returns None where the backend can run, else the reason why it cannot.

    Raises:
        ValueError: for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    _IMPLEMENTATIONS.setdefault(op, {})[backend] = target
    if probe is not None:
        _PROBES[op, backend] = probe


def why_absent(op: str, backend: str) -> str | None:
    """None if ``backend`` can run ``op`` here, else the reason why not.

    Raises:
        ValueError: for an unknown op or backend.
    """
    if op not in _IMPLEMENTATIONS:
        raise ValueError(f"unknown op {op!r}; there are {', '.join(sorted(_IMPLEMENTATIONS))}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    if backend not in _IMPLEMENTATIONS[op]:
        return _NOT_WRITTEN[backend]
    probe = _PROBES.get((op, backend))
    return probe() if probe is not None else None


def choose_backend(op: str, backend: str | None = None) -> str:
    """The name of the backend that an op uses.

    Args:
        op: the op's folder name.
        backend: a name, ``"auto"``, or None for what the environment says.

    Raises:
        ValueError: for a name that does not exist.
        BackendUnavailableError: for a named backend that this op does not have here.
    """
    source = "backend="
    if backend is None:
        backend, source = os.environ.get(ENV) or "auto", f"{ENV}="
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"{source}{backend} is no backend; there are auto, {', '.join(reversed(BACKENDS))}")
    if backend == "auto":
        return next(name for name in BACKENDS if why_absent(op, name) is None)
    reason = why_absent(op, backend)
    if reason is not None:
        raise BackendUnavailableError(f"{source}{backend}: {op} cannot use it: {reason}. Use auto or reference.")
    return backend


def target_for(op: str, backend: str | None = None, refusals: dict[str, str] | None = None) -> str:
    """``"module:function"`` of what runs ``op`` on given inputs.

    Args:
        op: the op's folder name.
        backend: a name, ``"auto"``, or None for what the environment says.
        refusals: backends that cannot take these inputs, with the reason; ``auto`` passes them over.

    Raises:
        ValueError: for a name that does not exist.
        BackendUnavailableError: for a named backend that cannot run this op here, or not on these inputs.
    """
    refusals = refusals or {}
    name = choose_backend(op, backend)
    if name in refusals:
        asked = backend or os.environ.get(ENV) or "auto"
        if asked != "auto":
            raise BackendUnavailableError(f"{asked}: {op} cannot use it: {refusals[name]}. Use auto or reference.")
        name = next(n for n in BACKENDS if n not in refusals and why_absent(op, n) is None)
    return _IMPLEMENTATIONS[op][name]


def backend_report() -> dict[str, dict[str, Any]]:
    """What runs here and why the others do not.

    Returns:
        ``{op: {"uses": name, "others": {name: reason}}}``. A backend that could run but is not the one in use
        has the reason ``"available"``. Where the environment asks for what an op has not, ``uses`` is None and
        the reasons say why.

    Raises:
        ValueError: if the environment names no backend at all.
    """
    report: dict[str, dict[str, Any]] = {}
    for op in sorted(_IMPLEMENTATIONS):
        try:
            uses = choose_backend(op)
        except BackendUnavailableError:
            uses = None
        others = {name: why_absent(op, name) or "available" for name in BACKENDS if name != uses}
        report[op] = {"uses": uses, "others": others}
    return report
