"""tools/reproduce.py run --resume: what earlier calls left is taken over, and nothing else."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest


def test_resume_takes_over_the_seeds_of_earlier_calls(reproduce, change, tmp_path, lines, trained):
    change(good={"overrides": ["+project=_examples"]})
    assert trained(reproduce("run", "toy/t1", "--row", "good", "--seeds", "0")) == [("good", "seed_0")]
    assert len(trained(reproduce("run", "toy/t1", "--row", "good", "--seeds", "1,2"))) == 2
    dry = reproduce("run", "toy/t1", "--row", "good", "--seeds", "0,1,2,3", "--resume", "--dry-run").stdout.splitlines()
    assert ["seed=3" in line for line in dry] == [True]
    again = reproduce("run", "toy/t1", "--row", "good", "--seeds", "0,1,2", "--resume")
    assert again.returncode == 0, again.stderr
    assert trained(again) == []
    assert [line["seeds"] for line in lines()] == ["0", "1 2", "0 1 2"]
    assert float(lines()[2]["value"]) == pytest.approx(0.91)
    once_more = reproduce("run", "toy/t1", "--row", "good", "--seeds", "0,1,2", "--resume")
    assert "in measured.csv already" in once_more.stdout
    assert len(lines()) == 3


def other_commit(tmp_path, row, seed, commit, dirty=False):
    """Make a run one of another commit: its folder's name, and what it noted when it was started."""
    (folder,) = (tmp_path / "runs" / "reproduce" / "toy" / "t1" / row).glob(f"*/seed_{seed}")
    moved = folder.parents[1] / f"{folder.parent.name.partition('-')[0]}-{commit[:10]}" / folder.name
    moved.parent.mkdir()
    folder.rename(moved)
    (moved / "environment.jsonl").write_text(json.dumps({"commit": commit, "dirty": dirty}) + "\n")
    return moved


def test_resume_takes_over_another_commit_and_says_so(reproduce, change, tmp_path, lines, trained):
    change(good={"overrides": ["+project=_examples"]})
    reproduce("run", "toy/t1", "--row", "good")
    moved = other_commit(tmp_path, "good", 0, "f" * 40, dirty=True)
    assert trained(reproduce("run", "toy/t1", "--row", "good", "--seeds", "0")) == [("good", "seed_0")]
    for folder in moved.parents[1].iterdir():
        if folder != moved.parent:
            shutil.rmtree(folder)
    result = reproduce("run", "toy/t1", "--row", "good", "--seeds", "0,1", "--resume")
    assert result.returncode == 0, result.stderr
    assert trained(result) == [("good", "seed_1")]
    last = lines()[-1]
    assert last["commit"].split()[0] == "f" * 40
    assert len(last["commit"].split()) == 2
    assert (last["dirty"], last["n_seeds"]) == ("true", "2")


def test_resume_takes_over_no_other_config(reproduce, change, tmp_path, lines, trained):
    change(good={"overrides": ["+project=_examples", "recipe.steps=7"]})
    reproduce("run", "toy/t1", "--row", "good")
    other_commit(tmp_path, "good", 0, "f" * 40)
    change(good={"overrides": ["+project=_examples", "recipe.steps=8"]})
    result = reproduce("run", "toy/t1", "--row", "good", "--resume")
    assert trained(result) == [("good", "seed_0")]
    assert "f" * 40 not in lines()[-1]["commit"]


def test_resume_follows_the_row_that_it_starts_from(reproduce, change, tmp_path, lines, trained):
    change(
        good={"overrides": ["+project=_examples"]},
        later={"overrides": ["+project=_examples", "seed=0"], "after": "good"},
    )
    reproduce("run", "toy/t1", "--row", "good")
    moved = other_commit(tmp_path, "good", 0, "f" * 40)
    result = reproduce("run", "toy/t1", "--row", "later", "--resume")
    assert result.returncode == 0, result.stderr
    assert trained(result) == [("later", "seed_0")]
    assert f"init_from={moved}" in result.stdout
    assert "f" * 40 in lines()[-1]["commit"].split()
    assert trained(reproduce("run", "toy/t1", "--row", "later", "--resume")) == []


@pytest.mark.parametrize("parallel", ["1", "2"])
def test_a_stopped_call_goes_on_with_resume(
    reproduce, zoo, change, tmp_path, root, clean_env, parallel, lines, trained
):
    go = tmp_path / "go"
    change(good={"overrides": ["+project=_examples"]}, slow={"overrides": ["+project=_examples", f"++wait={go}"]})
    script, env = root / "tools" / "reproduce.py", clean_env(BESTIARY_RUNS=str(tmp_path / "runs"))
    args = ["run", "toy/t1", "--row", "good", "--row", "slow", "--parallel", parallel, "--memory-gb", "4"]
    command = [sys.executable, script, "--root", zoo, *args, "--train", tmp_path / "train.py"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("trained" in line and "/slow/" in line for line in process.stdout)
    until(lambda: (zoo / "projects" / "toy" / "results" / "measured.csv").exists())
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert process.returncode == 130
    assert process.stderr.read().startswith("stopped; the same command goes on")
    assert [line["row"] for line in lines()] == ["good"]
    go.touch()
    (unfinished,) = (tmp_path / "runs" / "reproduce" / "toy" / "t1" / "slow").glob("*/seed_0")
    result = reproduce(*args, "--resume")
    assert result.returncode == 0, result.stderr
    assert trained(result) == [("slow", "seed_0")]
    assert (unfinished / "result.json").is_file()
    assert [line["row"] for line in lines()] == ["good", "slow"]


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
