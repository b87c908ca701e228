"""Reading and writing the rows of a cache of states, with padded slots, with and without gradients."""

from __future__ import annotations

import torch


def may_look_at(values: torch.Tensor) -> bool:
    """Whether a check may read a tensor's values: they are at hand, and nothing is being traced."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def check_rows(
    name: str, state_name: str, state: torch.Tensor, index_name: str, indices: torch.Tensor | None, batch: int
) -> None:
    """Raise ValueError unless the cache has the rows that a step of ``batch`` sequences writes to.

    Args:
        name: the function that asks, for the message.
        state_name: what it calls the cache.
        state: (slots, ...).
        index_name: what it calls the indices.
        indices: (B,) rows of the cache, negative for a padded slot; None where the cache has a row for each.
        batch: B.
    """
    if indices is None:
        if state.shape[0] != batch:
            raise ValueError(
                f"{name}: {state_name} has {state.shape[0]} rows for a batch of {batch}; give {index_name}"
            )
    elif tuple(indices.shape) != (batch,) or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}: {index_name} must be ({batch},) of int32 or int64, got {tuple(indices.shape)} {indices.dtype}"
        )
    elif batch and may_look_at(indices) and int(indices.max()) >= state.shape[0]:
        raise ValueError(f"{name}: {state_name} has {state.shape[0]} rows, and {index_name} has {int(indices.max())}")
    if state.requires_grad and state.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            f"{name} writes to {state_name}, which is a leaf that requires grad; pass {state_name}.clone(), and "
            "gradients reach the leaf through it"
        )


def read_rows(
    state: torch.Tensor, indices: torch.Tensor | None, dtype: torch.dtype, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The states of a step's sequences.

    Args:
        state: (slots, ...).
        indices: (B,) rows, negative for a padded slot; None for all.
        dtype: of the result.
        keep: return a copy, because autograd needs the old state after the cache was written to.

    Returns:
        (B, ...) states in ``dtype``, and (B,) whether a slot is real, None if all are. A padded slot reads row 0.
    """
    if indices is None:
        return (state.to(dtype, copy=True) if keep else state.to(dtype)), None
    real = indices >= 0
    return state[indices.clamp(min=0).long()].to(dtype), real


def write_rows(state: torch.Tensor, new: torch.Tensor, indices: torch.Tensor | None, real: torch.Tensor | None) -> None:
    """Write the states after a step to the cache; padded slots write nothing.

    The cache takes part in autograd only if it did so before.

    Args:
        state: (slots, ...).
        new: (B, ...).
        indices: (B,) rows, or None for all.
        real: (B,) from :func:`read_rows`.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and state.requires_grad):
        if indices is None or real is None:
            state.copy_(new)
        else:
            state.index_copy_(0, indices[real].long(), new[real].to(state.dtype))
