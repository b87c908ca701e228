"""A checkpoint is data: it moves, it is checked, and it says what is wrong with it."""

import json
import shutil

import pytest
import torch
from torch import nn

from bestiary.shared.core.checkpoint import (
    Structure,
    apply_prepare,
    build_model,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_json,
)
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.prepare import freeze, lora, merge_lora, set_trainable
from bestiary.shared.core.specs import DataSpec

BACKBONE = {
    "kind": "lm",
    "_target_": "bestiary.shared.language.hf_causal_lm.HFCausalLM",
    "model_type": "llama",
    "config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    },
}
MODEL = {"_target_": "bestiary.shared.language.causal_lm.CausalLM", "max_new_tokens": 5}
LORA = {"_target_": "bestiary.shared.core.prepare.lora", "targets": ["*_proj"], "r": 4, "alpha": 8}
MERGE = {"_target_": "bestiary.shared.core.prepare.merge_lora"}


def structure(**changes):
    values = {
        "project": "_examples",
        "choices": {},
        "overrides": [],
        "spec": DataSpec(task="chat").to_dict(),
        "parts": {"model": MODEL, "encoder": None, "backbone": BACKBONE},
    }
    return Structure(**{**values, **changes})


def logits(model, length=9):
    ids = torch.arange(length)[None] * 7 % 250
    batch = {
        "ids": ["a"],
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(length)[None],
        "labels": ids,
        "seq_idx": None,
        "media": {},
    }
    with torch.no_grad():
        return model.eval()(batch).logits


def disturb(model):
    """Weights that no initialisation gives."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def adapted():
    """A trained model with adapters, and its structure."""
    made = structure()
    model = disturb(build_model(made))
    model = apply_prepare(model, LORA, made.seed, 0)
    made.prepare.append(LORA)
    return disturb(model), made


def test_the_same_structure_gives_the_same_weights():
    one, two = build_model(structure()), build_model(structure())
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    other = build_model(structure(seed=1))
    assert not torch.equal(logits(one), logits(other))


def test_round_trip_keeps_weights_and_ties(tmp_path):
    model = disturb(build_model(structure()))
    save_checkpoint(tmp_path / "c", model, structure())
    loaded, read = load_checkpoint(tmp_path / "c")
    # JSON has lists where the spec has tuples.
    assert DataSpec.from_dict(read.spec) == DataSpec(task="chat")
    assert {**vars(read), "spec": None} == {**vars(structure()), "spec": None}
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    # Embedding and head are one tensor, before and after.
    lm = loaded.backbone.lm
    assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["structure.json", "weights.safetensors"]


def test_lora_starts_as_no_change_and_is_replayed(tmp_path):
    plain = disturb(build_model(structure()))
    before = logits(plain)
    assert torch.equal(logits(apply_prepare(plain, LORA, 0, 0)), before)
    model, made = adapted()
    assert not torch.allclose(logits(model), before, atol=1e-3)
    save_checkpoint(tmp_path / "c", model, made)
    loaded, read = load_checkpoint(tmp_path / "c")
    assert read.prepare == [LORA]
    assert torch.equal(logits(loaded), logits(model))


def test_lora_again_keeps_the_adapters_and_others_are_refused():
    """As when stages share their ``prepare``, or a run goes on from another's."""
    model, _ = adapted()
    before, names = logits(model), [n for n, _ in model.named_parameters()]
    assert torch.equal(logits(apply_prepare(model, LORA, 0, 1)), before)
    assert [n for n, _ in model.named_parameters()] == names
    for change in ({"r": 2}, {"alpha": 4}):
        with pytest.raises(ConfigError, match=r"other adapters already \(.*_proj: r 4, alpha 8\); put merge_lora"):
            apply_prepare(model, {**LORA, **change}, 0, 1)
    some = apply_prepare(build_model(structure()), {**LORA, "targets": ["*q_proj"]}, 0, 0)
    with pytest.raises(ConfigError, match="other adapters already"):  # it would leave the other layers without any
        apply_prepare(some, LORA, 0, 1)


def test_merged_adapters_keep_the_outputs(tmp_path):
    model, made = adapted()
    before = logits(model)
    names = set(dict(build_model(structure()).named_parameters()))
    merged = apply_prepare(model, MERGE, 0, 1)
    torch.testing.assert_close(logits(merged), before, rtol=1e-5, atol=1e-5)
    assert set(dict(merged.named_parameters())) == names
    made.prepare.append(MERGE)
    save_checkpoint(tmp_path / "c", merged, made)
    assert torch.equal(logits(load_checkpoint(tmp_path / "c")[0]), logits(merged))
    with pytest.raises(ConfigError, match="no adapters"):
        merge_lora(merged)


