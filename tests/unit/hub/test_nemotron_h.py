"""nemotron_h checkpoints in and out, with transformers on the other side."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bestiary.shared.core.errors import BadDataError, MissingDataError
from bestiary.shared.core.prepare import lora
from bestiary.shared.hub.load import load_pretrained
from bestiary.shared.hub.nemotron_h import disk_names, our_name, save_pretrained, tensors_of
from bestiary.shared.hub.nemotron_h_config import read_config
from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.hybrid.model import HybridLM

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 262,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 40,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
CASES = {
    "all kinds": {"hybrid_override_pattern": "M-M*-ME"},
    "latent experts": {"hybrid_override_pattern": "ME*E", "moe_latent_size": 16, "routed_scaling_factor": 5.0},
    "transformers' test config": {
        "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
        "n_groups": 8,
        "norm_topk_prob": True,
    },
    "grouped routing": {"hybrid_override_pattern": "ME", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "without attention": {"hybrid_override_pattern": "M-M-"},
}


def theirs(case):
    torch.manual_seed(0)
    model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**{**SMALL, **CASES[case]})).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("dt_bias", "e_score_correction_bias", "norm.weight")):
                tensor.add_(torch.randn_like(tensor))
            elif tensor.ndim >= 2:
                tensor.mul_(4)  # far from uniform
    return model


@pytest.fixture(scope="module", params=CASES)
def exchanged(request, tmp_path_factory):
    """transformers' model, its folder, ours from it, and the folder that ours wrote."""
    folder, back = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("ours")
    model = theirs(request.param)
    model.save_pretrained(folder)
    ours = load_pretrained(
        folder, tokenizer="byte", config={"pattern": None, "hidden_size": 1, "transformers_clamp": True}
    )
    save_pretrained(ours, back)
    return model, folder, ours.eval(), back


def test_every_tensor_is_equal_after_both_ways(exchanged):
    model, folder, _, back = exchanged
    there, here = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert set(here) == set(there)
    assert any(".experts.7." in key for key in there) == ("E" in read_config(folder)[0].layers)
    for key, tensor in there.items():
        assert here[key].dtype == tensor.dtype
        assert torch.equal(here[key], tensor), key
    again = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert type(again).__name__ == "NemotronHForCausalLM"
    for (name, one), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_logits_are_equal(exchanged):
    model, _, ours, back = exchanged
    ids = torch.randint(0, 262, (2, 150), generator=torch.Generator().manual_seed(1))
    again = transformers.AutoModelForCausalLM.from_pretrained(back).eval()
    with torch.no_grad():
        options = {"use_cache": False}  # transformers cannot cache for a pattern without attention
        expected = model(ids, **options).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(ours.embed(ids))[0], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(ids, **options).logits, expected, rtol=0, atol=0)


def test_steps_are_those_of_transformers_clamp_and_all(exchanged):
    """With the switch on, prefill bounds step sizes from below and single steps do not, as in transformers."""
    model, _, ours, _ = exchanged
    if "*" not in ours.config.layers:
        pytest.skip("transformers cannot cache for a pattern without attention")
    with torch.no_grad():
        for layer in [*ours.layers, *model.model.layers]:
            if hasattr(layer.mixer, "dt_bias"):
                layer.mixer.dt_bias.fill_(-9.0)
        ids = torch.randint(0, 262, (2, 20), generator=torch.Generator().manual_seed(2))
        cache, out = ours.new_cache(2), model(ids[:, :12], use_cache=True)
        got, expected = [ours(ours.embed(ids[:, :12]), cache=cache)[0]], [out.logits]
        name = "cache" if hasattr(out, "cache") else "past_key_values"
        for t in range(12, 20):
            got.append(ours(ours.embed(ids[:, t : t + 1]), cache=cache)[0])
            out = model(ids[:, t : t + 1], use_cache=True, **{name: getattr(out, name)})
            expected.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(expected, 1), rtol=1e-5, atol=1e-5)


def test_prefix_and_stacked_experts_of_memory(exchanged, tmp_path):
    """What transformers has in memory (model., experts stacked) is read too, and gives the same."""
    model, folder, ours, _ = exchanged
    shutil.copy(folder / "config.json", tmp_path)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    again = load_pretrained(tmp_path, tokenizer="byte")
    for name, tensor in tensors_of(again).items():
        assert torch.equal(tensor, tensors_of(ours)[name]), name


# ------------------------------------------------------------------ MTP, shards, files

MTP = HybridConfig(
    pattern="M*E",
    vocab_size=262,
    hidden_size=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    n_groups=2,
    ssm_state_size=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    moe_shared_expert_intermediate_size=8,
    num_nextn_predict_layers=2,
    mtp_depths=3,
)


def fresh(config=MTP, seed=0):
    torch.manual_seed(seed)
    return HybridLM(config)


def test_mtp_weights_are_kept(tmp_path):
    model = fresh()
    save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    # two modules of two layers: 0 and 2 are attention, 1 and 3 experts
    for key in (
        "mtp.layers.0.eh_proj.weight",
        "mtp.layers.0.enorm.weight",
        "mtp.layers.0.hnorm.weight",
        "mtp.layers.0.norm.weight",
        "mtp.layers.2.mixer.q_proj.weight",
        "mtp.layers.1.final_layernorm.weight",
        "mtp.layers.3.final_layernorm.weight",
        "mtp.layers.3.mixer.experts.3.down_proj.weight",
        "mtp.layers.1.mixer.gate.e_score_correction_bias",
    ):
        assert key in stored
    again = load_pretrained(tmp_path)
    assert again.config.num_nextn_predict_layers == 2
    assert again.config.mtp_depths is None  # no config.json has it
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensor, tensors_of(again)[name]), name
    # transformers has no MTP and reads the rest
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(other.state_dict()["model.layers.0.mixer.A_log"], model.layers[0].mixer.A_log)


