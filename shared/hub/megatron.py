"""Names and layouts of Megatron-LM's hybrid models against those of nemotron_h checkpoints: pure functions.

Uncertain until seen on a Megatron checkpoint: the names of the MoE layers' tensors beyond the router, that of the
final norm, and that a MoE layer's norm is ``pre_mlp_layernorm``. MTP modules are not mapped: their names are not known.

Source: Megatron-Bridge's nemotronh bridge, as far as the facts of this repository have it.
"""

from __future__ import annotations

import torch

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.language.hybrid.config import HybridConfig

_MAMBA = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight")


def megatron_names(config: HybridConfig) -> dict[str, tuple[str, ...]]:
    """Each tensor of a Megatron model, and the tensors of a nemotron_h checkpoint that it is made of.

    Several names are joined: query, key and value by :func:`join_qkv`. Megatron fuses the norm in front of a layer into
    its first linear layer (``layer_norm_weight``), and may pad the vocabulary to a multiple of 128.

    Args:
        config: the shape, without MTP modules.

    Returns:
        Megatron's name to the names on disk.

    Raises:
        ConfigError: for a model with biases that no Nemotron has.
    """
    if config.use_bias or config.attention_bias or config.mlp_bias:
        raise ConfigError("there are no names for biases of projections: no Nemotron model has them")
    names: dict[str, tuple[str, ...]] = {
        "embedding.word_embeddings.weight": ("backbone.embeddings.weight",),
        "decoder.final_norm.weight": ("backbone.norm_f.weight",),
        "output_layer.weight": ("lm_head.weight",),
    }
    if config.tie_word_embeddings:
        del names["output_layer.weight"]
    for number, kind in enumerate(config.layers):
        theirs, ours = f"decoder.layers.{number}", f"backbone.layers.{number}"
        one = {"M": _mamba, "*": _attention, "-": _mlp, "E": _moe}[kind](config)
        for name, sources in one.items():
            names[f"{theirs}.{name}"] = tuple(f"{ours}.{source}" for source in sources)
    return names


def _mamba(config: HybridConfig) -> dict[str, tuple[str, ...]]:
    names = {f"mixer.{name}": (f"mixer.{name}",) for name in _MAMBA if config.use_conv_bias or name != "conv1d.bias"}
    return {**names, "mixer.in_proj.layer_norm_weight": ("norm.weight",)}


def _attention(config: HybridConfig) -> dict[str, tuple[str, ...]]:
    return {
        "self_attention.linear_qkv.weight": tuple(f"mixer.{x}_proj.weight" for x in "qkv"),
        "self_attention.linear_qkv.layer_norm_weight": ("norm.weight",),
        "self_attention.linear_proj.weight": ("mixer.o_proj.weight",),
    }


def _mlp(config: HybridConfig) -> dict[str, tuple[str, ...]]:
    return {
        "mlp.linear_fc1.weight": ("mixer.up_proj.weight",),
        "mlp.linear_fc1.layer_norm_weight": ("norm.weight",),
        "mlp.linear_fc2.weight": ("mixer.down_proj.weight",),
    }


def _moe(config: HybridConfig) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {
        "pre_mlp_layernorm.weight": ("norm.weight",),
        "mlp.router.weight": ("mixer.gate.weight",),
        "mlp.router.expert_bias": ("mixer.gate.e_score_correction_bias",),
    }
    for theirs, ours in (("linear_fc1", "up_proj"), ("linear_fc2", "down_proj")):
        for expert in range(config.n_routed_experts):
            names[f"mlp.experts.{theirs}.weight{expert}"] = (f"mixer.experts.{expert}.{ours}.weight",)
        if config.moe_shared_expert_intermediate_size:
            names[f"mlp.shared_experts.{theirs}.weight"] = (f"mixer.shared_experts.{ours}.weight",)
    if config.moe_latent_size:
        names |= {f"mlp.{x}_latent_proj.weight": (f"mixer.{x}_latent_proj.weight",) for x in ("fc1", "fc2")}
    return names


def join_qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, config: HybridConfig) -> torch.Tensor:
    """Megatron's fused projection: for each key-value head its query heads, then its key, then its value.

    Args:
        query: (A * P, D). key, value: (K * P, D). config: says A, K and P.

    Returns:
        ((A + 2 K) * P, D).
    """
    kv = config.num_key_value_heads
    parts = [t.unflatten(0, (kv, -1, config.head_dim)) for t in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 2)


def split_qkv(fused: torch.Tensor, config: HybridConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of :func:`join_qkv`."""
    kv = config.num_key_value_heads
    parts = fused.unflatten(0, (kv, -1, config.head_dim)).split([config.num_attention_heads // kv, 1, 1], dim=1)
    query, key, value = (part.flatten(0, 2) for part in parts)
    return query, key, value
