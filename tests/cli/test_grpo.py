"""A GRPO run from the command line: resumed equals unbroken, two processes equal one, mistakes are answered shortly."""

import csv
import json
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(280)

# A policy that knows nothing is never right: here a reward that falls with length gives the groups their spread.
TINY = [
    "+experiment=_examples/carry_addition",
    "recipe.run=[grpo]",
    "recipe.steps=4",
    "recipe.prompts_per_step=4",
    "recipe.samples_per_prompt=3",
    "recipe.max_new_tokens=12",
    "recipe.lr=0.01",
    "recipe.eval_every=2",
    "dataset.held_out=6",
    "callbacks.log_every_steps=1",
    "callbacks.save_every_steps=1",
    "recipe.shapings=["
    "{_target_: bestiary.shared.rl.rewards.shaping.OverlongPenalty, max_tokens: 12, cache_tokens: 11}]",
]
STATEFUL = [
    "recipe.updates=2",
    "recipe.rule.name=dapo",
    "recipe.controllers=["
    "{_target_: bestiary.shared.rl.controllers.entropy_temperature.EntropyTemperature, target: 1.0, rate: 0.3},"
    "{_target_: bestiary.shared.rl.controllers.difficulty_filter.DifficultyFilter, readmit_hard: 0.5},"
    "{_target_: bestiary.shared.rl.controllers.dynamic_sampling.DynamicSampling, max_rounds: 2}]",
]


def numbers(folder):
    """metrics.csv without what the clock and the memory say."""
    with open(folder / "metrics.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    return [{k: v for k, v in row.items() if "seconds" not in k and "memory" not in k and v} for row in rows]


def kill_at(tool, line, *args):
    before = f"""
import builtins, os, signal
said = builtins.print
def spoken(*words, **options):
    said(*words, **options)
    if {line!r} in " ".join(map(str, words)):
        os.kill(os.getpid(), {int(signal.SIGKILL)})
builtins.print = spoken
"""
    job = tool("train", *args, before=before)
    assert job.returncode == -signal.SIGKILL, job.stdout + job.stderr


@pytest.fixture(scope="module", params=[[], STATEFUL], ids=["plain", "stateful"])
def unbroken(request, tool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo") / "run"
    args = [*TINY, *request.param]
    done = tool("train", *args, f"paths.run_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return args, folder, done


def test_a_step_says_what_it_should(unbroken):
    _, folder, done = unbroken
    rows = [row for row in numbers(folder) if "train/surrogate" in row]
    assert len(rows) == 4
    for name in ("reward", "no_spread_share", "truncated_share", "length", "adjusted_entropy", "grad_norm"):
        assert f"train/{name}" in rows[0], name
    assert float(rows[0]["train/max_logprob_gap"]) < 1e-4
    assert any("val/greedy/pass@1" in row for row in numbers(folder))
    assert "exact_text" in done.stdout
    assert "surrogate" not in done.stdout.split("run folder")[0].split("grpo 1/4")[1].splitlines()[0]
    lines = [json.loads(x) for x in (folder / "stages" / "grpo" / "completions.jsonl").read_text().splitlines()]
    assert {len(line["rows"]) for line in lines} == {3}
    assert all(len(r["ids"]) == len(r["logprobs"]) for line in lines for r in line["rows"])


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_any_step_it_ends_the_same(unbroken, tool, tmp_path, step):
    args, whole, _ = unbroken
    folder = tmp_path / "run"
    kill_at(tool, f"grpo {step}/4", *args, f"paths.run_dir={folder}")
    again = tool("train", *args, f"paths.run_dir={folder}")
    assert again.returncode == 0, again.stdout + again.stderr
    for name in ("weights.safetensors", "completions.jsonl"):
        assert (folder / "stages" / "grpo" / name).read_bytes() == (whole / "stages" / "grpo" / name).read_bytes()
    assert [{k: v for k, v in r.items() if "verifier" not in k} for r in numbers(folder)] == [
        {k: v for k, v in r.items() if "verifier" not in k} for r in numbers(whole)
    ]


def test_two_processes_equal_one(unbroken, root, clean_env, tmp_path):
    from safetensors.torch import load_file

    args, whole, _ = unbroken
    folder = tmp_path / "run"
    ddp = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    command = [sys.executable, str(root / "tools" / "train.py"), *args, *ddp, f"paths.run_dir={folder}"]
    done = subprocess.run(command, cwd=tmp_path, env=clean_env(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr

    def said(run):
        lines = (run / "stages" / "grpo" / "completions.jsonl").read_text().splitlines()
        return [(x["step"], x["id"], [r["ids"] for r in x["rows"]]) for x in map(json.loads, lines)]

    assert said(folder) == said(whole)
    one, other = (load_file(f / "stages" / "grpo" / "weights.safetensors") for f in (folder, whole))
    difference = sum((one[n] - other[n]).double().pow(2).sum() for n in one) ** 0.5
    size = sum(v.double().pow(2).sum() for v in other.values()) ** 0.5
    assert difference < 1e-5 * size


def test_replay_under_the_run_s_own_rule_changes_nothing(unbroken, tool, tmp_path):
    _, whole, _ = unbroken
    out = tmp_path / "replay.csv"
    done = tool("replay", f"run={whole}", f"out={out}")
    assert done.returncode == 0, done.stderr
    with open(out, newline="") as handle:
        rows = list(csv.DictReader(handle))
    logged = {int(r["step"]) - 1: float(r["train/reward"]) for r in numbers(whole) if "train/reward" in r}
    for row in rows:
        assert float(row["reward"]) == pytest.approx(logged[int(row["step"])], rel=1e-5)
        assert float(row["same_direction"]) == pytest.approx(1.0)
        assert float(row["surrogate"]) == float(row["surrogate_new"])
    done = tool("replay", f"run={whole}", "rule=dr_grpo", "verifier=numeric", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert "completions scored again" in done.stdout
    wrong = tool("replay", f"run={whole}", "rule.clip=1", f"out={out}")
    assert wrong.returncode == 2
    assert "has no 'clip'; did you mean" in wrong.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("recipe.samples_per_prompt=1", "leaves nothing to compare"),
        ("recipe.temperature=0", "draws the same completion every time"),
        ("recipe.max_len=8", "Raise the stage's max_len"),
        ("backbone.config.max_position_embeddings=16", "the model's context is 16"),
        ("recipe.rule.name=grop", "did you mean 'grpo'"),
        ("recipe.updates=0", "updates must be 1 or more"),
        ("dataset.noise=2", "noise"),
    ],
)
def test_mistakes_get_a_short_answer(tool, short, change, words, tmp_path):
    short(tool("train", *TINY, change, f"paths.run_dir={tmp_path}/run"), words)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run=/nowhere"], "no completions.jsonl there"),
        (["run=/nowhere", "colour=red"], "replay takes rule.KEY=VALUE"),
        (["run=/nowhere", "verifier.x=1"], "needs verifier=NAME"),
    ],
)
def test_replay_s_mistakes(tool, short, args, words):
    short(tool("replay", *args), words)
