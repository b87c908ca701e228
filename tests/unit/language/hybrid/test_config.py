"""Shapes that cannot be are refused in one line."""

import math

import pytest
import torch

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.hybrid.model import HybridLM

GOOD = {
    "pattern": "M-*E",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_num_heads": 8,
    "n_groups": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": ""}, "empty"),
        ({"pattern": "M-A"}, "'A' is no layer"),
        ({"intermediate_size": 0}, "intermediate_size must be 1 or more"),
        ({"mamba_num_heads": 6}, "n_groups 4 must be a divisor of mamba_num_heads 6"),
        ({"num_attention_heads": 3}, "num_key_value_heads 2 must be a divisor"),
        ({"n_group": 3}, "n_group 3 must be a divisor"),
        ({"n_group": 4, "topk_group": 5}, "topk_group 5 is more than"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "more than there are to choose from"),
        ({"time_step_limit": (1.0, 0.5)}, "time_step_limit"),
        ({"num_nextn_predict_layers": 1, "mtp_pattern": "M"}, "no Mamba layer"),
        ({"num_nextn_predict_layers": -1}, "negative"),
        ({"num_nextn_predict_layers": 2, "mtp_depths": 1}, "mtp_depths 1 is less than"),
    ],
)
def test_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        HybridConfig(**{**GOOD, **changes})


def test_sizes():
    config = HybridConfig(**GOOD, mamba_head_dim=6, ssm_state_size=10, num_nextn_predict_layers=1, mtp_depths=3)
    assert (config.d_inner, config.conv_dim, config.depths) == (48, 48 + 2 * 4 * 10, 3)
    assert config.time_step_limit == (0.0, math.inf)


def test_an_unknown_pattern_is_refused_when_it_is_built():
    with pytest.raises(ConfigError, match="order of this model's layers is not known"):
        HybridLM({**GOOD, "pattern": None})


def test_vocabulary_must_hold_the_tokenizer():
    with pytest.raises(ConfigError, match="vocab_size 100 is less than the tokenizer's 262"):
        HybridLM({**GOOD, "vocab_size": 100})
    with pytest.raises(ConfigError, match="needs a config"):
        HybridLM()
    with pytest.raises(ConfigError, match=r"no argument 'hiden_size'; did you mean 'hidden_size'"):
        HybridLM({**GOOD, "hiden_size": 3})
    with pytest.raises(ConfigError, match="config lacks hidden_size"):
        HybridLM({"pattern": "M"})


def test_weights_in_half_precision():
    lm = HybridLM(GOOD, dtype="bfloat16")
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert lm.routers()[0].e_score_correction_bias.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    assert lm.new_cache(1).layers[0].ssm.dtype == torch.float32
    assert torch.isfinite(lm(lm.embed(torch.zeros(1, 5, dtype=torch.long)))[0]).all()
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        HybridLM(GOOD, dtype="fp8")


def test_fresh_weights():
    """As transformers draws them: A 1 to H, D one, step sizes log-uniform, Mamba's output over sqrt(layers)."""
    torch.manual_seed(0)
    lm = HybridLM({**GOOD, "mamba_num_heads": 256, "mamba_head_dim": 4, "hidden_size": 64})
    mixer = lm.layers[0].mixer
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 257.0))
    assert (mixer.D == 1).all()
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert 0.00099 < dt.min() < 0.0015
    assert 0.07 < dt.max() < 0.1001
    assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.2)
    bound = math.sqrt(1 / 1024) / math.sqrt(4)
    assert mixer.out_proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert lm.layers[1].mixer.down_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert lm.layers[3].mixer.experts.up_proj.std().item() == pytest.approx(0.02, rel=0.1)
    assert lm.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.1)
