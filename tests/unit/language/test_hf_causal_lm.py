"""transformers' decoders behind the protocol: caches, padding, packing, checkpoints, against plain forward passes."""

import json
import shutil

import pytest
import torch

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.protocols import Cache, LanguageBackbone, Tokenizer
from bestiary.shared.language.hf_causal_lm import HFCausalLM
from bestiary.shared.testing.tiny_checkpoint import TINY, write_tiny_checkpoint

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def lm(request):
    torch.manual_seed(0)
    return HFCausalLM(request.param, TINY).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def ids_of(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def plain(lm, ids):
    """Logits (T, V) of one row by itself."""
    with torch.no_grad():
        return lm(lm.embed(ids[None]))[0][0]


def run(lm, ids, mask=None, position=None, cache=None):
    with torch.no_grad():
        return lm(lm.embed(ids), mask, position, None, cache)[0]


# ------------------------------------------------------------------ padding, caches


def test_left_padding_and_a_batch_of_many(lm):
    lengths = (9, 4, 1)
    rows = [ids_of(n, seed=n) for n in lengths]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, 9 - len(row) :], mask[at, 9 - len(row) :] = row, 1
    logits = run(lm, ids, mask)
    for at, row in enumerate(rows):
        torch.testing.assert_close(logits[at, 9 - len(row) :], plain(lm, row), **CLOSE)


def test_right_padding_then_decoding(lm):
    """The mask then has holes between a row's prompt and what it says."""
    lengths, extra = (6, 3), ids_of(2, 4, seed=8)
    rows = [ids_of(n, seed=n) for n in lengths]
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, : len(row)], mask[at, : len(row)] = row, 1
    cache = lm.new_cache(2)
    run(lm, ids, mask, None, cache)
    for step in range(4):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        logits = run(lm, extra[:, step : step + 1], mask, None, cache)
        for at, row in enumerate(rows):
            whole = plain(lm, torch.cat([row, extra[at, : step + 1]]))
            torch.testing.assert_close(logits[at, 0], whole[-1], **CLOSE)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_prefill_in_chunks(lm, chunk):
    """Chunks in which a row is padding alone, too."""
    ids, mask = ids_of(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, :7] = 0
    cache, parts = lm.new_cache(2), []
    for start in range(0, 10, chunk):
        parts.append(run(lm, ids[:, start : start + chunk], mask[:, : start + chunk], None, cache))
    logits = torch.cat(parts, 1)
    assert cache.length == 10
    torch.testing.assert_close(logits[0], plain(lm, ids[0]), **CLOSE)
    torch.testing.assert_close(logits[1, 7:], plain(lm, ids[1, 7:]), **CLOSE)
    assert torch.isfinite(logits).all()


def test_packed_rows(lm):
    parts = [ids_of(n, seed=n) for n in (5, 1, 8)]
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 1, 8]))[None].int()
    position = torch.cat([torch.arange(len(p)) for p in parts])[None]
    with torch.no_grad():
        logits = lm(lm.embed(torch.cat(parts)[None]), None, position, seq_idx)[0][0]
    for got, part in zip(logits.split([5, 1, 8]), parts, strict=True):
        torch.testing.assert_close(got, plain(lm, part), **CLOSE)


def test_the_cache_keeps_its_promises(lm, tmp_path):
    ids = ids_of(3, 12)
    cache = lm.new_cache(3)
    assert isinstance(cache, Cache)
    assert cache.length == 0
    run(lm, ids[:, :8], None, None, cache)
    assert cache.length == 8

    def continues(with_cache, rows, start=8):
        """The rest of these rows comes out as without a cache."""
        mask = torch.ones(len(rows), 12, dtype=torch.long)
        logits = run(lm, ids[rows][:, start:], mask, None, with_cache)
        for at, row in enumerate(rows):
            torch.testing.assert_close(logits[at], plain(lm, ids[row])[start:], **CLOSE)

    cache.save(tmp_path / "cache.safetensors")
    copy = cache.clone()
    continues(copy, [0, 1, 2])
    assert (copy.length, cache.length) == (12, 8)

    chosen = cache.clone()
    chosen.select(torch.tensor([2, 0, 2, 2]))
    continues(chosen, [2, 0, 2, 2])

    copy.truncate(5)
    assert copy.length == 5
    continues(copy, [0, 1, 2], start=5)
    with pytest.raises(ValueError, match="cannot be cut to 13"):
        copy.truncate(13)
    copy.truncate(0)
    continues(copy, [0, 1, 2], start=0)

    again = lm.load_cache(tmp_path / "cache.safetensors")
    assert again.length == 8
    continues(again, [0, 1, 2])
    continues(cache, [0, 1, 2])  # nothing of the above has touched it
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


def test_caches_that_are_none(lm, tmp_path):
    file = tmp_path / "c.safetensors"
    file.write_bytes(b"no")
    with pytest.raises(BadDataError, match=r"c\.safetensors is no cache"):
        lm.load_cache(file)
    other = HFCausalLM("llama", {**TINY, "num_hidden_layers": 1})
    cache = other.new_cache(1)
    run(other, ids_of(1, 2), None, None, cache)
    cache.save(file)
    with pytest.raises(BadDataError, match="another model: it has 1 layers, not 2"):
        lm.load_cache(file)
    lm.new_cache(1).save(file)
    assert lm.load_cache(file).length == 0


