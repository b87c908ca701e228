"""Which of the shim's functions were called, how often, and on which backend they ran."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from bestiary.kernels.backends import BACKENDS, target_for, why_absent
from bestiary.kernels.backends.dispatch import implementation

COUNTS: dict[str, Counter[str]] = {}
"""Function name to calls per backend."""


def counted(op: str, name: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function so that its calls are counted.

    Args:
        op: the op whose backend does the work; what runs is decided by the call's tensors.
        name: what to call the function in the report, its own name by default.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        label = name or function.__name__

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():  # a compiled graph calls nothing of Python
                tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
                # integers (orders, sequences) decide nothing
                backend = _backend_of(op, [t for t in tensors if t.is_floating_point() or t.is_complex()])
                COUNTS.setdefault(label, Counter())[backend] += 1
            return function(*args, **kwargs)

        return wrapper

    return decorate


def report() -> str:
    """The counts as lines of text."""
    if not COUNTS:
        return "  no function of the shim was called"
    width = max(map(len, COUNTS))
    lines = []
    for name, backends in sorted(COUNTS.items()):
        where = ", ".join(f"{backend} {n}" for backend, n in sorted(backends.items()))
        total = sum(backends.values())
        lines.append(f"  {name:<{width}}  {total} call{'s' if total != 1 else ''}: {where}")
    return "\n".join(lines)


def reset() -> None:
    """Forget all counts."""
    COUNTS.clear()


def _backend_of(op: str, tensors: list[torch.Tensor]) -> str:
    function = implementation(op, None, *tensors)
    target = f"{function.__module__}:{function.__name__}"
    return next((b for b in BACKENDS if why_absent(op, b) is None and target_for(op, b) == target), target)
