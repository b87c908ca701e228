"""Reading prompts: those of like length together, so that a short one does not pay for a long one's padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

PASS_TOKENS = {"cpu": 256}
PASS_TOKENS_ELSEWHERE = 4096
"""What one more pass costs, by device, in tokens that could have been read in its time. Chosen: on a CPU a pass of so
many hides the weights' way from memory; for other devices, where launching kernels costs, nothing was measured."""


def prefill(
    backbone: Any,
    embeds: torch.Tensor,
    mask: torch.Tensor,
    position: torch.Tensor,
    chunk: int | None = None,
) -> tuple[torch.Tensor, Any]:
    """Run left-padded prompts.

    Prompts of much different length are read in several passes and their caches joined, where the cache can be
    (``joinable``) and the padding that this saves is worth the passes. The result is the same.

    Args:
        backbone: a LanguageBackbone.
        embeds: (B, T, D).
        mask: (B, T) of 0 and 1.
        position: (B, T).
        chunk: read so many tokens at a time; None for all.

    Returns:
        logits (B, 1, V) of the next token, and the cache of all rows, T long.
    """
    width = mask.shape[1]
    lengths = (width - mask.long().argmax(1)).tolist()
    cost = PASS_TOKENS.get(embeds.device.type, PASS_TOKENS_ELSEWHERE)
    joinable = getattr(backbone.new_cache(1), "joinable", False)
    groups = like_lengths(lengths, cost) if joinable else [list(range(len(lengths)))]
    if len(groups) == 1:
        return _read(backbone, embeds, mask, position, chunk)
    logits, caches = [], []
    for rows in groups:
        index = torch.tensor(rows, device=mask.device)
        start = width - max(lengths[row] for row in rows)
        out, cache = _read(backbone, embeds[index, start:], mask[index, start:], position[index, start:], chunk)
        logits.append(out)
        caches.append(cache)
    caches[0].join(caches[1:])
    order = torch.tensor([row for rows in groups for row in rows], device=mask.device).argsort()
    return torch.cat(logits)[order], select_rows(caches[0], order)


def _read(
    backbone: Any, embeds: torch.Tensor, mask: torch.Tensor, position: torch.Tensor, chunk: int | None
) -> tuple[torch.Tensor, Any]:
    cache, length = backbone.new_cache(len(mask)), mask.shape[1]
    logits = embeds.new_zeros(len(mask), 1, 0)
    for start in range(0, length, chunk or length):
        at = slice(start, min(start + (chunk or length), length))
        logits, _, cache = backbone(embeds[:, at], mask[:, : at.stop], position[:, at], None, cache, 1)
    return logits, cache


def like_lengths(lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Rows in groups, such that the tokens read (each group as long as its longest row) and the passes cost least.

    Args:
        lengths: of the rows.
        cost: of a group, in tokens.

    Returns:
        Groups of row numbers, the longest rows first; a group's rows keep their order.
    """
    sizes = sorted(set(lengths), reverse=True)
    count = [sum(length == size for length in lengths) for size in sizes]
    # best[i]: the least cost of the i longest sizes, and where the last group of them begins.
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(sizes) + 1):
        options = []
        rows = 0
        for begin in range(end - 1, -1, -1):
            rows += count[begin]
            options.append((best[begin][0] + cost + rows * sizes[begin], begin))
        best.append(min(options))
    groups: list[list[int]] = []
    end = len(sizes)
    while end:
        begin = best[end][1]
        among = set(sizes[begin:end])
        groups.append([row for row, length in enumerate(lengths) if length in among])
        end = begin
    return groups[::-1]


def select_rows(cache: Any, rows: torch.Tensor) -> Any:
    """The cache with these rows, in this order: by its own ``select``, or inside nested lists of tensors."""
    if hasattr(cache, "select") and not isinstance(cache, torch.Tensor):
        cache.select(rows)
        return cache
    if isinstance(cache, torch.Tensor):
        return cache[rows.to(cache.device)]
    if isinstance(cache, list | tuple):
        return type(cache)(select_rows(item, rows) for item in cache)
    if isinstance(cache, dict):
        return {key: select_rows(item, rows) for key, item in cache.items()}
    return cache
