"""Scan orders: (B, L) gather indices, ``order[b, t]`` being the source token that is visited at step t.

An order is a permutation of ``0 … L-1`` in every row. With ``BESTIARY_KERNELS_DEBUG=1`` every op that takes an
order checks that; otherwise only shape and dtype are checked, since the check costs a sort.
"""

from __future__ import annotations

import os

import torch

from bestiary.kernels.backends.dispatch import implementation

_INTS = (torch.int32, torch.int64)


def argsort_order(scores_BL: torch.Tensor) -> torch.Tensor:
    """The order that visits tokens by ascending score; equal scores keep their place.

    Args:
        scores_BL: (..., L), any real dtype. NaN comes last.

    Returns:
        (..., L) int64. It carries no gradient: an order is piecewise constant in the scores.

    Differs from paper: the official code of arXiv:2508.07237 sorts without asking for stability; a stable sort
    gives one answer on every device.
    """
    return torch.argsort(scores_BL.detach(), dim=-1, stable=True)


def invert_order(order_BL: torch.Tensor) -> torch.Tensor:
    """The inverse permutation of every row: ``inverse[b, order[b, t]] = t``. Linear in L, no sort.

    Args:
        order_BL: (..., L) int32 or int64 permutations.

    Returns:
        (..., L) int64.

    Raises:
        ValueError: if the dtype is not an integer one.
    """
    _check_dtype(order_BL)
    index = order_BL.long()
    steps = torch.arange(index.shape[-1], device=index.device).expand_as(index)
    return torch.empty_like(index, memory_format=torch.contiguous_format).scatter_(-1, index, steps)


def gather_tokens(
    x_BLD: torch.Tensor, order_BL: torch.Tensor, inverse_BL: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """Tokens in the given order: ``out[b, t] = x[b, order[b, t]]``.

    The gradient gathers with the inverse order, which is linear and needs no atomic additions. To put tokens
    back, gather with the inverse.

    Args:
        x_BLD: (B, L, D) tokens.
        order_BL: (B, L) int32 or int64 permutations.
        inverse_BL: the inverse order if the caller has it already; computed when a gradient needs it otherwise.
        backend: name of a backend, see :mod:`bestiary.kernels.backends`.

    Returns:
        (B, L, D).

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    if x_BLD.ndim != 3:
        raise ValueError(f"gather_tokens needs tokens (B, L, D), got {tuple(x_BLD.shape)}")
    B, L, _ = x_BLD.shape
    check_order(order_BL, B, L, "order")
    if inverse_BL is not None:
        check_order(inverse_BL, B, L, "inverse")
    return implementation("scan_order", backend, x_BLD)(x_BLD, order_BL, inverse_BL)


def check_order(order: torch.Tensor, B: int, L: int, name: str = "scan_order", *, several: bool = False) -> None:
    """Raise ValueError unless ``order`` is (B, L) of int32 or int64 (and, in debug mode, a permutation).

    Args:
        order: the order to check.
        B: rows expected.
        L: tokens expected.
        name: what to call it in the message.
        several: (B, K, L), several orders of one row, will do too.
    """
    shape = tuple(order.shape)
    if shape != (B, L) and not (several and order.ndim == 3 and shape == (B, shape[1], L) and shape[1]):
        forms = "(B, L) or (B, K, L)" if several else "(B, L)"
        raise ValueError(f"{name} must be {forms} = ({B}, {L}), got {shape}")
    _check_dtype(order, name)
    if os.environ.get("BESTIARY_KERNELS_DEBUG") == "1":
        steps = torch.arange(L, device=order.device)
        if not bool((order.long().sort(-1).values == steps).all()):
            raise ValueError(f"{name} is not a permutation of 0 … {L - 1} in every row")


def _check_dtype(order: torch.Tensor, name: str = "order") -> None:
    if order.dtype not in _INTS:
        raise ValueError(f"{name} must be int32 or int64, got {order.dtype}")
