"""The project trains as configured, decays what it should, and reports what it wrote."""

import json

import numpy as np
import pytest
import torch

from bestiary.projects.nemotron_h.module import NEW_TOKENS, PROMPT_TOKENS, NemotronHModule, continuations
from bestiary.shared.core.build import build
from bestiary.shared.core.config import compose, conf_dir, options
from bestiary.shared.core.module import BestiaryModule
from bestiary.shared.core.protocols import Sampling, StepContext
from bestiary.shared.core.recipe import read_stages
from bestiary.shared.core.runs import FinishedRun
from bestiary.shared.core.schedules import Constant
from bestiary.shared.language.byte_tokenizer import ByteTokenizer
from bestiary.shared.language.causal_lm import CausalLM

EOS = ByteTokenizer().eos_id
CTX = StepContext("pretrain", 0)


def model_of(*overrides):
    cfg, _ = compose(["+project=nemotron_h", *overrides])
    torch.manual_seed(0)
    return build(cfg.model, backbone=build(cfg.backbone)), cfg


# ------------------------------------------------------------------ the configuration


def test_the_papers_numbers():
    """15 trillion tokens and a warm-up of 8.3 billion, in windows of 8192, 768 a step."""
    cfg, _ = compose(["+project=nemotron_h", "dataset=tiny_talk"])  # nobody tuned for it
    recipe = cfg.recipe
    tokens = recipe.batch_size * recipe.window
    assert recipe.steps == round(15e12 / tokens)
    assert recipe.warmup == round(8.3e9 / tokens)
    schedule = build(recipe.stages.pretrain.schedule)
    assert recipe.lr * schedule(0, recipe.steps) == pytest.approx(8e-4 / 1319)
    assert recipe.lr * schedule(recipe.steps // 2, recipe.steps) == 8e-4
    assert recipe.lr * schedule(recipe.steps, recipe.steps) == pytest.approx(8e-6)


@pytest.mark.parametrize("dataset", ["stdlib_code", "python_docs", "jargon", "text_mix", "text_folder"])
def test_laptop_sizes(dataset):
    cfg, _ = compose(["+project=nemotron_h", f"dataset={dataset}"])
    stage = read_stages(cfg)["pretrain"]
    assert stage.steps * stage.batch_size * cfg.recipe.window < 5e6
    assert stage.max_len == cfg.recipe.window == cfg.recipe.evaluations.text.protocol.window


def test_the_mix_has_the_papers_phases():
    cfg, _ = compose(["+project=nemotron_h", "dataset=text_mix"])
    stage = read_stages(cfg)["pretrain"]
    assert stage.phases[:2] == [0.6, 0.8]
    assert stage.phases[2] == pytest.approx(1 - 380e9 / 15e12, abs=1e-3)
    assert {entry["part"] for entry in stage.blend.values()} == set(cfg.dataset.corpora)


def test_every_tuned_file_is_of_a_dataset():
    files = (conf_dir() / "tuned" / "nemotron_h" / "pretrain").glob("*.yaml")
    assert {f.stem for f in files} <= set(options("dataset"))


@pytest.mark.parametrize("backbone", ["hybrid_tiny", "hybrid_moe_tiny", "llama_tiny"])
def test_what_has_weight_decay(backbone):
    """Matrices have it; norms, biases, embeddings, and a number a head or channel do not."""
    model, cfg = model_of(f"backbone={backbone}")
    stage = read_stages(cfg)["pretrain"]
    optim = build({**stage.optim, "_partial_": True})
    module = BestiaryModule(model, build(stage.objective), optim, Constant(), no_decay=tuple(stage.no_decay))
    decayed = {id(p) for g in module.configure_optimizers().param_groups if g["weight_decay"] for p in g["params"]}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and "embed" not in name
        assert (id(parameter) in decayed) == matrix, name


@pytest.mark.parametrize("reset", [True, False])
def test_a_packed_window_is_its_documents_apart(reset):
    """On the default backbone: Mamba's state and convolution, attention and positions begin anew with each document."""
    model, cfg = model_of()
    model, objective = model.eval(), build(cfg.recipe.stages.pretrain.objective)
    documents = [list(b"def f(x):"), list(b"y"), list(b"a longer document, cut by the end of the window")]
    tokens = np.array([t for d in documents for t in (EOS, *d)])
    numbers = np.array([i for i, d in enumerate(documents) for _ in (EOS, *d)], np.int32)

    def loss(tokens, numbers=None):
        example = {"id": "x", "tokens": np.array(tokens)} | ({} if numbers is None else {"documents": numbers})
        with torch.no_grad():
            return float(objective.loss(model, model.processor()([example], "train"), CTX).loss_sum)

    apart = [loss([EOS, *d, EOS]) for d in documents[:2]] + [loss([EOS, *documents[2]])]
    packed = loss(tokens, numbers if reset else None)
    assert (abs(packed - sum(apart)) < 1e-4 * packed) == reset


# ------------------------------------------------------------------ the report


class Echo:
    """A model whose continuation names what it was asked."""

    def __init__(self, model):
        self.model, self.asked = model, None

    def __getattr__(self, name):
        return getattr(self.model, name)

    def generate(self, batch, n, sampling):
        self.asked = batch, sampling
        return self.model.generate(batch, n, Sampling(4))


def test_continuations_begin_as_documents_do():
    model = Echo(model_of("backbone=llama_tiny")[0])
    long = "x" * 500
    found = continuations(model, [{"id": "a", "text": "short"}, {"id": "b", "text": long}])
    assert [s["id"] for s in found] == ["from nothing", "a", "b"]
    assert [s["prompt"] for s in found] == ["", "short", long[:PROMPT_TOKENS]]
    batch, sampling = model.asked
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert rows == [[EOS], [EOS, *b"short"], [EOS, *long[:PROMPT_TOKENS].encode()]]
    assert (sampling.max_new_tokens, sampling.temperature > 0) == (NEW_TOKENS, True)


def test_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr("bestiary.projects.nemotron_h.module.NEW_TOKENS", 5)
    (tmp_path / "metrics.csv").write_text("stage,step,loss\npretrain,10,3.5\npretrain,20,2.5\n")

    class Source:
        def held_out(self, split, part=None):
            assert split == "val"
            return [{"id": "doc", "text": "a held-out document"}]

    run = FinishedRun(tmp_path, {"val/bits_per_byte": 2.25}, Source(), split="val")
    model = CausalLM(model_of("backbone=llama_tiny")[0].backbone)
    lines = NemotronHModule.report(model, run)
    assert "val/bits_per_byte  2.2500" in lines
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [s["id"] for s in samples] == ["from nothing", "doc"]
    for sample in samples:
        assert f"{sample['prompt']}|{sample['continuation']}" in lines
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------ the command


@pytest.mark.slow
def test_it_trains_stops_and_goes_on(run_tool, tmp_path):
    """The default project, offline, from an empty data folder."""
    small = ["debug=fast", "backbone=llama_tiny", "recipe.window=32", "dataset.held_out_chars=200"]
    env = {"BESTIARY_DATA": str(tmp_path / "data")}
    done = run_tool("train", "+project=nemotron_h", *small, f"paths.run_dir={tmp_path / 'run'}", env=env)
    assert done.returncode == 0, done.stderr
    assert "tokenising stdlib_code-" in done.stdout
    assert "test/bits_per_byte" in done.stdout
    assert "--- from nothing" in done.stdout
    again = run_tool("train", "+project=nemotron_h", *small, "seed=1", env=env)
    assert again.returncode == 0, again.stderr
    assert "tokenising" not in again.stdout


@pytest.mark.slow
def test_without_a_language_model_the_answer_is_short(run_tool):
    done = run_tool("train", "+project=nemotron_h", "backbone=none")
    assert done.returncode == 2
    assert "backbone=llama_tiny" in done.stderr
    assert len(done.stderr.splitlines()) < 4
