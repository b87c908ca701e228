"""The presets of transformers' decoders: parameter totals on the meta device, and what they set on purpose."""

import pytest
import torch
from omegaconf import OmegaConf

from bestiary.shared.core.build import build
from bestiary.shared.core.config import conf_dir
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.testing.tiny_checkpoint import write_tiny_checkpoint


def preset(name, **changes):
    return OmegaConf.merge(OmegaConf.load(conf_dir() / "backbone" / f"{name}.yaml"), changes)


def total(kind, d, ffn, layers, heads, kv, vocab, head_dim):
    """Parameters counted by hand: two embeddings, then what a layer has."""
    attention = d * heads * head_dim * 2 + d * kv * head_dim * 2
    extras = (heads + 2 * kv) * head_dim if kind == "qwen2" else 2 * head_dim  # biases of q, k, v; or norms of q, k
    return 2 * vocab * d + layers * (attention + extras + 3 * d * ffn + 2 * d) + d


@pytest.mark.parametrize(
    ("name", "published", "shape", "theta"),
    [
        ("qwen2_5_7b", 7_615_616_512, ("qwen2", 3584, 18944, 28, 28, 4, 152064, 128), 1e6),
        ("qwen2_5_math_7b", 7_615_616_512, ("qwen2", 3584, 18944, 28, 28, 4, 152064, 128), 1e6),
        ("r1_distill_qwen_7b", 7_615_616_512, ("qwen2", 3584, 18944, 28, 28, 4, 152064, 128), 1e4),
        ("r1_distill_qwen_14b", 14_770_033_664, ("qwen2", 5120, 13824, 48, 40, 8, 152064, 128), 1e6),
        ("qwen3_8b_base", 8_190_735_360, ("qwen3", 4096, 12288, 36, 32, 8, 151936, 128), 1e6),
        ("qwen3_14b_base", 14_768_307_200, ("qwen3", 5120, 17408, 40, 40, 8, 151936, 128), 1e6),
    ],
)
def test_totals(name, published, shape, theta):
    with torch.device("meta"):
        lm = build(preset(name))
    assert sum(p.numel() for p in lm.parameters()) == total(*shape) == published
    assert lm.lm.config.rope_parameters["rope_theta"] == theta
    assert lm.tokenizer.key == "byte"


def test_a_folder_wins_but_for_what_is_set_on_purpose(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "tiny", "qwen2")
    lm = build(preset("qwen2_5_math_7b", path=str(folder)))
    assert (lm.hidden_size, lm.lm.config.max_position_embeddings) == (32, 131072)
    assert lm.lm.config.rope_parameters["rope_theta"] == 1e6
    assert lm.tokenizer.key.startswith("tiny-")
    lm = build(preset("r1_distill_qwen_7b", path=str(folder)))
    assert lm.lm.config.max_position_embeddings == 256
    lm = build(preset("hf_causal_lm", path=str(folder)))
    assert lm.hidden_size == 32
    with pytest.raises(ConfigError, match="holds a qwen2 model, and this backbone is of type qwen3"):
        build(preset("qwen3_8b_base", path=str(folder)))


def test_what_cannot_be_built():
    with pytest.raises(ConfigError, match=r"llama_nemotron_super_49b_v1 cannot be built: .*transformers has no class"):
        build(preset("llama_nemotron_super_49b_v1"))
    with pytest.raises(ConfigError, match=r"needs a checkpoint: backbone\.path=FOLDER"):
        build(preset("hf_causal_lm"))
