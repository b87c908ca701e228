"""HybridLM: the stack as a language backbone of the contract.

Shape legend: B rows, T new tokens, S cached and new tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bestiary.shared.core.build import check_arguments
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.language.hybrid.cache import STATE_DTYPES, HybridCache
from bestiary.shared.language.hybrid.config import OURS, HybridConfig
from bestiary.shared.language.hybrid.init import init_weights
from bestiary.shared.language.hybrid.layer import HybridLayer
from bestiary.shared.language.hybrid.layout import make_layout
from bestiary.shared.language.hybrid.moe import MoE, Router
from bestiary.shared.language.hybrid.mtp import MTPModule, predict_ahead
from bestiary.shared.language.hybrid.norms import RMSNorm
from bestiary.shared.language.tokenizers import load_tokenizer

WEIGHT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def weights_in(dtype: torch.dtype) -> Iterator[None]:
    """New parameters get this dtype, so that a large model never stands in memory in another."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class HybridLM(nn.Module):
    """A decoder of Mamba-2, attention, MLP and MoE layers in any order.

    Papers: arXiv:2504.03624 (Nemotron-H), arXiv:2508.14444 (Nano 2), arXiv:2512.20856 (Nemotron 3).

    Args:
        config: a :class:`HybridConfig` or its fields.
        tokenizer: name or folder, see :func:`bestiary.shared.language.tokenizers.load_tokenizer`; null is ``byte``, or
            the checkpoint's own where ``path`` is given.
        path: a checkpoint folder of nemotron_h, whose config.json wins over ``config`` but for what no config.json has.
            Null is fresh weights.
        chat_template: one of ``chat_templates.TEMPLATES`` by name, or null for the tokenizer's own.
        dtype: of the weights, ``float32`` or ``bfloat16``; routers choose in float32 either way.
        state_dtype: of the SSM states in a cache: ``float32``, or ``float16`` with stochastic rounding.
        recompute: keep only each layer's input for the backward pass, and compute the rest again (activation
            checkpointing).
        compile: run each layer through torch.compile.

    Attributes:
        hidden_size: D. config: the shape, with ``vocab_size`` filled in.
        tokenizer, tokenizer_name: the tokenizer, and what it was loaded by.
        extra_config: what a checkpoint's config.json says besides; a saved copy keeps it.
        ahead: whether training runs the MTP modules, see :meth:`look_ahead`.
        aux_losses: in training, by name, what the last forward pass adds to a loss: ``balance``, the sum over MoE
            layers of the sequence-wise balance loss.
        aux_logits: in training, the logits of the MTP modules: entry d (B, T, V) predicts token t + 2 + d.

    Raises:
        ConfigError: for a shape that cannot be.
    """

    cache_carries_gradient = True

    def __init__(
        self,
        config: HybridConfig | Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        path: str | None = None,
        chat_template: str | None = None,
        dtype: str = "float32",
        state_dtype: str = "float32",
        recompute: bool = False,
        compile: bool = False,
    ):
        super().__init__()
        if config is None and path is None:
            raise ConfigError("HybridLM needs a config, or the path of a checkpoint")
        if isinstance(config, Mapping):
            check_arguments(HybridConfig, config, "backbone.config")
            if lacking := {"pattern", "hidden_size"} - set(config):
                raise ConfigError(f"backbone.config lacks {', '.join(sorted(lacking))}")
            config = HybridConfig(**config)
        self.extra_config: dict[str, Any] = {}
        if path is not None:
            from bestiary.shared.hub.nemotron_h_config import read_config

            stored, self.extra_config = read_config(path)
            config = replace(stored, **{name: getattr(config, name) for name in OURS} if config else {})
        assert config is not None
        kinds = config.layers
        if state_dtype not in STATE_DTYPES:
            raise ConfigError(f"state_dtype must be {' or '.join(STATE_DTYPES)}, not {state_dtype!r}")
        if dtype not in WEIGHT_DTYPES:
            raise ConfigError(f"dtype must be {' or '.join(WEIGHT_DTYPES)}, not {dtype!r}")
        self.tokenizer_name = str(tokenizer or self.extra_config.get("bestiary_tokenizer") or path or "byte")
        self.tokenizer = load_tokenizer(self.tokenizer_name, chat_template)
        self.tokenizer.add_tokens(self.extra_config.get("bestiary_added_tokens", []))
        vocab = config.vocab_size or self.tokenizer.vocab_size
        if vocab < self.tokenizer.vocab_size:
            raise ConfigError(f"vocab_size {vocab} is less than the tokenizer's {self.tokenizer.vocab_size}")
        self.config = config = replace(config, vocab_size=vocab)
        self.hidden_size = config.hidden_size
        self.state_dtype, self.recompute = STATE_DTYPES[state_dtype], recompute
        with weights_in(WEIGHT_DTYPES[dtype]):
            self.embeddings = nn.Embedding(vocab, config.hidden_size)
            self.layers = nn.ModuleList([HybridLayer(config, kind, i) for i, kind in enumerate(kinds)])
            self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
            self.lm_head = nn.Linear(config.hidden_size, vocab, bias=False)
            self.mtp = nn.ModuleList([MTPModule(config) for _ in range(config.num_nextn_predict_layers)])
            init_weights(self, config)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embeddings.weight
        self.aux_losses: dict[str, torch.Tensor] = {}
        self.aux_logits: list[torch.Tensor] = []
        self.ahead = False
        if path is not None and self.embeddings.weight.device.type != "meta":
            from bestiary.shared.hub.nemotron_h import load_weights

            load_weights(self, path)  # pyright: ignore[reportArgumentType]
        if compile:
            for layer in self.layers:
                layer.compile()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 to (B, T, D)."""
        return self.embeddings(ids)

    def new_cache(self, batch_size: int) -> HybridCache:
        """An empty cache for ``batch_size`` rows."""
        weight = self.embeddings.weight
        return HybridCache.empty(self.config, self.config.layers, batch_size, weight, self.state_dtype)

    def load_cache(self, path: Path) -> HybridCache:
        """A cache that :meth:`HybridCache.save` wrote.

        Raises:
            BadDataError: if it is another model's.
        """
        return HybridCache.load(path, self.new_cache(1))

    def add_tokens(self, names: Sequence[str]) -> list[int]:
        """Add special tokens, and grow the embedding and the head where needed; returns their ids.

        New rows are the mean of the old ones: a token that nobody has seen should not stand out.
        """
        ids = self.tokenizer.add_tokens(names)
        size = self.tokenizer.vocab_size
        if size > self.embeddings.num_embeddings:
            tied = self.lm_head.weight is self.embeddings.weight
            with torch.no_grad():
                for module in (self.embeddings, self.lm_head):
                    old = module.weight
                    new = old.mean(0, keepdim=True).expand(size - len(old), -1)
                    module.weight = nn.Parameter(torch.cat([old, new]), requires_grad=old.requires_grad)
            if tied:
                self.lm_head.weight = self.embeddings.weight
            self.embeddings.num_embeddings = self.lm_head.out_features = size
            self.config = replace(self.config, vocab_size=size)
        return ids

    def look_ahead(self, wanted: bool) -> None:
        """Run the MTP modules in training, or leave them out and frozen; an objective that trains them asks for it."""
        self.ahead = wanted and len(self.mtp) > 0
        if not wanted:
            self.mtp.requires_grad_(False)

    def take_aux(self) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """``aux_logits`` and ``aux_losses`` of the last forward pass, which are not kept after that."""
        taken = self.aux_logits, self.aux_losses
        self.aux_logits, self.aux_losses = [], {}
        return taken

    def layer_classes(self) -> set[type[nn.Module]]:
        """The layer, which FSDP shards as one unit."""
        return {HybridLayer}

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cache: HybridCache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, HybridCache | None]:
        """Run the stack.

        Padding may stand anywhere in a row, also between what is cached and what comes: no real token sees it, and a
        row's states are those after its real tokens.

        Args:
            inputs_embeds: (B, T, D).
            attention_mask: (B, S) of 0 and 1 over cached and new tokens, or None.
            position_ids: taken and not used: these models have no positional encoding.
            seq_idx: (B, T) sequence numbers of packed rows; a token sees its own sequence alone. Not with a cache.
            cache: from :meth:`new_cache`, or None; brought forward.
            logits_to_keep: how many last positions get logits (0: all), or their indices.

        Returns:
            logits (B, T or kept, V), last hidden states behind ``norm_f`` (B, T, D), the cache.

        Raises:
            ValueError: for shapes that do not fit.
        """
        layout = make_layout(inputs_embeds, attention_mask, seq_idx, None if cache is None else cache.length)
        if cache is not None:
            cache.begin()
        again = self.recompute and self.training and torch.is_grad_enabled() and cache is None
        self.take_aux()  # so that no graph of an earlier step is kept through this one
        x, balance = inputs_embeds, []
        for number, layer in enumerate(self.layers):
            if again:
                x, loss = checkpoint(layer, x, layout, use_reentrant=False)  # type: ignore[misc]
            else:
                x, loss = layer(x, layout, cache.layers[number] if cache else None, cache)
            if loss is not None:
                balance.append(loss)
        hidden = self.norm_f(x)
        if cache is not None:
            cache.advance(layout.length)
        kept = hidden
        if isinstance(logits_to_keep, torch.Tensor):
            kept = hidden[:, logits_to_keep]
        elif logits_to_keep:
            kept = hidden[:, -logits_to_keep:]
        logits = self.lm_head(kept)
        if self.training and self.ahead and cache is None:
            modules: list[Any] = list(self.mtp)
            self.aux_logits, more = predict_ahead(
                modules, self.config.depths, hidden, inputs_embeds, self.lm_head, attention_mask, seq_idx
            )
            balance += more
        if balance:
            self.aux_losses["balance"] = torch.stack(balance).sum()
        return logits, hidden, cache

    def routers(self) -> list[Router]:
        """The routers of all MoE layers, those of the MTP modules last."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def _balanced(self) -> list[Router]:
        """Those of layers that are trained: adapters elsewhere must not change what a frozen layer chooses."""
        layers = [module for module in self.modules() if isinstance(module, MoE)]
        return [layer.gate for layer in layers if any(p.requires_grad for p in layer.parameters())]

    @torch.no_grad()
    def after_step(self, applied: bool) -> dict[str, float]:
        """Balance the experts after an optimiser step, by the loads of all processes since the last one.

        A MoE layer none of whose parameters is trained is left alone.

        Args:
            applied: false for a step that was skipped: nothing moves then.

        Returns:
            ``max_violation``: the largest over the mean load, of the worst layer; 1 is balance.
        """
        routers = self._balanced()
        loads = [router.load.clone() for router in routers]
        for router in self.routers():
            router.load.zero_()
        if not routers:
            return {}
        loads = torch.stack(loads)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(loads)
        if not applied or float(loads.sum()) == 0:
            return {}
        for router, load in zip(routers, loads, strict=True):
            router.rebalance(load)
        return {"max_violation": float((loads.amax(1) / loads.mean(1).clamp(min=1e-9)).max())}
