"""transformers' decoders behind the LanguageBackbone protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bestiary.shared.core.errors import ConfigError, require
from bestiary.shared.language.byte_tokenizer import ByteTokenizer


class HFCausalLM(nn.Module):
    """Any Llama- or Qwen-like decoder of transformers, built from its config with fresh weights.

    Args:
        model_type: transformers' name of the architecture, for example ``llama``.
        config: arguments of its config class; ``vocab_size`` is the tokenizer's.
        tokenizer: ``byte``, the in-tree byte tokenizer.

    Attributes:
        hidden_size: width of the embeddings. tokenizer: the tokenizer. lm: transformers' module.

    Raises:
        ConfigError: for an unknown architecture or tokenizer.
    """

    def __init__(self, model_type: str, config: dict[str, Any], tokenizer: str = "byte"):
        super().__init__()
        transformers = require("transformers", "zoo")
        if tokenizer != "byte":
            raise ConfigError(f"backbone.tokenizer {tokenizer!r} is not known; there is: byte")
        self.tokenizer = ByteTokenizer()
        try:
            hf_config = transformers.AutoConfig.for_model(
                model_type,
                **{
                    **config,
                    "vocab_size": self.tokenizer.vocab_size,
                    "pad_token_id": self.tokenizer.pad_id,
                    "eos_token_id": self.tokenizer.eos_id,
                    "bos_token_id": None,
                },
            )
        except ValueError as error:
            raise ConfigError(f"backbone.model_type {model_type!r} is not known to transformers") from error
        hf_config._attn_implementation = "sdpa"
        self.lm = transformers.AutoModelForCausalLM.from_config(hf_config)
        self.hidden_size: int = hf_config.hidden_size
        # transformers 5.24 renamed it and warns at the old name.
        fields = transformers.modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__
        self._cache_name = "cache" if "cache" in fields else "past_key_values"

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 to (B, T, hidden_size)."""
        return self.lm.get_input_embeddings()(ids)

    def new_cache(self, batch_size: int) -> Any:
        """An empty key-value cache; it takes its batch size from what is put in."""
        return require("transformers", "zoo").DynamicCache(config=self.lm.config)

    def add_tokens(self, names: Sequence[str]) -> list[int]:
        """Add special tokens and grow the embedding and the head where needed; returns their ids."""
        ids = self.tokenizer.add_tokens(names)
        if self.tokenizer.vocab_size > self.lm.config.vocab_size:
            self.lm.resize_token_embeddings(self.tokenizer.vocab_size)
        return ids

    def layer_classes(self) -> set[type[nn.Module]]:
        """The decoder layer's class, which FSDP shards and checkpointing recomputes as one unit."""
        names = set(self.lm._no_split_modules or [])
        return {type(m) for m in self.lm.modules() if type(m).__name__ in names}

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cache: Any = None,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Run the decoder.

        Args:
            inputs_embeds: (B, T, D).
            attention_mask: (B, S) of 0 and 1 over cached and new tokens, or None.
            position_ids: (B, T), or None for counting from the cache's length.
            seq_idx: (B, T) packing index: a token sees its own sequence alone. Not together with a cache.
            cache: from :meth:`new_cache`, or None.
            logits_to_keep: how many last positions get logits (0: all), or their indices.

        Returns:
            logits (B, T or kept, V), last hidden states (B, T, D), the cache.
        """
        mask: torch.Tensor | None = attention_mask
        if seq_idx is not None:
            if cache is not None:
                raise ValueError("seq_idx and a cache exclude each other")
            mask = packed_mask(seq_idx, attention_mask, inputs_embeds.dtype)
        out = self.lm(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            **{self._cache_name: cache},
            use_cache=cache is not None,
            logits_to_keep=logits_to_keep,
            output_hidden_states=True,
        )
        return out.logits, out.hidden_states[-1], getattr(out, self._cache_name)


def packed_mask(seq_idx: torch.Tensor, attention_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Additive (B, 1, T, T) mask: causal, within one sequence, and not onto padding.

    Args:
        seq_idx: (B, T).
        attention_mask: (B, T) of 0 and 1, or None.
        dtype: of the mask.
    """
    length = seq_idx.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=seq_idx.device).tril()
    seen = seen & (seq_idx[:, :, None] == seq_idx[:, None, :])
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, :].bool()
    # A padding row would see nothing and turn to NaN: let it see itself.
    seen = seen | torch.eye(length, dtype=torch.bool, device=seq_idx.device)
    return torch.zeros(seen.shape, dtype=dtype, device=seq_idx.device).masked_fill(~seen, -torch.inf)[:, None]
