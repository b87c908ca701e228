"""A trained hybrid, with adapters, leaves as a folder that transformers loads, and comes back."""

import pytest
import torch

TRAIN = [
    "+project=_examples",
    "backbone=hybrid_tiny",
    "debug=fast",
    "recipe.stages.chat.prepare.0.targets=['*.in_proj','*_proj']",
]


def test_export_then_load(tool, tmp_path):
    trained = tmp_path / "run"
    done = tool("train", *TRAIN, f"paths.run_dir={trained}")
    assert done.returncode == 0, done.stdout + done.stderr
    transformers = pytest.importorskip("transformers")
    from bestiary.shared.core.checkpoint import find_checkpoint, load_checkpoint
    from bestiary.shared.core.prepare import merge_lora

    out = tmp_path / "exported"
    done = tool("export_model", f"checkpoint={trained}", f"out={out}", "shard_gb=0.001")
    assert done.returncode == 0, done.stderr
    assert "merged into the weights" in done.stdout
    assert "byte: transformers has no files for it" in done.stdout
    assert len(list(out.glob("model-*.safetensors"))) > 1

    model, _ = load_checkpoint(find_checkpoint(trained))
    merge_lora(model)
    ids = torch.randint(0, 256, (1, 40))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    for layer in theirs.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, float("inf"))  # transformers bounds step sizes from below
    with torch.no_grad():
        lm = model.eval().backbone
        torch.testing.assert_close(theirs(ids).logits, lm(lm.embed(ids))[0], rtol=1e-4, atol=1e-4)

    job = tool("chat", f"checkpoint={out}", "prompt=say apple", "max_new_tokens=4", "temperature=0")
    assert job.returncode == 0, job.stderr

    again = tool("export_model", f"checkpoint={trained}", f"out={out}")
    assert again.returncode == 2
    assert "holds a checkpoint already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["out=x"], "checkpoint= is missing"),
        (["checkpoint=/nowhere", "out=x"], "no checkpoint there"),
        (["checkpoint=/nowhere", "out=x", "dtype=int4"], "dtype must be one of float32, bfloat16, float16"),
        (["checkpoint=/nowhere", "out=x", "shard_gb=big"], "shard_gb must be a number"),
        (["checkpoint=/nowhere", "out=x", "dtyp=float16"], "did you mean 'dtype'"),
    ],
)
def test_bad_input_gets_one_line(tool, arguments, words):
    done = tool("export_model", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
