"""What is padding and what is packed in a batch: found out once, used by every layer.

Shape legend: B rows, T new tokens, S all tokens (cached and new).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional as F


@dataclass
class Layout:
    """Where the real tokens of a chunk are.

    Attributes:
        batch, length: B, T. past: tokens in the cache. device: of the tensors.
        real: (B, T) bool, false on padding, or None where all are real.
        order: (B, T) int64: the row's real tokens in their order, then the padding; None where padding stands at the
            right anyway. A recurrent mixer that walks in this order meets the padding last, wherever it stands, and a
            row's state after its real tokens is then its last state.
        keys: (B, S) bool, keys that may be attended to, or None where causality alone decides.
        seq_idx: (B, T) int32 of packed rows, rising by one where a row's next sequence begins, or None.
    """

    batch: int
    length: int
    past: int
    device: torch.device
    real: torch.Tensor | None = None
    order: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    seq_idx: torch.Tensor | None = None

    @cached_property
    def counts(self) -> torch.Tensor | None:
        """(B,) real tokens of each row, or None where all are real."""
        return None if self.real is None else self.real.sum(1)

    @cached_property
    def rows(self) -> torch.Tensor:
        """(B,) int32 for single steps: the row's own number, or -1 where the row has no real token."""
        numbers = torch.arange(self.batch, device=self.device, dtype=torch.int32)
        return numbers if self.real is None else numbers.masked_fill(~self.real[:, 0], -1)

    @property
    def plain(self) -> bool:
        """Whether causality alone decides what is seen, and a plain causal mask says so."""
        return self.keys is None and self.seq_idx is None and (not self.past or self.length == 1)

    def seen(self, start: int, stop: int) -> torch.Tensor:
        """Which keys the queries ``start`` to ``stop`` of the chunk attend to.

        Returns:
            bool (B or 1, 1, stop - start, past + stop): no query sees further.
        """
        total = self.past + stop
        queries = torch.arange(self.past + start, self.past + stop, device=self.device)
        mask = (torch.arange(total, device=self.device) <= queries[:, None])[None, None]
        if self.keys is not None:
            # A padding query may see no key at all and would turn to NaN: let it see itself.
            own = torch.arange(total, device=self.device) == queries[:, None]
            mask = mask & self.keys[:, None, None, :total] | own
        if self.seq_idx is not None:
            mask = mask & (self.seq_idx[:, None, start:stop, None] == self.seq_idx[:, None, None, :stop])
        return mask


def make_layout(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    past: int | None,
) -> Layout:
    """Look at the mask once.

    Args:
        inputs_embeds: (B, T, D).
        attention_mask: (B, S) of 0 and 1 over cached and new tokens, or None.
        seq_idx: (B, T) numbers of packed sequences, a new one where they change, or None.
        past: tokens in the cache, or None without one.

    Raises:
        ValueError: for shapes that do not fit, or packed rows with a cache.
    """
    batch, length = inputs_embeds.shape[:2]
    if seq_idx is not None and past is not None:
        raise ValueError("seq_idx and a cache exclude each other: which of a row's sequences would go on?")
    past = past or 0
    layout = Layout(batch, length, past, inputs_embeds.device)
    if seq_idx is not None:
        if tuple(seq_idx.shape) != (batch, length):
            raise ValueError(f"seq_idx must be (B, T) = {(batch, length)}, got {tuple(seq_idx.shape)}")
        # A number that comes again is another sequence.
        layout.seq_idx = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).cumsum(1, dtype=torch.int32)
    if attention_mask is None:
        return layout
    if tuple(attention_mask.shape) != (batch, past + length):
        raise ValueError(
            f"attention_mask must be (B, cached + new) = {(batch, past + length)}, got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask.bool()
    if bool(mask.all()):
        return layout
    if not _at_the_right(mask):
        layout.keys = mask
    new = mask[:, past:]
    if not bool(new.all()):
        layout.real = new
        if not _at_the_right(new):
            layout.order = (~new).to(torch.uint8).argsort(dim=1, stable=True)
    return layout


def _at_the_right(mask: torch.Tensor) -> bool:
    return not bool((~mask[:, :-1] & mask[:, 1:]).any())
