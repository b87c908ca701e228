"""transformers' decoders behind the LanguageBackbone protocol."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bestiary.shared.core.errors import BadDataError, ConfigError, require
from bestiary.shared.language.key_value_cache import KeyValueCache
from bestiary.shared.language.tokenizers import load_tokenizer


class HFCausalLM(nn.Module):
    """Any Llama- or Qwen-like decoder of transformers: fresh weights from a config, or a checkpoint's.

    Nothing is ever downloaded. On the meta device a checkpoint's weights are not read, only its config and tokenizer.

    Args:
        model_type: transformers' name of the architecture, for example ``llama``; with ``path`` it may be left out.
        config: arguments of its config class, for fresh weights; ``vocab_size`` is the tokenizer's unless larger.
            A checkpoint has its own, and this is not looked at.
        tokenizer: a name or folder for :func:`~bestiary.shared.language.tokenizers.load_tokenizer`. None: the
            checkpoint's own, or bytes where there is no checkpoint.
        path: a folder with a checkpoint of transformers (config.json, safetensors, tokenizer), or None.
        dtype: of the parameters: ``float32``, ``bfloat16``, or ``auto``, the checkpoint's own.
        overrides: what is changed in the config, fresh or the checkpoint's; nested dicts are merged.
        chat_template: a name of :data:`~bestiary.shared.language.chat_templates.TEMPLATES`, in place of the
            tokenizer's own chat template.

    Attributes:
        hidden_size: width of the embeddings. tokenizer: the tokenizer. lm: transformers' module.
        cache_carries_gradient: a loss on later tokens reaches the earlier ones through the cache.

    Raises:
        ConfigError: for an unknown architecture, tokenizer or dtype, or one that is not the checkpoint's.
        BadDataError: for a folder that is not there, or not whole.
    """

    cache_carries_gradient = True

    def __init__(
        self,
        model_type: str | None = None,
        config: Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        path: str | None = None,
        dtype: str = "float32",
        overrides: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ):
        super().__init__()
        transformers = require("transformers", "zoo")
        if dtype not in ("float32", "bfloat16", "float16", "auto"):
            raise ConfigError(f"backbone.dtype {dtype!r} is not known; there are float32, bfloat16, float16 and auto")
        if path is not None:
            path = str(Path(path).expanduser())
            hf_config = read_config(path, model_type)
            self.tokenizer: Any = load_tokenizer(tokenizer or path, chat_template)
        else:
            self.tokenizer = load_tokenizer(tokenizer or "byte", chat_template)
            hf_config = fresh_config(model_type, config or {}, self.tokenizer)
        change(hf_config, overrides or {})
        hf_config._attn_implementation = "sdpa"
        if path is not None and not torch.empty(0).is_meta:
            self.lm: Any = read_weights(path, hf_config, dtype)
        else:
            kind = None if dtype == "auto" else getattr(torch, dtype)
            self.lm = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=kind or hf_config.dtype)
        if self.tokenizer.vocab_size > self.lm.get_input_embeddings().num_embeddings:
            self._grow()
        self.hidden_size: int = hf_config.hidden_size
        # transformers 5.24 renamed it and warns at the old name.
        fields = transformers.modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__
        self._cache_name = "cache" if "cache" in fields else "past_key_values"

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 to (B, T, hidden_size)."""
        return self.lm.get_input_embeddings()(ids)

    def new_cache(self, batch_size: int) -> KeyValueCache:
        """An empty key-value cache; it takes its batch size from what is put in."""
        return KeyValueCache(self.lm.config)

    def load_cache(self, path: Path) -> KeyValueCache:
        """A cache that was saved, on this model's device."""
        return KeyValueCache.load(path, self.lm.config, self.lm.get_input_embeddings().weight.device)

    def add_tokens(self, names: Sequence[str]) -> list[int]:
        """Add special tokens and grow the embedding and the head where needed; returns their ids."""
        ids = self.tokenizer.add_tokens(names)
        if self.tokenizer.vocab_size > self.lm.get_input_embeddings().num_embeddings:
            self._grow()
        return ids

    def _grow(self) -> None:
        # New rows start like the weights of a fresh model: the mean of the old ones would cost an eigenvalue problem.
        self.lm.resize_token_embeddings(self.tokenizer.vocab_size, mean_resizing=False)

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
        cache: KeyValueCache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, KeyValueCache | None]:
        """Run the decoder.

        Args:
            inputs_embeds: (B, T, D).
            attention_mask: (B, S) of 0 and 1 over cached and new tokens, or None.
            position_ids: (B, T), or None for counting the tokens that the mask does not hide.
            seq_idx: (B, T) packing index: a token sees its own sequence alone. Not together with a cache.
            cache: from :meth:`new_cache`, or None; it is changed in place.
            logits_to_keep: how many last positions get logits (0: all), or their indices.

        Returns:
            logits (B, T or kept, V), last hidden states (B, T, D), the cache.
        """
        mask: torch.Tensor | None = attention_mask
        if position_ids is None and mask is not None:
            position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        if seq_idx is not None:
            if cache is not None:
                raise ValueError("seq_idx and a cache exclude each other")
            if not attends_fully(self.lm.config):
                raise ConfigError(
                    f"packed rows need full attention in every layer, and {self.lm.config.model_type} has others: "
                    "set dataset.reset=false, or use another backbone"
                )
            mask = packed_mask(seq_idx, attention_mask, inputs_embeds.dtype)
        out = self.lm(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            **{self._cache_name: None if cache is None else cache.layers},
            use_cache=cache is not None,
            logits_to_keep=logits_to_keep,
            output_hidden_states=True,
        )
        return out.logits, out.hidden_states[-1], cache


