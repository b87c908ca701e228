"""Small stacks with weights far from uniform, so that an error shows."""

import pytest
import torch

from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.hybrid.model import HybridLM

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "initializer_range": 0.25,
}


@pytest.fixture(scope="session")
def make_lm():
    """``make_lm(pattern, seed=0, dtype=float32, **config)``: a stack in eval mode, dt_bias and router bias moved."""

    def make(pattern, seed=0, dtype=torch.float32, backbone=None, **changes):
        torch.manual_seed(seed)
        lm = HybridLM(HybridConfig(pattern=pattern, **{**SIZES, **changes}), **(backbone or {})).to(dtype).eval()
        with torch.no_grad():
            for name, tensor in [*lm.named_parameters(), *lm.named_buffers()]:
                if name.endswith(("dt_bias", "e_score_correction_bias")):
                    tensor.add_(torch.randn_like(tensor))
                if name.endswith("norm.weight") or name.endswith("conv1d.bias"):
                    tensor.add_(0.3 * torch.randn_like(tensor))
        return lm

    return make


@pytest.fixture(scope="session")
def run_lm():
    """``run_lm(lm, ids, mask=None, cache=None, …)``: logits without gradient; ids and mask may be lists."""

    @torch.no_grad()
    def run(lm, ids, mask=None, cache=None, **options):
        ids = torch.as_tensor(ids)
        mask = None if mask is None else torch.as_tensor(mask)
        return lm(lm.embed(ids), mask, cache=cache, **options)[0]

    return run
