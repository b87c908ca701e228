"""Adapters on a hybrid stack: no change at the start, all learn, merged they are gone and the same, exported."""

import copy

import pytest
import torch

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.prepare import lora, merge_lora, set_trainable
from bestiary.shared.hub.load import load_pretrained
from bestiary.shared.hub.nemotron_h import save_pretrained

TARGETS = ["*.mixer.in_proj", "*.mixer.out_proj", "*.mixer.[qkvo]_proj", "*.up_proj", "*.down_proj"]


def adapted(make_lm, targets=TARGETS, **options):
    lm = make_lm("M-*E", **options)
    return lora(lm, targets, r=2, alpha=4)


def moved(lm):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return lm


@pytest.mark.parametrize("latent", [None, 12])
def test_start_train_merge_export(make_lm, run_lm, tmp_path, latent):
    ids = torch.randint(0, 256, (2, 15), generator=torch.Generator().manual_seed(1))
    plain = make_lm("M-*E", moe_latent_size=latent)
    before = run_lm(plain, ids)
    lm = adapted(make_lm, moe_latent_size=latent)
    # in_proj, out_proj; up, down; q, k, v, o; experts' two, the shared expert's two
    assert sum("lora_A" in n for n, _ in lm.named_parameters()) == 2 + 2 + 4 + 2 + 2
    torch.testing.assert_close(run_lm(lm, ids), before, rtol=1e-5, atol=1e-5)

    moved(lm)
    changed = run_lm(lm, ids)
    assert (changed - before).abs().max() > 0.1
    trained = set_trainable(lm, ["*lora_*"])
    lm(lm.embed(ids))[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert all(p.grad is None for n, p in lm.named_parameters() if "lora_" not in n)

    names = [n for n, _ in lm.named_parameters()]
    assert [n for n, _ in lora(lm, TARGETS, r=2, alpha=4).named_parameters()] == names
    with pytest.raises(ConfigError, match=r"experts\.up_proj: r 2, alpha 4"):
        lora(lm, ["*.experts.up_proj"], r=3, alpha=4)
    torch.testing.assert_close(run_lm(lm, ids), changed, rtol=0, atol=0)

    merged = merge_lora(copy.deepcopy(lm))
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in plain.named_parameters()}
    torch.testing.assert_close(run_lm(merged, ids), changed, rtol=1e-4, atol=1e-4)
    cache = lm.new_cache(2)
    steps = torch.cat([run_lm(lm, part, None, cache) for part in ids.split([10, 1, 1, 3], 1)], 1)
    torch.testing.assert_close(steps, changed, rtol=1e-4, atol=1e-4)

    save_pretrained(merged, tmp_path)
    again = load_pretrained(tmp_path).eval()
    torch.testing.assert_close(run_lm(again, ids), run_lm(merged, ids), rtol=1e-5, atol=1e-5)
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    other.model.layers[0].mixer.time_step_limit = (0.0, float("inf"))  # transformers bounds step sizes from below
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, run_lm(merged, ids), rtol=1e-4, atol=1e-4)


def test_each_expert_has_an_update_of_its_own(make_lm):
    lm = moved(adapted(make_lm, ["*.experts.up_proj"]))
    before = dict(make_lm("M-*E").named_parameters())["layers.3.mixer.experts.up_proj"]
    delta = dict(merge_lora(lm).named_parameters())["layers.3.mixer.experts.up_proj"] - before
    ranks = torch.linalg.matrix_rank(delta.detach(), rtol=1e-4)
    assert ranks.tolist() == [2] * 8
    assert (delta[0] - delta[1]).abs().max() > 0.01


def test_a_tied_head_is_refused(make_lm):
    with pytest.raises(ConfigError, match="lm_head shares its weight"):
        lora(make_lm("M", tie_word_embeddings=True), ["*lm_head"])
    lora(make_lm("M"), ["*lm_head"])


def test_dropout_on_experts_is_refused(make_lm):
    with pytest.raises(ConfigError, match="have no dropout"):
        lora(make_lm("E"), ["*.experts.*"], dropout=0.1)
    with pytest.raises(ConfigError, match="no linear layer and no expert matches"):
        lora(make_lm("E"), ["*.mixer.in_proj"])
