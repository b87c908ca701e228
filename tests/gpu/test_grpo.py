"""GRPO on a GPU: sampling and scoring agree there, a run that is broken off goes on, and the reward rises."""

import csv
import json
import math

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

TINY = [
    "+experiment=_examples/carry_addition",
    "trainer=gpu",
    "recipe.run=[grpo]",
    "recipe.steps=4",
    "recipe.prompts_per_step=4",
    "recipe.samples_per_prompt=4",
    "recipe.max_new_tokens=12",
    "recipe.updates=2",
    "recipe.rule.name=dapo",
    "dataset.held_out=6",
    "callbacks.log_every_steps=1",
    "callbacks.save_every_steps=1",
    "recipe.shapings=["
    "{_target_: bestiary.shared.rl.rewards.shaping.OverlongPenalty, max_tokens: 12, cache_tokens: 11}]",
]
HYBRID = ["backbone=hybrid_tiny"]


def rows(folder, key):
    with open(folder / "metrics.csv", newline="") as handle:
        return [float(row[key]) for row in csv.DictReader(handle) if row.get(key)]


def drawn(folder):
    lines = (folder / "stages" / "grpo" / "completions.jsonl").read_text().splitlines()
    return [(line["step"], line["id"], [row["ids"] for row in line["rows"]]) for line in map(json.loads, lines)]


@pytest.mark.parametrize(
    ("change", "most"),
    [
        (["trainer.precision=32-true"], 1e-3),
        (["trainer.precision=bf16-mixed"], 0.5),
        ([*HYBRID, "trainer.precision=32-true"], 1e-3),
        ([*HYBRID, "trainer.precision=bf16-mixed"], 0.5),
    ],
    ids=["qwen2-fp32", "qwen2-bf16", "hybrid-fp32", "hybrid-bf16"],
)
def test_sampling_and_scoring_agree(run_tool, tmp_path, change, most):
    done = run_tool("train", *TINY, *change, f"paths.run_dir={tmp_path / 'run'}", timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    gaps = rows(tmp_path / "run", "train/max_logprob_gap")
    assert gaps
    assert max(gaps) < most
    assert all(math.isfinite(x) for x in rows(tmp_path / "run", "train/surrogate"))


def test_a_run_goes_on_where_rollouts_are_in_use(run_tool, train_until, tmp_path):
    """Steps 3 and 4 learn from the same rollouts, which the checkpoint between them holds."""
    from safetensors.torch import load_file

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    args = [*TINY, "trainer.precision=32-true"]
    train_until("grpo 3/4", *args, f"paths.run_dir={broken}")
    for folder in (whole, broken):
        done = run_tool("train", *args, f"paths.run_dir={folder}", timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert drawn(whole) == drawn(broken)
    one, other = (load_file(f / "stages" / "grpo" / "weights.safetensors") for f in (whole, broken))
    difference = sum((one[n] - other[n]).double().pow(2).sum() for n in one) ** 0.5
    assert difference < 1e-5 * sum(v.double().pow(2).sum() for v in other.values()) ** 0.5


def test_the_reward_rises(run_tool, tmp_path):
    folder = tmp_path / "run"
    quick = ["trainer=gpu", "recipe.sft_steps=400", "recipe.steps=40", "dataset.held_out=256"]
    done = run_tool("train", "+experiment=_examples/carry_addition", *quick, f"paths.run_dir={folder}", timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "result.json").read_text())["metrics"]
    assert found["test/greedy/pass@1"] > 0.8
    print(found, rows(folder, "train/seconds/rollout")[-1], rows(folder, "train/seconds/update")[-1])
