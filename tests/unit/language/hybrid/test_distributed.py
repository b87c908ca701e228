"""Two processes against one: experts are balanced by the loads of both, and a sharded stack computes the same."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from bestiary.shared.language.causal_lm import CausalLM
from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.hybrid.model import HybridLM

CONFIG = HybridConfig(
    pattern="M-*E",
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    n_groups=2,
    ssm_state_size=8,
    chunk_size=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
    router_bias_rate=0.1,
    initializer_range=0.3,
)


def model():
    torch.manual_seed(0)
    return CausalLM(HybridLM(CONFIG)).train()


def rows():
    return torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(1))


def loss_of(lm, ids):
    # without the balance loss, which is a mean over a process's own sequences
    batch = {"ids": [""] * len(ids), "input_ids": ids, "attention_mask": None, "position_ids": None, "seq_idx": None}
    return lm(batch).logits.square().sum()


def work(rank, folder, sharded):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": "2"}
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    lm = model()
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for module in lm.modules():
            if isinstance(module, tuple(lm.wrap_policy())):
                fully_shard(module)
        fully_shard(lm)
    loss_of(lm, rows()[2 * rank : 2 * rank + 2]).backward()
    metrics = lm.backbone.after_step(True)
    # FSDP averages over processes; the sum over both processes' rows is wanted.
    grads = {n: 2 * p.grad.full_tensor() if sharded else p.grad for n, p in lm.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(
            {"bias": lm.backbone.routers()[0].e_score_correction_bias, "metrics": metrics, "grads": grads},
            f"{folder}/out",
        )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_equal_one(tmp_path, sharded):
    mp.spawn(work, (str(tmp_path), sharded), nprocs=2)
    found = torch.load(Path(tmp_path) / "out", weights_only=True)
    lm = model()
    loss_of(lm, rows()).backward()
    metrics = lm.backbone.after_step(True)
    assert found["metrics"] == pytest.approx(metrics)
    assert torch.equal(found["bias"], lm.backbone.routers()[0].e_score_correction_bias)
    assert found["bias"].abs().max() > 0.09
    if sharded:
        expected = {n: p.grad for n, p in lm.named_parameters() if p.grad is not None}
        assert found["grads"].keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(
                found["grads"][name], grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item(), msg=name
            )
