"""tools/train.py: short answers, what a run leaves behind, and what is refused before anything is made."""

import csv
import json
import os
import stat

import pytest
import yaml

# ------------------------------------------------------------------ short answers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["which project?", "projects: asm_unet", "_examples"]),
        (["seed=1"], ["which project?"]),
        pytest.param(["-m", "seed=0,1"], ["which project?"], marks=pytest.mark.slow),
        (["+project=_exampels"], ["no project '_exampels'", "did you mean '_examples'", "project: "]),
        (["project=asm-unet"], ["no project 'asm-unet'", "did you mean 'asm_unet'"]),
        pytest.param(
            ["+experiment=asm_unet/paper_synaps"], ["did you mean 'asm_unet/paper_synapse'"], marks=pytest.mark.slow
        ),
        (["+project=_examples", "dataset=tiny_tlak"], ["no dataset 'tiny_tlak'", "did you mean 'tiny_talk'"]),
        pytest.param(
            ["+project=_examples", "backbone=llama_tiny2"], ["did you mean 'llama_tiny'"], marks=pytest.mark.slow
        ),
        (["+project=_examples", "datset=tiny_talk"], ["no key 'datset'", "did you mean 'dataset'"]),
        pytest.param(["+project=_examples", "sed=1"], ["no key 'sed'", "did you mean 'seed'"], marks=pytest.mark.slow),
        (["+project=_examples", "recipe.step=3"], ["no key 'recipe.step'", "did you mean 'steps'"]),
        pytest.param(
            ["+project=_examples", "recipe.stages.text.lr=3"],
            ["no key 'recipe.stages.text.lr'"],
            marks=pytest.mark.slow,
        ),
        (["+project=_examples", "+experiment=asm_unet/paper_synapse"], ["an experiment brings its project with it"]),
        pytest.param(
            ["+experiment=asm_unet/paper_synapse", "project=_examples"],
            ["an experiment brings its project with it"],
            marks=pytest.mark.slow,
        ),
        (["+project=_examples", "dataset={windw: 3}"], ["no key 'dataset.windw'", "did you mean 'window'"]),
        pytest.param(["+project=_examples", "dataset.windw=3"], ["did you mean 'window'"], marks=pytest.mark.slow),
        pytest.param(
            ["+project=_examples", "+dataset.windw=3"],
            ["dataset: TinyTalk has no argument 'windw'", "'window'"],
            marks=pytest.mark.slow,
        ),
        (["+project=_examples", "recipe.run=[txt]"], ["recipe.run names 'txt'", "did you mean 'text'"]),
        pytest.param(
            ["+project=_examples", "recipe.stages.text.evaluate=[txt]"],
            ["names 'txt'", "did you mean 'text'"],
            marks=pytest.mark.slow,
        ),
        (["+project=_examples", "+recipe.stages.text.step=3"], ["no key 'step'", "did you mean 'steps'"]),
        pytest.param(["+project=_examples", "recipe.steps=0"], ["at least 1"], marks=pytest.mark.slow),
        (["+project=_examples", "+trainer.gradient_clip_val=1"], ["gradient_clip_val is not used here"]),
        pytest.param(
            ["+project=_examples", "+trainer.accumulate_grad_batches=2"], ["not used here"], marks=pytest.mark.slow
        ),
        (["+project=_examples", "dataset._target_=os.system"], ["os.system", "not allowed"]),
        pytest.param(
            ["+project=_examples", "project.module=torch.nn.Linear"], ["not a BestiaryModule"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["+project=_examples", "~recipe.evaluations", "recipe.run=[text]", "recipe.stages.text.evaluate=[]"],
            ["recipe.evaluations is empty"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["+project=_examples", "recipe=grpo", "dataset=carry_addition", "trainer=fsdp", "trainer.accelerator=cpu"],
            ["stage grpo", "trainer=ddp", "recipe.run=[sft] now"],
            marks=pytest.mark.slow,
        ),
        (["+project=_examples", "trainer.precision=16-mixed"], ["bf16-mixed"]),
        (["+project=_examples", "backbone=none"], ["backbone"]),
        (["+project=_examples", "init_from=/nowhere/run"], ["/nowhere/run", "no checkpoint there"]),
        pytest.param(["+project=_examples", "resume=/nowhere/run"], ["no run in that folder"], marks=pytest.mark.slow),
        (["+project=_examples", "recipe.batch_size"], ["recipe.batch_size"]),
        (["+project=asm_unet", "dataset=nnunet_folder"], ["dataset.root"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_short_answers(tool, short, tmp_path, arguments, words):
    short(tool("train", *arguments, runs=tmp_path / "runs"), *words)


@pytest.mark.parametrize("arguments", [["dataset=tiny_tlak"], ["dataset._target_=os.system"], ["init_from=/nowhere"]])
def test_a_refused_run_leaves_nothing(tool, short, tmp_path, arguments):
    short(tool("train", "+project=_examples", *arguments, runs=tmp_path / "runs", cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_missing_data_says_what_to_request_and_where_to_put_it(tool, short, tmp_path):
    job = tool("train", "+project=asm_unet", "dataset=synapse", env={"BESTIARY_DATA": str(tmp_path)})
    text = short(job, "synapse.org", f"{tmp_path}/data/synapse/imagesTr/img0001_0000.nii.gz", "labelsTr", lines=6)
    assert "{root}" not in text


@pytest.mark.slow
def test_the_same_answer_from_a_real_process(run_tool):
    done = run_tool("train", "+project=_exampels")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) <= 3
    assert done.stdout == ""


def test_what_cannot_fit_is_refused_with_figures(tool, short, tmp_path):
    huge = ["backbone.config.hidden_size=65536", "backbone.config.intermediate_size=262144"]
    huge += ["backbone.config.num_hidden_layers=96", "backbone.config.num_attention_heads=512"]
    job = tool("train", "+project=_examples", *huge, runs=tmp_path / "runs")
    text = short(job, "this cannot fit", "M parameters", "GiB")
    # 96 layers of 3 x 65536 x 262144 and the attention: 2 heads of keys and values, 128 wide.
    layer = 3 * 65536 * 262144 + 2 * 65536 * 65536 + 2 * 65536 * 2 * 128 + 2 * 65536
    millions = (96 * layer + 262 * 65536 + 65536) / 1e6
    assert f"{millions:,.1f} M parameters" in text
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------ printing the config


@pytest.mark.parametrize(
    "arguments",
    [
        ["+project=_examples", "seed=7", "--cfg", "job"],
        ["+project=_examples", "--cfg", "job", "seed=7"],
        ["project=_examples", "seed=7", "-c", "job", "--resolve"],
    ],
)
def test_cfg_prints_yaml(tool, arguments):
    job = tool("train", *arguments)
    assert job.returncode == 0, job.stderr
    printed = yaml.safe_load(job.stdout)
    assert printed["seed"] == 7
    assert printed["project"]["name"] == "_examples"
    assert printed["recipe"]["steps"] == 400


def test_multirun_in_the_middle_of_the_line(tool, tiny, tmp_path):
    arguments = [*tiny[:2], "-m", *tiny[2:], "debug=fast", "recipe.run=[text]", "seed=0,1"]
    job = tool("train", *arguments, runs=tmp_path / "runs", cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    results = [json.loads(p.read_text()) for p in (tmp_path / "runs" / "_examples").glob("*/result.json")]
    assert sorted(r["seed"] for r in results) == [0, 1]
    assert len({r["metrics"]["test/bits_per_byte"] for r in results}) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


# ------------------------------------------------------------------ what a run leaves behind


def test_result(whole, tiny, root):
    result = json.loads((whole / "result.json").read_text())
    assert result["run_dir"] == str(whole)
    assert result["project"] == "_examples"
    assert result["scope"] == "full"
    assert result["overrides"] == [*tiny, f"paths.run_dir={whole}"]
    assert set(result["metrics"]) == {"test/bits_per_byte", "test/bytes", "test/exact_match", "test/prompts"}
    assert result["metrics"]["test/prompts"] == 2
    assert 0 < result["metrics"]["test/bits_per_byte"] < 9
    assert result["data_revision"].startswith("pydoc-")
    assert result["wall_s"] > 0
    assert result["peak_gb"] > 0
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert (config["recipe"]["steps"], config["dataset"]["window"]) == (6, 64)
    assert json.loads((whole / "run.json").read_text())["stages"] == ["text", "chat"]


def test_metrics_of_every_step(whole):
    with open(whole / "metrics.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(r["stage"], int(r["step"])) for r in rows] == [(s, n) for s in ("text", "chat") for n in range(1, 7)]
    assert all(float(r["train/loss"]) > 0 and float(r["train/grad_norm"]) > 0 for r in rows)
    # Cosine with a warm-up of 20: the k-th step of a peak of 1e-3.
    assert [float(r["train/lr"]) for r in rows[:6]] == pytest.approx([1e-3 * k / 20 for k in range(1, 7)])
    assert [bool(r["val/bits_per_byte"]) for r in rows] == [False] * 5 + [True] + [False] * 6
    assert [bool(r["val/exact_match"]) for r in rows] == [False] * 11 + [True]
    stage = json.loads((whole / "stages" / "text" / "metrics.json").read_text())
    assert float(rows[5]["val/bits_per_byte"]) == pytest.approx(stage["val/bits_per_byte"], rel=1e-6)


def test_the_report(whole):
    assert (whole / "curves.png").stat().st_size > 1000
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2
    assert set(samples[0]) == {"prompt", "answer", "expected"}


def test_the_second_stage_trained_adapters_alone(whole):
    from safetensors.torch import load_file

    text, chat = (load_file(whole / "stages" / s / "weights.safetensors") for s in ("text", "chat"))
    assert any("lora_" in name for name in chat)
    assert any(v.abs().sum() > 0 for n, v in chat.items() if "lora_B" in n)
    base = {n.replace(".base_layer", ""): v for n, v in chat.items() if "lora_" not in n}
    assert base.keys() == text.keys()
    assert all((base[n] == text[n]).all() for n in text)


def test_two_runs_are_equal(tool, tiny, whole, tmp_path):
    folder = tmp_path / "run"
    assert tool("train", *tiny, f"paths.run_dir={folder}").returncode == 0
    for name in ("stages/text/weights.safetensors", "stages/chat/weights.safetensors", "metrics.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_micro_batches_do_not_change_the_result(tool, tiny, whole, tmp_path):
    from safetensors.torch import load_file

    folder = tmp_path / "run"
    job = tool("train", *tiny, f"paths.run_dir={folder}", "recipe.micro_batch=1")
    assert job.returncode == 0, job.stderr
    one, other = (load_file(f / "stages/text/weights.safetensors") for f in (folder, whole))
    difference = sum((one[n] - other[n]).double().pow(2).sum() for n in one) ** 0.5
    assert difference < 1e-5 * sum(v.double().pow(2).sum() for v in other.values()) ** 0.5


# ------------------------------------------------------------------ starting from weights


@pytest.mark.parametrize("what", ["stages/text", "stages/text/weights.safetensors"])
def test_a_run_starts_from_anothers_stage(tool, tiny, whole, tmp_path, what):
    """The chat stage from the text stage's files is the chat stage of the whole run."""
    folder = tmp_path / "run"
    job = tool("train", *tiny, f"paths.run_dir={folder}", f"init_from={whole}/{what}", "recipe.run=[chat]")
    assert job.returncode == 0, job.stderr
    name = "stages/chat/weights.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert not (folder / "stages" / "text").exists()


@pytest.mark.slow
def test_a_run_starts_from_anothers_last_stage(tool, tiny, whole, tmp_path):
    folder = tmp_path / "run"
    merge = "recipe.stages.text.prepare=[{_target_: bestiary.shared.core.prepare.merge_lora}]"
    job = tool(
        "train", *tiny, f"paths.run_dir={folder}", f"init_from={whole}", "recipe.run=[text]", "+" + merge, "recipe.lr=0"
    )
    assert job.returncode == 0, job.stderr
    # Nothing was learnt, so it scores what the other one scored.
    mine, theirs = (json.loads((f / "result.json").read_text())["metrics"] for f in (folder, whole))
    assert mine["test/bits_per_byte"] == pytest.approx(theirs["test/bits_per_byte"], rel=1e-5)


# ------------------------------------------------------------------ debug, compare, evaluations on the way


def test_debug_beats_what_is_asked(tool, tiny, tmp_path):
    folder = tmp_path / "run"
    job = tool("train", *tiny, "debug=fast", f"paths.run_dir={folder}", "recipe.stages.text.steps=50")
    assert job.returncode == 0, job.stderr
    assert "text 3/3" in job.stdout
    assert "chat 3/3" in job.stdout
    result = json.loads((folder / "result.json").read_text())
    assert result["scope"] == "reduced: debug"
    assert result["metrics"]["test/prompts"] == 1


@pytest.mark.slow
def test_debug_overfit_learns_its_batch(tool, tiny, tmp_path):
    folder = tmp_path / "run"
    job = tool(
        *("train", *tiny, "debug=overfit", f"paths.run_dir={folder}", "recipe.run=[text]", "recipe.steps=200"),
        *("callbacks.save_every_steps=null", "recipe.lr=1e-2", "recipe.batch_size=2"),
    )
    assert job.returncode == 0, job.stderr
    with open(folder / "metrics.csv", newline="") as handle:
        losses = [float(r["train/loss"]) for r in csv.DictReader(handle)]
    assert losses[-1] < 0.3 < 4 < losses[0]


def test_compared_runs_stand_beside_it(tool, tiny, tmp_path):
    folder = tmp_path / "run"
    job = tool(
        "train", *tiny, "recipe.run=[text]", "+compare.other=['seed=1']", "+compare.same=[]", f"paths.run_dir={folder}"
    )
    assert job.returncode == 0, job.stderr
    one, other, same = (
        json.loads((f / "result.json").read_text())
        for f in (folder, folder / "compare" / "other", folder / "compare" / "same")
    )
    assert other["seed"] == 1
    assert same["metrics"] == one["metrics"]
    assert other["metrics"]["test/bits_per_byte"] != one["metrics"]["test/bits_per_byte"]


def test_a_compared_run_of_another_part_does_not_inherit_its_numbers(tool, tiny, tmp_path):
    folder = tmp_path / "run"
    job = tool(
        *("train", *tiny, "recipe.run=[text]", f"paths.run_dir={folder}"),
        *("+compare.hybrid=['backbone=hybrid_tiny']", "+compare.none=['backbone=none']"),
    )
    assert job.returncode == 0, job.stderr
    assert "compared run none is left out: " in job.stdout
    assert json.loads((folder / "compare" / "hybrid" / "result.json").read_text())["metrics"]
    assert json.loads((folder / "result.json").read_text())["metrics"]


def test_evaluating_on_the_way_changes_nothing(tool, tiny, whole, tmp_path):
    folder = tmp_path / "run"
    job = tool("train", *tiny, f"paths.run_dir={folder}", "recipe.stages.text.eval_every=2")
    assert job.returncode == 0, job.stderr
    assert "text step 2: val/bits_per_byte" in job.stdout
    with open(folder / "metrics.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [r["step"] for r in rows if r["stage"] == "text" and r["val/bits_per_byte"]] == ["2", "4", "6"]
    name = "stages/chat/weights.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


# ------------------------------------------------------------------ W&B


def no_credentials(tmp_path):
    return {"WANDB_MODE": None, "NETRC": str(tmp_path / "netrc"), "WANDB_DIR": str(tmp_path), "HOME": str(tmp_path)}


def test_wandb_without_credentials_goes_offline(tool, tiny, whole, tmp_path):
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    job = tool(
        "train",
        *(*tiny, "logger=wandb", f"paths.run_dir={folder}"),
        env={**no_credentials(tmp_path), "WANDB_SILENT": "true"},
    )
    assert job.returncode == 0, job.stderr
    assert [line for line in job.stdout.splitlines() if "W&B" in line] == [
        "W&B: no credentials, logging offline; `wandb sync` sends it later"
    ]
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert (folder / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


@pytest.mark.slow
def test_a_broken_wandb_does_not_stop_a_run(tool, tiny, whole, tmp_path):
    folder = tmp_path / "run"
    before = """
import sys, types
def init(**options):
    raise RuntimeError("the server said no")
sys.modules["wandb"] = types.SimpleNamespace(init=init, Settings=dict)
"""
    job = tool("train", *tiny, "logger=wandb", f"paths.run_dir={folder}", before=before, env=no_credentials(tmp_path))
    assert job.returncode == 0, job.stderr
    assert "W&B is left out of this run: the server said no" in job.stdout
    name = "stages/chat/weights.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_sweeps_id_reaches_the_folders_name(tool, tiny, tmp_path):
    runs = tmp_path / "runs"
    job = tool("train", *tiny, "debug=fast", runs=runs, env={"WANDB_RUN_ID": "abc123"})
    assert job.returncode == 0, job.stderr
    (folder,) = (runs / "_examples").iterdir()
    assert folder.name.endswith("_abc123")


# ------------------------------------------------------------------ where it writes


@pytest.mark.slow
def test_folders_with_spaces_and_home(tool, tiny, tmp_path):
    job = tool("train", *tiny, "debug=fast", "paths.run_dir='~/my runs/one'", env={"HOME": str(tmp_path)})
    assert job.returncode == 0, job.stderr
    assert (tmp_path / "my runs" / "one" / "result.json").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tool, tiny, tmp_path, short):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    job = tool("train", *tiny, runs=tmp_path / "runs")
    tmp_path.chmod(stat.S_IRWXU)
    short(job, str(tmp_path))
