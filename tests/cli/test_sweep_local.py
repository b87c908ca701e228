"""tools/sweep_local.py from outside, with a program that takes no time; one real trial."""

from __future__ import annotations

import csv
import fcntl
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

PROGRAM = """
import os, pathlib, sys, time
given = dict(a.lstrip("+").split("=", 1) for a in sys.argv[1:])
folder = pathlib.Path(given["paths.run_dir"].strip("'"))
folder.mkdir(parents=True, exist_ok=True)
with open(pathlib.Path(__file__).with_name("started.txt"), "a") as file:
    file.write(f"{given['a']} {given['b']} {given['logger']} {os.environ['OMP_NUM_THREADS']}\\n")
print("began", flush=True)
gate = pathlib.Path(__file__).with_name(f"wait_{given['a']}_{given['b']}")
while gate.exists():
    time.sleep(0.02)
if given["b"] == given.get("bad"):
    sys.exit("this one does not work")
metric = given.get("name", "val/score")
with open(folder / "metrics.csv", "w") as file:
    score = float(given["a"]) - float(given["b"])
    file.write(f"stage,step,loss,{metric}\\ns,1,0.5,\\ns,2,,0\\ns,3,,{score}\\ns,4,0.1,\\n")
"""


@pytest.fixture
def sweep(tmp_path):
    """`sweep(method="random", …)` writes a sweep file of a 2 × 2 grid, changed; the program stands beside it."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def write(**changes):
        data = {
            "program": str(tmp_path / "program.py"),
            "method": "grid",
            "metric": {"name": "val/score", "goal": "maximize"},
            "parameters": {"a": {"values": [1, 2]}, "b": {"values": [0.25, 0.5]}},
            "command": ["${env}", "${interpreter}", "${program}", "+project=p", "logger=wandb", "${args_no_hyphens}"],
        }
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(data | changes, sort_keys=False))
        return path

    return write


@pytest.fixture
def local(run_tool, tmp_path):
    def run(*args, **options):
        return run_tool("sweep_local", *args, "--out", tmp_path / "an out", **options)

    return run


def started(tmp_path):
    file = tmp_path / "started.txt"
    return [tuple(line.split()[:2]) for line in file.read_text().splitlines()] if file.exists() else []


def lines(tmp_path):
    with (tmp_path / "an out" / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_grid_runs_is_ranked_and_drawn(local, sweep, tmp_path):
    result = local(sweep())
    assert result.returncode == 0, result.stderr
    assert started(tmp_path) == [("1", "0.25"), ("1", "0.5"), ("2", "0.25"), ("2", "0.5")]
    assert [(row["trial"], row["a"], row["b"], float(row["value"])) for row in lines(tmp_path)] == [
        ("1", "1", "0.25", 0.75), ("2", "1", "0.5", 0.5), ("3", "2", "0.25", 1.75), ("4", "2", "0.5", 1.5)
    ]  # fmt: skip
    table = result.stdout.partition("\n\n")[2].splitlines()
    assert table[0].split() == ["val/score", "a", "b", "trial", "wall_s"]
    assert [line.split()[:5] for line in table[2:6]] == [
        ["1", "1.7500", "2", "0.25", "3"], ["2", "1.5000", "2", "0.5", "4"],
        ["3", "0.7500", "1", "0.25", "1"], ["4", "0.5000", "1", "0.5", "2"],
    ]  # fmt: skip
    assert (tmp_path / "an out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    (row,) = (row for row in lines(tmp_path) if row["trial"] == "3")
    assert (row["status"], row["exit_code"], row["metric"]) == ("finished", "0", "val/score")
    assert len(row["commit"]) == 40 or row["commit"] == "unknown"
    again = local(sweep())
    assert again.returncode == 0
    assert "4 of 4 trials are finished" in again.stdout
    assert len(started(tmp_path)) == 4
    assert len(lines(tmp_path)) == 4


def test_less_is_better_where_the_file_says_so(local, sweep):
    result = local(sweep(metric={"name": "val/score", "goal": "minimize"}))
    assert result.stdout.partition("\n\n")[2].splitlines()[2].split()[:4] == ["1", "0.5000", "1", "0.5"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_after_two_exactly_the_other_two_run(local, sweep, tmp_path, root, clean_env, number):
    gate = tmp_path / "wait_2_0.25"
    gate.touch()
    command = [sys.executable, root / "tools" / "sweep_local.py", sweep(), "--out", tmp_path / "an out"]
    process = subprocess.Popen(command, env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: len(started(tmp_path)) == 3)
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert ("stopped; the same command goes on from here" in err) == (number == signal.SIGINT)
    assert [row["trial"] for row in lines(tmp_path)] == ["1", "2"]  # the third was stopped, and is no failure
    gate.unlink()
    result = local(sweep())
    assert result.returncode == 0, result.stderr
    assert "2 of 4 trials are finished" in result.stdout
    assert started(tmp_path)[3:] == [("2", "0.25"), ("2", "0.5")]
    assert [row["trial"] for row in lines(tmp_path)] == ["1", "2", "3", "4"]


def test_a_trial_that_fails_is_noted_and_tried_again(local, sweep, tmp_path):
    result = local(sweep(), "bad=0.5", "--parallel", "2", "--memory-gb", "2")
    assert result.returncode == 1
    rows = {row["trial"]: row for row in lines(tmp_path)}
    assert [rows[str(i)]["status"] for i in range(1, 5)] == ["finished", "failed", "finished", "failed"]
    assert (rows["2"]["exit_code"], rows["2"]["value"]) == ("1", "")
    with open(rows["2"]["log"]) as log:
        assert "this one does not work" in log.read()
    assert f"failed, exit code 1: {rows['2']['log']}" in result.stdout
    assert "failed (1)" in result.stdout.partition("\n\n")[2]
    local(sweep(), "bad=0.5")
    assert len(started(tmp_path)) == 6
    assert len(lines(tmp_path)) == 6
    result = local(sweep(metric={"name": "val/other", "goal": "maximize"}), "--max", "1")
    assert result.returncode == 1
    assert lines(tmp_path)[-1]["status"] == "no metric"


def test_trials_run_side_by_side_and_share_the_cores(local, sweep, tmp_path):
    for b in ("0.25", "0.5"):  # neither of the first two ends before the other has begun
        (tmp_path / f"wait_1_{b}").touch()
    process = None
    try:
        process = subprocess.Popen([sys.executable, "-c", RELEASE, str(tmp_path)])
        result = local(sweep(), "--parallel", "2", "--memory-gb", "2", "--max", "2", env={"OMP_NUM_THREADS": None})
    finally:
        process.wait(timeout=60)
    assert result.returncode == 0, result.stderr
    assert process.returncode == 0
    threads = {line.split()[3] for line in (tmp_path / "started.txt").read_text().splitlines()}
    assert len(threads) == 1
    assert int(threads.pop()) >= 1


RELEASE = """
import pathlib, sys, time
folder, end = pathlib.Path(sys.argv[1]), time.monotonic() + 40
file = folder / "started.txt"
while not file.exists() or len(file.read_text().splitlines()) < 2:
    time.sleep(0.02)
    if time.monotonic() > end:
        break
