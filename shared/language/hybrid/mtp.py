"""Multi-token prediction: small heads that look further ahead than the next token.

Shape legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from bestiary.shared.language.hybrid.cache import HybridCache
from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.hybrid.layer import HybridLayer
from bestiary.shared.language.hybrid.layout import Layout, make_layout
from bestiary.shared.language.hybrid.norms import RMSNorm


class MTPModule(nn.Module):
    """From what was known at a token, and the token after it, to what is known there.

    ``h' = final_layernorm(layers(eh_proj([enorm(embedding of token t+1), hnorm(h_t)])))``; the model's own head reads
    ``h'``, which predicts token t+2 and takes the place of ``h`` at the next depth.

    Uncertain until seen on a released checkpoint: that the embedding comes first in the concatenation (Megatron's
    order), and that ``h`` is taken behind ``norm_f``.

    Paper: arXiv:2412.19437 Sec. 2.2; arXiv:2512.20856 (Nemotron 3).
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_epsilon
        self.enorm, self.hnorm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.layers = nn.ModuleList([HybridLayer(config, kind, i) for i, kind in enumerate(config.mtp_pattern)])
        self.final_layernorm = RMSNorm(width, eps)

    def forward(
        self, hidden_BTD: torch.Tensor, next_BTD: torch.Tensor, layout: Layout, cache: HybridCache | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states one token further.

        Args:
            hidden_BTD: behind the last norm, of the model or of the depth before.
            next_BTD: embeddings of the tokens after these.
            layout: of the chunk.
            cache: of this module's layers, for drafting; brought forward.

        Returns:
            (B, T, D), and the balance losses of its MoE layers in training.
        """
        if cache is not None:
            cache.begin()
        x = self.eh_proj(torch.cat([self.enorm(next_BTD), self.hnorm(hidden_BTD)], dim=-1))
        losses = []
        for number, layer in enumerate(self.layers):
            x, balance = layer(x, layout, cache.layers[number] if cache else None, cache)
            if balance is not None:
                losses.append(balance)
        if cache is not None:
            cache.advance(layout.length)
        return self.final_layernorm(x), losses


def predict_ahead(
    modules: Sequence[MTPModule],
    depths: int,
    hidden_BTD: torch.Tensor,
    embeds_BTD: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    attention_mask: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits of all depths in training; the last module serves all further depths.

    Args:
        modules: the heads.
        depths: how many to run, one after another.
        hidden_BTD: the model's last hidden states.
        embeds_BTD: its input embeddings.
        head: hidden states to logits.
        attention_mask: (B, T), or None. seq_idx: (B, T), or None.

    Returns:
        For each depth d from 1 logits (B, T, V), of which position t predicts token t + 1 + d (the last d + 1 predict
        nothing), and the balance losses of the modules' MoE layers.
    """
    logits, losses = [], []
    layout = make_layout(embeds_BTD, attention_mask, seq_idx, None)
    for depth in range(1, depths + 1):
        module = modules[min(depth, len(modules)) - 1]
        shifted = F.pad(embeds_BTD[:, depth:], (0, 0, 0, min(depth, embeds_BTD.shape[1])))
        hidden_BTD, more = module(hidden_BTD, shifted, layout)
        logits.append(head(hidden_BTD))
        losses += more
    return logits, losses
