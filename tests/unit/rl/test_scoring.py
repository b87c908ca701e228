"""What was sampled is scored the same, and sharing a prompt changes no gradient."""

import pytest
import torch

from bestiary.shared.core.protocols import Sampling
from bestiary.shared.rl.scoring import completion_logprobs


@pytest.fixture
def models(llama):
    from bestiary.shared.language.causal_lm import CausalLM
    from bestiary.shared.language.hybrid.config import HybridConfig
    from bestiary.shared.language.hybrid.model import HybridLM

    def make(kind):
        if kind == "llama":
            return llama()
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 4,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "initializer_range": 0.25,
        }
        return CausalLM(HybridLM(HybridConfig(pattern=kind, **sizes)))

    return make


@pytest.mark.parametrize("kind", ["llama", "M*-", "MEM*E"])
@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("cuts", [{}, {"top_p": 0.9, "top_k": 40}, {"min_p": 0.01}], ids=str)
def test_scored_as_sampled_and_shared_as_whole(models, chats, kind, length, cuts):
    model = models(kind)
    prompts = model.processor()(chats("a longer question", "x"), "prompt")
    sampling = Sampling(length, 0.8, **cuts)
    rollout = model.eval().generate(prompts, 3, sampling)
    model.train()
    owner = torch.arange(2).repeat_interleave(3)
    present = torch.arange(rollout.completion_ids.shape[1]) < rollout.lengths[:, None]
    weight = torch.randn(rollout.logprobs.shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    assert model.backbone.cache_carries_gradient
    for shared in (True, False):
        model.backbone.cache_carries_gradient = shared
        model.zero_grad()
        found = completion_logprobs(model, prompts, owner, rollout.completion_ids, present, sampling)
        torch.testing.assert_close(found[present], rollout.logprobs[present], rtol=0, atol=1e-4)
        (found * weight)[present].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


def test_entropies_are_those_of_the_uncut_distribution(llama, chats):
    model = llama().eval()
    prompts = model.processor()(chats("abc"), "prompt")
    rollout = model.generate(prompts, 4, Sampling(5, 0.7, top_p=0.5), entropy=True)
    whole = completion_logits_by_hand(model, prompts, rollout)
    logp = torch.log_softmax(whole / 0.7, -1)
    expected = -(logp.exp() * logp).sum(-1)
    present = torch.arange(rollout.completion_ids.shape[1]) < rollout.lengths[:, None]
    torch.testing.assert_close(rollout.entropies[present], expected[present], rtol=1e-4, atol=1e-4)
    assert model.generate(prompts, 1, Sampling(2, 1.0)).entropies is None


def completion_logits_by_hand(model, prompts, rollout):
    """One row at a time, without a cache, padding or anything shared."""
    out = []
    prompt = prompts["input_ids"][0][prompts["attention_mask"][0].bool()]
    with torch.no_grad():
        for ids in rollout.completion_ids:
            row = torch.cat([prompt, ids])[None]
            logits = model.backbone.lm(input_ids=row).logits[0]
            out.append(logits[len(prompt) - 1 : -1])
    return torch.stack(out)
