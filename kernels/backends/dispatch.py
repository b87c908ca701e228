"""From a call to the function that runs it. Apart from the registry, because this imports torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from bestiary.kernels.backends import target_for

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Functions:
    """What was resolved, as attributes: of a dictionary, Dynamo would not see what is added while it traces."""


_functions = _Functions()


def implementation(
    op: str, backend: str | None, *tensors: torch.Tensor | None, out_dtype: torch.dtype | None = None
) -> Callable[..., Any]:
    """The function that runs ``op`` on these tensors. torch.compile takes it as a constant.

    Args:
        op: the op's folder name.
        backend: a name, ``"auto"``, or None for what the environment says.
        *tensors: the floating-point arguments: the C++ kernels take float32, bfloat16 and float16 on the CPU, and
            ``auto`` gives what they do not take to the reference.
        out_dtype: dtype of the output where it is asked for: the same three.

    Raises:
        ValueError: for a name that does not exist.
        BackendUnavailableError: for a named backend that cannot run this op here, or not on these tensors.
    """
    refused = "" if out_dtype is None or out_dtype in _CPU_DTYPES else f"it does not give {out_dtype}"
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cpu:  # quicker than its device's name, and asked of every tensor of every step
            refused = f"it takes tensors on the CPU, not on {tensor.device.type}"
        elif tensor.dtype not in _CPU_DTYPES:
            refused = f"it takes float32, bfloat16 and float16, not {tensor.dtype}"
    return getattr(_functions, _resolve(op, backend, refused))


def _resolve(op: str, backend: str | None, refused: str) -> str:
    target = target_for(op, backend, {"cpu": refused} if refused else None)
    attribute = target.replace(".", "_")
    if not hasattr(_functions, attribute):
        module, name = target.split(":")
        setattr(_functions, attribute, getattr(import_module(module), name))
    return attribute


# What torch.compiler.assume_constant_result does, which would import all of the compiler first: three seconds more.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]
