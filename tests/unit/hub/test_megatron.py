"""Megatron's names cover a checkpoint exactly once; the fused projection by hand."""

import pytest
import torch

from bestiary.shared.hub.megatron import join_qkv, megatron_names, split_qkv
from bestiary.shared.hub.nemotron_h import disk_names, tensors_of
from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.hybrid.model import HybridLM

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 2,
    "n_groups": 2,
    "ssm_state_size": 4,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 4,
    "moe_shared_expert_intermediate_size": 4,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": "M-M*-ME"},
        {"pattern": "ME*E", "moe_latent_size": 4},
        {"pattern": "M", "use_conv_bias": False, "tie_word_embeddings": True},
        {"pattern": "E", "moe_shared_expert_intermediate_size": 0},
    ],
)
def test_every_tensor_of_a_checkpoint_has_one_place(changes):
    config = HybridConfig(**{**SIZES, **changes})
    with torch.device("meta"):
        model = HybridLM(config)
    stored = sorted(key for name in tensors_of(model) for key in disk_names(name, model.config))
    assert sorted(source for sources in megatron_names(config).values() for source in sources) == stored


def test_names_as_the_facts_have_them():
    names = megatron_names(HybridConfig(pattern="M*-E", **SIZES))
    assert names["decoder.layers.0.mixer.A_log"] == ("backbone.layers.0.mixer.A_log",)
    assert names["decoder.layers.0.mixer.in_proj.layer_norm_weight"] == ("backbone.layers.0.norm.weight",)
    assert names["decoder.layers.1.self_attention.linear_qkv.weight"] == tuple(
        f"backbone.layers.1.mixer.{x}_proj.weight" for x in "qkv"
    )
    assert names["decoder.layers.2.mlp.linear_fc1.weight"] == ("backbone.layers.2.mixer.up_proj.weight",)
    assert names["decoder.layers.3.mlp.router.expert_bias"] == ("backbone.layers.3.mixer.gate.e_score_correction_bias",)


def test_the_fused_projection_by_hand():
    config = HybridConfig(pattern="*", **{**SIZES, "head_dim": 1})
    q, k, v = torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[5.0], [6]]), torch.tensor([[7.0], [8]])
    fused = join_qkv(q, k, v, config)
    assert fused[:, 0].tolist() == [1, 2, 5, 7, 3, 4, 6, 8]
    assert all(torch.equal(a, b) for a, b in zip(split_qkv(fused, config), (q, k, v), strict=True))
    wide = HybridConfig(pattern="*", **SIZES)
    parts = torch.randn(8, 8), torch.randn(4, 8), torch.randn(4, 8)
    assert all(torch.equal(a, b) for a, b in zip(split_qkv(join_qkv(*parts, wide), wide), parts, strict=True))