def test_names_go_both_ways():
    model = fresh()
    for name in tensors_of(model):
        for expert, key in enumerate(disk_names(name, model.config)):
            stacked = ".experts." in name
            assert our_name(key, model.config) == (name, expert if stacked else None)
            assert our_name(key.replace("backbone.", "model."), model.config)[0] == name


@pytest.mark.parametrize("shard_bytes", [1, 2000, 10**9])
def test_shards(tmp_path, shard_bytes):
    model = fresh()
    files = save_pretrained(model, tmp_path, shard_bytes=shard_bytes)
    weights = [f for f in files if f.suffix == ".safetensors"]
    assert (len(weights) == 1) == (shard_bytes == 10**9)
    again = load_pretrained(tmp_path)
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensor, tensors_of(again)[name]), name
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(other.state_dict()["lm_head.weight"], model.lm_head.weight)


def test_loading_needs_a_shard_of_memory_above_the_model(tmp_path):
    """Measured on the resident memory of this process, mapped files included."""
    from bestiary.shared.hub.nemotron_h import load_weights
    from bestiary.shared.testing.bench import peak_bytes

    config = HybridConfig(pattern="-" * 24, vocab_size=262, hidden_size=512, intermediate_size=1024)
    model = fresh(config)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert size > 90e6
    shard = 10 * 2**20
    save_pretrained(model, tmp_path, shard_bytes=shard)
    load_weights(model, tmp_path)
    grown = peak_bytes(lambda: load_weights(model, tmp_path))
    assert grown < 1.5 * shard


def test_saved_in_half_precision(tmp_path):
    model = fresh()
    save_pretrained(model, tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for k, t in stored.items() if "gate." in k} == {torch.float32}
    assert {t.dtype for k, t in stored.items() if "gate." not in k} == {torch.bfloat16}
    again = load_pretrained(tmp_path)
    torch.testing.assert_close(again.lm_head.weight, model.lm_head.weight, rtol=0.01, atol=0.001)


def test_tied_embeddings(tmp_path):
    import dataclasses

    model = fresh(dataclasses.replace(MTP, tie_word_embeddings=True, num_nextn_predict_layers=0))
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    # transformers ties nothing here: without the head in the file it would make one up
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(other.lm_head.weight, model.embeddings.weight)
    assert again.lm_head.weight is again.embeddings.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("backbone.layers.2.mixer.experts.1.up_proj.weight"),
            r"lacks layers\.2\.mixer\.experts\.up_proj",
        ),
        (
            lambda t: t.update({"backbone.layers.9.norm.weight": torch.ones(1)}),
            r"does not ask for: backbone\.layers\.9",
        ),
        (lambda t: t.update({"lm_head.weight": torch.ones(3, 16)}), r"lm_head\.weight is \(3, 16\).*\(262, 16\)"),
        (lambda t: t.update({"backbone.layers.2.mixer.experts.7.up_proj.weight": torch.ones(8, 16)}), r"experts\.7\."),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, words):
    save_pretrained(fresh(), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    change(stored)
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(BadDataError, match=words):
        load_pretrained(tmp_path)


def test_saving_again_replaces_all_of_the_old(tmp_path):
    model = fresh()
    save_pretrained(model, tmp_path, shard_bytes=2000)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    save_pretrained(model, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)


def test_added_tokens_come_back(tmp_path):
    model = fresh()
    assert model.add_tokens(["<a>", "<b>"]) == [262, 263]
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.tokenizer.vocab_size == 264
    assert again.add_tokens(["<c>", "<b>"]) == [264, 263]


def test_without_a_shared_expert_it_is_refused(tmp_path):
    import dataclasses

    model = fresh(
        dataclasses.replace(MTP, moe_shared_expert_intermediate_size=0, num_nextn_predict_layers=0, mtp_depths=None)
    )
    with pytest.raises(BadDataError, match="shared expert"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_mtp_that_transformers_dropped(tmp_path):
    save_pretrained(fresh(), tmp_path / "a")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    with pytest.raises(BadDataError, match="set num_nextn_predict_layers to 0"):
        load_pretrained(tmp_path / "b", tokenizer="byte")


def test_folders_that_are_none(tmp_path):
    with pytest.raises(MissingDataError, match=r"no config\.json"):
        load_pretrained(tmp_path)
    save_pretrained(fresh(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(BadDataError, match="cannot be read"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingDataError, match="not whole"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[")
    with pytest.raises(BadDataError, match="no index of weights"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BadDataError, match="'llama', not nemotron_h"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(BadDataError, match="not a JSON object"):
        read_config(tmp_path)


def test_adapters_must_be_merged_first(tmp_path):
    model = lora(fresh(), ["*.mixer.in_proj"], r=2)
    with pytest.raises(BadDataError, match="merge_lora"):
        save_pretrained(model, tmp_path)


def test_what_config_json_says_besides_is_kept(tmp_path):
    save_pretrained(fresh(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["bestiary_tokenizer"] == "byte"
    raw |= {"eos_token_id": [2, 12], "max_position_embeddings": 131072, "rope_theta": 10000}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_pretrained(load_pretrained(tmp_path), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == raw
