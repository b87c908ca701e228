"""config.json of nemotron_h, of any age."""

import json

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.hub.nemotron_h_config import decode_floats, encode_floats, parse_config, read_config
from bestiary.shared.language.hybrid.config import HybridConfig

SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 40,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}


def test_legacy_aliases():
    old = {
        "hybrid_override_pattern": "M-|M*",
        "num_hidden_layers": 4,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_head_dim": 16,
        "mamba_num_heads": 8,
        "mamba_n_groups": 4,
        "mamba_d_conv": 3,
        "mamba_expand": 2,
        "mamba_dt_min": 0.002,
        "mamba_dt_max": 0.2,
        "mamba_dt_limit": [0.0, float("inf")],
        "mamba_dt_init_floor": 0.0002,
        "mamba_conv_bias": False,
        "mamba_chunk_size": 32,
        "rope_theta": 10000,
        "eos_token_id": 12,
    }
    config, extra = parse_config(old)
    assert config == HybridConfig(
        pattern="M-M*",
        hidden_size=32,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mamba_num_heads=8,
        n_groups=4,
        conv_kernel=3,
        time_step_min=0.002,
        time_step_max=0.2,
        time_step_floor=0.0002,
        use_conv_bias=False,
        chunk_size=32,
    )
    assert extra == {"mamba_expand": 2, "rope_theta": 10000, "eos_token_id": 12}


@pytest.mark.parametrize(
    "names", [["mamba", "mlp", "attention", "moe"], ["linear_attention", "mlp", "full_attention", "moe"]]
)
def test_names_of_layers_old_and_new(names):
    config, _ = parse_config({**SIZES, "layers_block_type": names, "mtp_layers_block_type": ["attention", "moe"]})
    assert (config.pattern, config.mtp_pattern) == ("M-*E", "*E")


def test_infinity_as_json_writes_it():
    written = {"a": {"__float__": "Infinity"}, "b": [0.0, {"__float__": "-Infinity"}], "c": {"d": 1}}
    values = decode_floats(written)
    assert values == {"a": float("inf"), "b": [0.0, float("-inf")], "c": {"d": 1}}
    assert encode_floats(values) == written
    assert encode_floats(float("nan")) == {"__float__": "NaN"}


@pytest.mark.parametrize("text", ['{"__float__": "Infinity"}', "Infinity", "1e999"])
def test_the_limit_of_released_files(tmp_path, text):
    body = json.dumps({**SIZES, "model_type": "nemotron_h", "hybrid_override_pattern": "M-", "n_routed_experts": 0})
    body = body[:-1] + f', "time_step_limit": [0.0, {text}]}}'
    (tmp_path / "config.json").write_text(body)
    assert read_config(tmp_path)[0].time_step_limit == (0.0, float("inf"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mlp_hidden_act": "gelu"}, "mlp_hidden_act is 'gelu'"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, and the pattern has 2"),
        ({"hybrid_override_pattern": None}, "neither hybrid_override_pattern nor"),
        ({"layers_block_type": ["rwkv"]}, "'rwkv' are not known"),
    ],
)
def test_configs_that_ask_for_more(change, words):
    with pytest.raises(BadDataError, match=words):
        parse_config({**SIZES, "hybrid_override_pattern": "M-", **change})
