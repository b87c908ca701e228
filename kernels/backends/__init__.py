"""Which implementation of an op runs: the registry of backends and the reasons why one is absent.

``BESTIARY_KERNELS=auto|reference|cpu|triton|cuda`` picks a backend for every op. ``auto`` (the default) takes
the first available of :data:`BACKENDS`; a named backend that an op does not have is an error that says why.

This module imports no torch: the report is also for machines where torch is what is broken.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

BACKENDS = ("cuda", "triton", "cpu", "reference")
"""All names, in the order in which ``auto`` tries them."""

ENV = "BESTIARY_KERNELS"

_NOT_WRITTEN = {
    "cuda": "no binding to mamba-ssm or causal-conv1d for this op in this version",
    "triton": "no Triton kernel for this op in this version",
    "cpu": "no C++ kernel for this op in this version",
}

_IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "selective_scan": {"reference": "bestiary.kernels.selective_scan.reference:selective_scan_ref"},
    "causal_conv1d": {"reference": "bestiary.kernels.causal_conv1d.reference:causal_conv1d_ref"},
    "scan_order": {"reference": "bestiary.kernels.scan_order.reference:gather_tokens_ref"},
}
_PROBES: dict[tuple[str, str], Callable[[], str | None]] = {}


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
    _load.cache_clear()


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


def implementation(op: str, backend: str | None = None) -> Callable[..., Any]:
    """The function that runs ``op``; arguments and errors as :func:`choose_backend`."""
    return _load(_IMPLEMENTATIONS[op][choose_backend(op, backend)])


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


@cache
def _load(target: str) -> Callable[..., Any]:
    module, name = target.split(":")
    return getattr(import_module(module), name)