# ------------------------------------------------------------------ checkpoints


def test_a_checkpoint_is_that_of_transformers(folder):
    from transformers import AutoModelForCausalLM

    lm = HFCausalLM(path=str(folder))
    assert isinstance(lm, LanguageBackbone)
    assert isinstance(lm.tokenizer, Tokenizer)
    peer = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    ids = ids_of(2, 9)
    with torch.no_grad():
        assert torch.equal(lm(lm.embed(ids))[0], peer(ids).logits)
    assert next(HFCausalLM(path=str(folder), dtype="bfloat16").parameters()).dtype == torch.bfloat16
    assert next(HFCausalLM(path=str(folder), dtype="auto").parameters()).dtype == torch.float32


def test_the_checkpoints_config_wins_except_for_overrides(folder):
    lm = HFCausalLM(
        "llama", {"hidden_size": 4096}, path=str(folder), overrides={"rope_parameters": {"rope_theta": 5e5}}
    )
    assert lm.hidden_size == 32
    assert lm.lm.config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    base = HFCausalLM(path=str(folder))
    ids = ids_of(1, 9)
    assert not torch.allclose(run(lm, ids), run(base, ids))  # the angles did change
    with pytest.raises(ConfigError, match=r"overrides\.rope_tetha"):
        HFCausalLM(path=str(folder), overrides={"rope_tetha": 1})


def test_a_chat_template_of_ours(folder):
    from bestiary.shared.core.examples import text_message

    lm = HFCausalLM(path=str(folder), chat_template="nemotron_h")
    prompt = lm.tokenizer.chat([text_message("user", "a")], True)[0]
    assert lm.tokenizer.decode(prompt).endswith("<SPECIAL_11>Assistant\n<think>\n")


def test_an_old_config_with_its_theta_at_the_top(copy):
    values = json.loads((copy / "config.json").read_text())
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    (copy / "config.json").write_text(json.dumps(values))
    lm = HFCausalLM(path=str(copy), overrides={"rope_parameters": {"rope_theta": 1e6}})
    assert lm.lm.config.rope_parameters["rope_theta"] == 1e6


def test_on_the_meta_device_no_weight_is_read(copy):
    (copy / "model.safetensors").unlink()
    with torch.device("meta"):
        lm = HFCausalLM(path=str(copy))
    assert all(p.is_meta for p in lm.parameters())
    assert lm.tokenizer.encode("hello")
    with pytest.raises(BadDataError, match="weights cannot be read"):
        HFCausalLM(path=str(copy))


def test_an_embedding_larger_than_the_tokenizer():
    lm = HFCausalLM("qwen2", {**TINY, "vocab_size": 512})
    assert lm.embed(torch.tensor([[511]])).shape == (1, 1, 32)
    assert lm.add_tokens(["<image>"]) == [262]
    assert lm(lm.embed(torch.tensor([[262]])))[0].shape == (1, 1, 512)  # there was room


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda f: shutil.rmtree(f), BadDataError, "there is no folder"),
        (lambda f: (f / "config.json").unlink(), BadDataError, r"no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), BadDataError, r"config\.json cannot be used"),
        (lambda f: (f / "config.json").write_text('{"model_type": "nemotron-nas"}'), ConfigError, "nemotron-nas model"),
        (lambda f: (f / "config.json").write_text("{}"), ConfigError, "nameless model"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), BadDataError, "weights cannot be read"),
        (lambda f: (f / "tokenizer.json").write_text("{"), BadDataError, "no tokenizer that transformers can read"),
        (lambda f: (f / "structure.json").write_text("{}"), BadDataError, "is a checkpoint of bestiary"),
    ],
)
def test_folders_that_are_no_checkpoint(copy, damage, error, words):
    damage(copy)
    with pytest.raises(error, match=words) as caught:
        HFCausalLM(path=str(copy))
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing(copy):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadDataError, match=r"lacks weights: model\.layers\.1\.mlp\.up_proj\.weight"):
        HFCausalLM(path=str(copy))


def test_what_does_not_fit(folder):
    with pytest.raises(ConfigError, match="holds a llama model, and this backbone is of type qwen2"):
        HFCausalLM("qwen2", path=str(folder))
    with pytest.raises(ConfigError, match=r"needs a checkpoint: backbone\.path="):
        HFCausalLM()
    with pytest.raises(ConfigError, match="dtype 'fp32' is not known"):
        HFCausalLM("llama", TINY, dtype="fp32")


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("mistral", {"sliding_window": 4}),
        ("nemotron_h", {"hybrid_override_pattern": "M*", "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2}),
    ],
)
def test_packing_is_refused_where_it_would_leak(model_type, config):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    lm = HFCausalLM(model_type, {**sizes, "num_key_value_heads": 2, "head_dim": 8, **config})
    with pytest.raises(ConfigError, match="packed rows need full attention in every layer"):
        lm(lm.embed(torch.zeros(1, 4, dtype=torch.long)), seq_idx=torch.tensor([[0, 0, 1, 1]]))