together = file.exists() and len(file.read_text().splitlines()) >= 2
for gate in folder.glob("wait_*"):
    gate.unlink()
sys.exit(not together)
"""


def test_a_line_that_was_cut_short_is_dropped(local, sweep, tmp_path):
    local(sweep(), "--max", "2")
    file = tmp_path / "an out" / "sweep.csv"
    file.write_text(file.read_text()[:-20])
    result = local(sweep(), "--max", "2")
    assert result.returncode == 0, result.stderr
    assert [row["trial"] for row in lines(tmp_path)] == ["1", "2"]
    assert started(tmp_path)[2:] == [("1", "0.5")]


def test_a_sweep_with_one_more_parameter_keeps_what_is_there(local, sweep, tmp_path):
    local(sweep(), "--max", "1")
    result = local(sweep(parameters={"c": {"values": [7]}, "a": {"value": 1}, "b": {"value": 0.5}}))
    assert result.returncode == 0, result.stderr
    assert [(row["a"], row["b"], row["c"]) for row in lines(tmp_path)] == [("1", "0.25", ""), ("1", "0.5", "7")]
    table = result.stdout.partition("\n\n")[2].splitlines()
    assert len(table) == 4  # title, rule, one trial, the file


def test_dry_run_prints_the_commands_alone(local, sweep, tmp_path):
    result = local(sweep(), "extra=1", "--dry-run", "more=2")
    words = [shlex.split(line) for line in result.stdout.splitlines()]
    assert len(words) == 4
    assert words[0][0] == "/usr/bin/env"
    assert words[0][3:-1] == ["+project=p", "logger=csv", "a=1", "b=0.25", "extra=1", "more=2"]
    assert words[0][-1].startswith(f"paths.run_dir='{tmp_path / 'an out' / 'trials'}/")
    assert len({w[-1] for w in words}) == 4
    assert not (tmp_path / "an out").exists()
    assert "logger=wandb" in local(sweep(), "--dry-run", "--wandb").stdout


def test_a_file_is_named_from_any_folder(local):
    result = local("conf/sweeps/asm_unet_lr.yaml", "--max", "2", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("+project=asm_unet") == 2


def test_random_trials_are_the_same_ones_again(local, sweep, tmp_path):
    path = sweep(method="random", run_cap=3, parameters={"a": {"min": 0.0, "max": 1.0}, "b": {"value": 0}})
    assert local(path, "--max", "2").returncode == 0
    assert local(path).returncode == 0
    assert len(started(tmp_path)) == 3
    assert local(path, "--seed", "1", "--max", "1").returncode == 0
    assert len(started(tmp_path)) == 4


@pytest.mark.parametrize(
    ("changes", "args", "message"),
    [
        ({"method": "bayes"}, [], "needs W&B's server"),
        ({"method": "random"}, [], "give it a run_cap, or --max"),
        ({"program": "tools/nothing.py"}, [], "there is no"),
        ({"program": "tools/train.py"}, [], "there is no project 'p'"),
        ({}, ["--max", "0"], "from 1 on"),
        ({"parameter": 1}, [], "did you mean 'parameters'"),
    ],
)
def test_mistakes_get_a_short_answer(local, sweep, tmp_path, changes, args, message):
    result = local(sweep(**changes), *args)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "an out").exists()


def test_a_missing_file_and_a_folder_in_use(local, sweep, tmp_path):
    result = local(tmp_path / "no.yaml")
    assert result.returncode == 2
    assert "no.yaml: cannot be read" in result.stderr
    out = tmp_path / "an out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        result = local(sweep())
    assert result.returncode == 2
    assert "another process runs a sweep in this folder" in result.stderr
    (out / "sweep.csv").write_text("a,b\n1,2\n")
    result = local(sweep())
    assert result.returncode == 2
    assert "is not a sweep's" in result.stderr


@pytest.mark.slow
def test_a_real_trial(run_tool, root, tmp_path, need_asset):
    need_asset("icbm152")
    small = ["debug=fast", "dataset.downsample=4", "model.sw_overlap=0"]
    path = root / "conf" / "sweeps" / "asm_unet_lr.yaml"
    args = (path, "--max", "1", "--out", tmp_path / "out", *small)
    result = run_tool("sweep_local", *args)
    assert result.returncode == 0, result.stdout + result.stderr
    with (tmp_path / "out" / "sweep.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert 0 < float(row["value"]) < 1
    with (tmp_path / "out" / "trials" / row["hash"] / "metrics.csv").open(newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["val/dice/mean"]) == float(row["value"])
    # The same config said in another way is the same trial.
    again = run_tool("sweep_local", *args, f"recipe.lr={row['recipe.lr']}", "logger=csv")
    assert "1 of 1 trials are finished" in again.stdout


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
