"""The presets have the sizes that the released models have: parameters, keys and values a token, states a sequence."""

import pytest
import torch
from omegaconf import OmegaConf

from bestiary.shared.core.build import build
from bestiary.shared.core.config import conf_dir
from bestiary.shared.core.errors import ConfigError

# name: (billions in all, without both embeddings, M/*/-/E, KV bytes a token in bf16, MiB of SSM states in fp32)
PRESETS = {
    "nemotron_h_4b": (4.489, 3.684, (24, 4, 24, 0), 16384, 84),
    "nemotron_h_8b": (8.101, 7.027, (24, 4, 24, 0), 16384, 96),
    "nemotron_h_47b": (46.79, 44.64, (45, 5, 48, 0), 20480, 720),
    "nemotron_h_56b": (56.32, 54.18, (54, 10, 54, 0), 40960, 864),
    "nemotron_nano_v2_9b": (8.888, 7.714, (27, 4, 25, 0), 16384, 135),
    "nemotron_nano_v2_12b": (12.310, 10.968, (28, 6, 28, 0), 24576, 140),
    "nemotron_3_nano_30b_a3b": (31.578, None, (23, 6, 0, 23), 6144, 46),
    "nemotron_3_super_120b_a12b": (123.61, None, (40, 8, 0, 40), 8192, 160),
}


def preset(name):
    node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "backbone" / f"{name}.yaml"))
    with torch.device("meta"):
        return build({**node, "state_dtype": "float32"})


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_are_those_of_the_released_models(name):
    total, without, counts, kv_bytes, state_mib = PRESETS[name]
    lm = preset(name)
    pattern = lm.config.pattern
    assert tuple(pattern.count(kind) for kind in "M*-E") == counts
    parameters = sum(p.numel() for p in lm.parameters())
    digits = len(str(total).split(".")[1])
    assert round(parameters / 1e9, digits) == total
    if without is not None:
        assert round((parameters - 2 * lm.embeddings.weight.numel()) / 1e9, 3 if total < 20 else 2) == without
    cache = lm.to(torch.bfloat16).new_cache(1)
    ssm = sum(layer.ssm.numel() * layer.ssm.element_size() for layer in cache.layers if hasattr(layer, "ssm"))
    assert round(ssm / 2**20) == state_mib
    keys = [layer for layer in cache.layers if hasattr(layer, "key")]
    assert sum(2 * layer.key.shape[1] * layer.key.shape[3] * 2 for layer in keys) == kv_bytes


def test_super_without_its_mtp_module():
    lm = preset("nemotron_3_super_120b_a12b")
    mtp = sum(p.numel() for p in lm.mtp.parameters())
    assert round(mtp / 1e9, 3) == 2.942
    assert round((sum(p.numel() for p in lm.parameters()) - mtp) / 1e9, 2) == 120.67
    assert lm.config.depths == 2


@pytest.mark.parametrize(("name", "active"), [("nemotron_3_nano_30b_a3b", 3.58), ("nemotron_3_super_120b_a12b", 12.77)])
def test_active_parameters(name, active):
    lm = preset(name)
    config = lm.config
    whole = sum(p.numel() for n, p in lm.named_parameters() if not n.startswith("mtp"))
    experts = sum(p.numel() for n, p in lm.named_parameters() if ".experts." in n and not n.startswith("mtp"))
    used = whole - experts + experts * config.num_experts_per_tok // config.n_routed_experts
    assert round(used / 1e9, 2) == active


def test_ultra_is_refused_for_what_is_not_known():
    with pytest.raises(ConfigError, match="order of this model's layers is not known"):
        preset("nemotron_3_ultra")


@pytest.mark.parametrize(
    ("name", "parameters"), [("hybrid_tiny", 864_200), ("hybrid_small", 19_177_376), ("hybrid_moe_tiny", 1_937_992)]
)
def test_small_ones_run(name, parameters):
    node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "backbone" / "hybrid_tiny.yaml"))
    if name != "hybrid_tiny":
        extra = OmegaConf.to_container(OmegaConf.load(conf_dir() / "backbone" / f"{name}.yaml"))
        node["config"] |= extra["config"]
    lm = build(node)
    assert sum(p.numel() for p in lm.parameters()) == parameters
    assert torch.isfinite(lm(lm.embed(torch.zeros(1, 4, dtype=torch.long)))[0]).all()
