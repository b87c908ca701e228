"""An audio encoder that is never trained: what it says of a clip is a feature of the clip."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from bestiary.shared.audio.whisper_encoder import WhisperEncoder
from bestiary.shared.core.errors import ConfigError


class FrozenEncoder(nn.Module):
    """Runs the encoder where features are made, so that they can be kept and a clip is encoded once in a run.

    Args:
        encoder: its weights are taken out of training for good.

    Attributes:
        out_dim, step_seconds, tokens_per_window, front_end: the encoder's.
    """

    def __init__(self, encoder: WhisperEncoder):
        super().__init__()
        # Buffers are saved with a checkpoint and moved with the model, and no glob of trainable names reaches them.
        for module in encoder.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
        self.encoder = encoder
        self.front_end, self.out_dim = encoder.front_end, encoder.out_dim
        self.step_seconds, self.tokens_per_window = encoder.step_seconds, encoder.tokens_per_window

    @property
    def layers(self) -> nn.ModuleList:
        """The encoder's."""
        return self.encoder.layers

    def token_counts(self, frames: torch.Tensor) -> torch.Tensor:
        """The encoder's."""
        return self.encoder.token_counts(frames)

    @torch.no_grad()
    def preprocess(self, raw: tuple[np.ndarray, int]) -> tuple[dict[str, torch.Tensor], int]:
        """As the encoder's, but ``features`` (W, D, S) are tokens, padded to the longest window's."""
        items, total = self.encoder.preprocess(raw)
        device = self.encoder.conv1.weight.device
        tokens, counts = self.encoder(items["features"].to(device), items["lengths"].to(device))
        width = int(counts.max())
        padded = tokens.new_zeros(len(counts), width, self.out_dim)
        padded[torch.arange(width, device=device) < counts[:, None]] = tokens
        return {**items, "features": padded.transpose(1, 2).cpu()}, total

    def forward(self, features: torch.Tensor, lengths: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (N, D) of windows, and counts (W,).

        Args:
            features: (W, D, S) from :meth:`preprocess`.
            lengths: (W,) real frames.
        """
        counts = self.token_counts(lengths)
        tokens = features.transpose(1, 2)
        return tokens[torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]], counts


def freeze_encoder(model: nn.Module) -> nn.Module:
    """A ``prepare`` step: never train a model's audio encoder again, and keep its tokens of a clip as features.

    Raises:
        ConfigError: for a model without an encoder of audio.
    """
    encoder: Any = getattr(model, "encoder", None)
    if not hasattr(encoder, "token_counts"):
        raise ConfigError("freeze_encoder: the model has no encoder of audio")
    if not isinstance(encoder, FrozenEncoder):
        model.encoder = FrozenEncoder(encoder)
    return model
