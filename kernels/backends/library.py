"""Registering ops with torch.library, so that autograd, torch.compile and opcheck know them as one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("bestiary", "DEF")


def define(
    schema: str,
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define ``bestiary::<name>`` and return it.

    Args:
        schema: ``"name(Tensor x, …) -> Tensor"``.
        cpu: what runs on CPU tensors. Its outputs share no memory with its inputs.
        fake: shapes, strides and dtypes of the outputs, from inputs that have no values.
        setup_context: keeps what the gradient needs.
        backward: the gradient; it must be differentiable itself.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"bestiary::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"bestiary::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.bestiary, name).default


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient may be asked for, so that an op must keep what its backward needs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def as_index(t: torch.Tensor | None) -> torch.Tensor | None:
    """Indices as the C++ takes them: int32 or int64."""
    return t if t is None or t.dtype in (torch.int32, torch.int64) else t.to(torch.int32)


def empty_rows(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An empty (B, K, E, L) tensor in the layout of ``like``: tokens contiguous, or channels."""
    B, K, E, L = like.shape
    if like.stride(2) == 1 and like.stride(3) != 1:
        return like.new_empty((B, K, L, E), dtype=dtype).transpose(2, 3)
    return like.new_empty((B, K, E, L), dtype=dtype)


def differentiate(
    function: Callable[..., Any], inputs: list[torch.Tensor | None], grads: list[torch.Tensor], needed: list[bool]
) -> list[torch.Tensor | None]:
    """Gradients that can be differentiated again, by autograd through a reference.

    Args:
        function: from the inputs to a tuple of outputs, in operations that autograd knows.
        inputs: its arguments; None stays None.
        grads: gradients of the outputs.
        needed: which inputs want a gradient.

    Returns:
        One gradient or None for each input.
    """
    with torch.enable_grad():
        # aliases, because one input may be a function of another and only the direct gradient is wanted here
        alias = [None if t is None else t.view_as(t) for t in inputs]
        outputs = function(*alias)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        wanted = [t for t, need in zip(alias, needed, strict=True) if need and t is not None and t.requires_grad]
        if not pairs or not wanted:
            return [None] * len(inputs)
        found = torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
        )
    by_id = {id(t): g for t, g in zip(wanted, found, strict=True)}
    return [None if t is None else by_id.get(id(t)) for t in alias]