def test_lora_by_hand():
    """W x + alpha / r * B A x."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    weight, bias = model[1].weight.detach().clone(), model[1].bias.detach().clone()
    first = model[0]
    lora(model, ["1"], r=2, alpha=6)
    parts = dict(model[1].named_parameters())
    a, b = (next(p for n, p in parts.items() if f"lora_{x}" in n) for x in "AB")
    nn.init.normal_(b)
    x = torch.randn(5, 6)
    y = first(x)
    torch.testing.assert_close(model(x), y @ weight.T + bias + 3.0 * y @ a.T @ b.T)
    assert model[0] is first


def test_prepare_says_what_does_not_match():
    with pytest.raises(ConfigError, match=r"no linear layer and no expert matches \['\*q'\].*\['0'\]"):
        lora(nn.Sequential(nn.Linear(1, 1)), ["*q"])
    with pytest.raises(ConfigError, match="no parameter matches"):
        freeze(nn.Linear(1, 1), ["x*"])
    with pytest.raises(ConfigError, match=r"nothing matches \['x'\].*weight"):
        set_trainable(nn.Linear(1, 1), ["x"])


def test_trainable_globs():
    def chosen(*globs):
        model = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
        set_trainable(model, globs)
        return [n for n, p in model.named_parameters() if p.requires_grad]

    assert chosen("*") == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert chosen("a.*") == ["a.weight", "a.bias"]
    assert chosen("*", "!*.bias") == ["a.weight", "b.weight"]
    assert chosen("*", "!*.bias", "b.bias") == ["a.weight", "b.weight", "b.bias"]
    model = freeze(nn.Linear(1, 1), ["bias"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["weight"]
    model.register_parameter("codes", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    assert [p.dtype for p in set_trainable(model, ["*"])] == [torch.float32] * 2


@pytest.fixture
def saved(tmp_path):
    model = disturb(build_model(structure()))
    save_checkpoint(tmp_path / "c", model, structure())
    return tmp_path / "c"


def edit(folder, change):
    file = folder / "structure.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(saved, keep):
    file = saved / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadDataError, match=r"weights.safetensors"):
        load_checkpoint(saved)


def test_weights_of_another_shape(saved):
    edit(saved, lambda v: v["parts"]["backbone"]["config"].update(intermediate_size=64))
    with pytest.raises(BadDataError, match=r"weights.safetensors does not fit"):
        load_checkpoint(saved)


def test_weights_of_another_depth(saved):
    for depth in (1, 3):
        edit(saved, lambda v, depth=depth: v["parts"]["backbone"]["config"].update(num_hidden_layers=depth))
        with pytest.raises(BadDataError, match=r"weights.safetensors does not fit"):
            load_checkpoint(saved)


@pytest.mark.parametrize("where", ["model", "backbone", "prepare", "nested"])
def test_a_structure_with_a_forbidden_target(saved, tmp_path, where):
    bad = {"_target_": "os.system", "command": f"touch {tmp_path}/called"}

    def change(values):
        if where == "prepare":
            values["prepare"] = [bad]
        elif where == "nested":
            values["parts"]["model"]["max_new_tokens"] = bad
        else:
            values["parts"][where] = bad

    edit(saved, change)
    with pytest.raises(ConfigError, match=r"os.system"):
        load_checkpoint(saved)
    assert not (tmp_path / "called").exists()


def test_a_structure_with_an_unknown_argument(saved):
    edit(saved, lambda v: v["parts"]["model"].update(max_new_token=3))
    with pytest.raises(ConfigError, match="did you mean 'max_new_tokens'"):
        load_checkpoint(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1, "prject": "x"}'])
def test_a_structure_that_is_none(saved, text):
    (saved / "structure.json").write_text(text)
    with pytest.raises(BadDataError, match=r"structure.json"):
        load_checkpoint(saved)


def test_weights_are_never_unpickled(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path}/called",)

    torch.save(Evil(), saved / "weights.safetensors")
    with pytest.raises(BadDataError):
        load_checkpoint(saved)
    assert not (tmp_path / "called").exists()


def run_folder(tmp_path, done=("text",)):
    run = tmp_path / "run"
    for name in ("text", "chat"):
        save_checkpoint(run / "stages" / name, nn.Linear(1, 1), structure())
        if name in done:
            write_json(run / "stages" / name / "DONE", {})
    write_json(run / "run.json", {"stages": ["text", "chat"]})
    return run


def test_a_run_folder_means_its_last_finished_stage(tmp_path):
    run = run_folder(tmp_path)
    assert find_checkpoint(run) == run / "stages" / "text"
    assert find_checkpoint(str(run / "stages" / "chat")) == run / "stages" / "chat"
    assert find_checkpoint(run / "stages" / "chat" / "weights.safetensors") == run / "stages" / "chat"
    write_json(run / "stages" / "chat" / "DONE", {})
    assert find_checkpoint(run) == run / "stages" / "chat"


def test_what_is_said_when_there_is_none(tmp_path):
    run = run_folder(tmp_path, done=())
    with pytest.raises(BadDataError, match=r"no stage of this run is finished yet \(text, chat\)"):
        find_checkpoint(run)
    with pytest.raises(BadDataError, match=r"no checkpoint there.*did you mean 'run'"):
        find_checkpoint(tmp_path / "rum")
    with pytest.raises(BadDataError, match="no checkpoint there"):
        find_checkpoint(tmp_path)
    (run / "stages" / "text" / "weights.safetensors").unlink()
    with pytest.raises(BadDataError, match="no checkpoint there"):
        find_checkpoint(run / "stages" / "text")


def test_a_moved_folder_loads(saved, tmp_path, monkeypatch):
    expected = logits(load_checkpoint(saved)[0])
    (tmp_path / "other place").mkdir()
    shutil.move(saved, tmp_path / "other place" / "renamed")
    monkeypatch.chdir(tmp_path / "other place")
    assert torch.equal(logits(load_checkpoint("renamed")[0]), expected)


def test_a_part_overridden_to_none_is_no_part():
    # A tuned number may remain in a group whose option is none.
    made = structure(parts={"model": MODEL, "encoder": {"features": [1]}, "backbone": BACKBONE})
    assert build_model(made)
    with pytest.raises(ConfigError, match="backbone"):
        build_model(structure(parts={"model": MODEL, "encoder": None, "backbone": None}))


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
