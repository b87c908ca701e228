"""One layer: norm, mixer, residual."""

from __future__ import annotations

import torch
from torch import nn

from bestiary.shared.language.hybrid.attention import Attention
from bestiary.shared.language.hybrid.cache import HybridCache, KeyValues, MambaState
from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.hybrid.layout import Layout
from bestiary.shared.language.hybrid.mamba2 import Mamba2Mixer
from bestiary.shared.language.hybrid.mlp import MLP
from bestiary.shared.language.hybrid.moe import MoE
from bestiary.shared.language.hybrid.norms import RMSNorm


class HybridLayer(nn.Module):
    """``x + mixer(norm(x))`` with the mixer that ``kind`` names.

    Args:
        config: the stack's. kind: one of ``M * - E``. number: of this layer in the stack.
    """

    def __init__(self, config: HybridConfig, kind: str, number: int = 0):
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        if kind == "M":
            self.mixer: nn.Module = Mamba2Mixer(config, number)
        elif kind == "*":
            self.mixer = Attention(config)
        elif kind == "E":
            self.mixer = MoE(config)
        else:
            self.mixer = MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def forward(
        self,
        x_BTD: torch.Tensor,
        layout: Layout,
        state: MambaState | KeyValues | None = None,
        cache: HybridCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Bring the residual stream (B, T, D) forward.

        Args:
            x_BTD: the stream.
            layout: of the chunk.
            state: this layer's part of ``cache``, or None.
            cache: all of it.

        Returns:
            The stream, and a MoE layer's balance loss in training.
        """
        normed, balance = self.norm(x_BTD), None
        if self.kind == "M":
            y = self.mixer(normed, layout, state, cache)
        elif self.kind == "*":
            y = self.mixer(normed, layout, state)
        elif self.kind == "E":
            y, balance = self.mixer(normed, layout)
        else:
            y = self.mixer(normed)
        return x_BTD + y, balance
