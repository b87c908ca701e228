"""The attention layer ``*``: causal, grouped queries, no positional encoding.

Shape legend: B rows, T new tokens, S cached and new tokens, D width, A query heads, K key-value heads, P head width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from bestiary.shared.language.hybrid.cache import KeyValues
from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.hybrid.layout import Layout

MASKED_QUERIES = 256
"""Queries that are attended at once where a mask has to be written out, so that it stays (B, 1, this, S)."""


class Attention(nn.Module):
    """Softmax attention with ``A / K`` query heads for each key-value head, scale ``1 / sqrt(P)``.

    Order comes from the Mamba layers; rope_theta of the released configs is used by no code.
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(self, x_BTD: torch.Tensor, layout: Layout, cache: KeyValues | None = None) -> torch.Tensor:
        """(B, T, D) to the same; new keys and values are put into ``cache``."""
        q_BATP = self.q_proj(x_BTD).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k_BKTP = self.k_proj(x_BTD).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        v_BKTP = self.v_proj(x_BTD).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        k_BKSP, v_BKSP = (k_BKTP, v_BKTP) if cache is None else cache.append(k_BKTP, v_BKTP)
        y_BATP = self._attend(q_BATP, k_BKSP, v_BKSP, layout)
        return self.o_proj(y_BATP.transpose(1, 2).flatten(2))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
        grouped = self.heads != self.kv_heads
        length = q.shape[2]
        if layout.plain:
            if length == 1 and grouped:  # one query: the heads of a group as its queries, twice as fast on a CPU
                folded = q.view(len(q), self.kv_heads, -1, self.head_dim)
                return F.scaled_dot_product_attention(folded, k, v).reshape(q.shape)
            return F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, enable_gqa=grouped)
        parts = []
        for start in range(0, length, MASKED_QUERIES):
            stop = min(start + MASKED_QUERIES, length)
            end = layout.past + stop
            mask, part = layout.seen(start, stop), q[:, :, start:stop]
            parts.append(
                F.scaled_dot_product_attention(part, k[:, :, :end], v[:, :, :end], attn_mask=mask, enable_gqa=grouped)
            )
        return torch.cat(parts, dim=2)