def fresh_config(model_type: str | None, config: Mapping[str, Any], tokenizer: Any) -> Any:
    """Transformers' config of an architecture, with the tokenizer's vocabulary and special tokens.

    Raises:
        ConfigError: if the architecture is unknown or not named.
    """
    transformers = require("transformers", "zoo")
    if model_type is None:
        raise ConfigError("this backbone needs a checkpoint: backbone.path=FOLDER (or model_type and config)")
    try:
        return transformers.AutoConfig.for_model(
            model_type,
            **{
                **copy.deepcopy(dict(config)),
                "vocab_size": max(tokenizer.vocab_size, config.get("vocab_size", 0)),
                "pad_token_id": tokenizer.pad_id,
                "eos_token_id": tokenizer.eos_id,
                "bos_token_id": None,
            },
        )
    except ValueError as error:
        raise ConfigError(f"backbone.model_type {model_type!r} is not known to transformers") from error


def read_config(path: str, model_type: str | None = None) -> Any:
    """The config of a checkpoint folder.

    Args:
        path: the folder.
        model_type: the architecture that it must be of, or None.

    Raises:
        BadDataError: if there is no readable checkpoint of transformers.
        ConfigError: if it is of another architecture, or of one that transformers has no class for.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BadDataError(f"backbone.path: there is no folder {folder}; it takes a checkpoint on this machine")
    if (folder / "structure.json").is_file() or (folder / "run.json").is_file():
        raise BadDataError(f"{folder} is a checkpoint of bestiary: give it as checkpoint= or init_from=, not as a path")
    if not (folder / "config.json").is_file():
        raise BadDataError(f"{folder} has no config.json: it is no checkpoint of transformers")
    transformers = require("transformers", "zoo")
    try:
        values, _ = transformers.PreTrainedConfig.get_config_dict(folder, local_files_only=True)
        found = values.get("model_type")
        if found not in transformers.CONFIG_MAPPING:
            raise ConfigError(f"{folder} holds a {found or 'nameless'} model, which transformers has no class for")
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise BadDataError(f"{folder / 'config.json'} cannot be used: {' '.join(str(error).split())[:300]}") from error
    if model_type not in (None, config.model_type):
        raise ConfigError(f"{folder} holds a {config.model_type} model, and this backbone is of type {model_type}")
    return config


def read_weights(path: str, config: Any, dtype: str) -> nn.Module:
    """The model of a checkpoint folder, on the CPU.

    Raises:
        BadDataError: if weights are missing, of another shape, or unreadable.
    """
    transformers = require("transformers", "zoo")
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=kind, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except ConfigError:
        raise
    except Exception as error:  # transformers and safetensors have many kinds of complaint about files
        raise BadDataError(f"{path}: its weights cannot be read: {' '.join(str(error).split())[:300]}") from error
    finally:
        if shown:
            bars.enable_progress_bar()
    if info["missing_keys"]:
        raise BadDataError(f"{path} lacks weights: {', '.join(sorted(info['missing_keys'])[:4])} …")
    return model.train()  # as a fresh one is


def attends_fully(config: Any) -> bool:
    """Whether every layer attends to all earlier tokens: no window, no recurrent state that runs over a boundary."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None


def change(config: Any, overrides: Mapping[str, Any]) -> None:
    """Set fields of a transformers config, dicts merged into what is there.

    Raises:
        ConfigError: for a field that it does not have.
    """
    for key, value in overrides.items():
        if not hasattr(config, key):
            raise ConfigError(f"backbone.overrides.{key}: a {config.model_type} config has no such field")
        old = getattr(config, key)
        setattr(config, key, {**old, **value} if isinstance(value, Mapping) and isinstance(old, Mapping) else value)


def packed_mask(seq_idx: torch.Tensor, attention_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Additive (B, 1, T, T) mask: causal, within one sequence, and not onto padding.

    Args:
        seq_idx: (B, T).
        attention_mask: (B, T) of 0 and 1, or None.
        dtype: of the mask.
    """
    length = seq_idx.shape[1]
    # A number that comes again is another sequence.
    seq_idx = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).cumsum(1)
    seen = torch.ones(length, length, dtype=torch.bool, device=seq_idx.device).tril()
    seen = seen & (seq_idx[:, :, None] == seq_idx[:, None, :])
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, :].bool()
    # A padding row would see nothing and turn to NaN: let it see itself.
    seen = seen | torch.eye(length, dtype=torch.bool, device=seq_idx.device)
    return torch.zeros(seen.shape, dtype=dtype, device=seq_idx.device).masked_fill(~seen, -torch.inf)[:, None]
