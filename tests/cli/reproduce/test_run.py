"""tools/reproduce.py run: rows, seeds, side by side."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest


def test_run_averages_the_seeds(reproduce, lines):
    result = reproduce("run", "toy/t1", "--row", "good", "--seeds", "0,1,2")
    assert result.returncode == 0, result.stderr
    assert "0.910 ± 0.010 (n=3)" in result.stdout
    assert "match" in result.stdout
    (line,) = lines()
    assert (line["table"], line["row"], line["metric"]) == ("t1", "good", "dice")
    assert float(line["value"]) == pytest.approx(0.91)
    assert float(line["std"]) == pytest.approx(0.01)
    assert (line["n_seeds"], line["seeds"], line["overrides"]) == ("3", "0 1 2", "+project=toy")
    assert (line["wall_s"], line["scope"], line["data_revision"]) == ("3.0", "full", "toy-1")
    assert len(line["commit"]) == 40 or line["commit"] == "unknown"


def test_a_row_after_another_starts_from_its_run_of_the_same_seed(reproduce, change, lines):
    change(later={"overrides": ["+project=toy", "more=1"], "after": "good"})
    result = reproduce("run", "toy/t1", "--row", "later", "--seeds", "0,1")
    assert result.returncode == 0, result.stderr
    made = [line.removeprefix("trained ") for line in result.stdout.splitlines() if line.startswith("trained ")]
    assert [Path(folder).parts[-3::2] for folder in made] == [
        ("good", "seed_0"), ("later", "seed_0"), ("good", "seed_1"), ("later", "seed_1")
    ]  # fmt: skip
    starts = [word for word in shlex.split(result.stdout) if word.startswith("init_from=")]
    assert [word.partition("=")[2].strip("'") for word in starts] == [made[0], made[2]]
    assert [line["row"] for line in lines()] == ["later"]
    if "-dirty-" in made[0]:  # in a checkout with changes every run is new
        return
    again = reproduce("run", "toy/t1", "--row", "later", "--seeds", "0").stdout
    assert [line for line in again.splitlines() if line.startswith("trained ")] == [f"trained {made[1]}"]


def test_a_number_outside_is_one(reproduce):
    result = reproduce("run", "toy/t1", "--row", "good", "--row", "off")
    assert result.returncode == 1
    assert "above" in result.stdout
    assert reproduce("report", "toy/t1").returncode == 1


def test_a_failed_row_is_two_and_the_others_stay(reproduce, lines):
    result = reproduce("run", "toy/t1", "--row", "broken", "--row", "good")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "could not run: broken" in result.stderr
    assert [line["row"] for line in lines()] == ["good"]


def test_changed_overrides_make_a_reduced_run(reproduce, lines):
    result = reproduce("run", "toy/t1", "--row", "good", "-o", "steps=3")
    assert result.returncode == 0, result.stderr
    assert "0.900 (reduced, n=1)" in result.stdout
    assert "match" not in result.stdout
    assert lines()[0]["scope"] == "reduced: steps=3"


def test_a_run_that_calls_itself_reduced_is_believed(reproduce, change, lines):
    change(good={"overrides": ["debug=fast"]})
    reproduce("run", "toy/t1", "--row", "good")
    assert lines()[0]["scope"] == "reduced: debug"


def test_dry_run_prints_the_commands_and_runs_nothing(reproduce, zoo, tmp_path):
    result = reproduce("run", "toy/t1", "--row", "good", "--seeds", "0,1", "--dry-run")
    assert result.returncode == 0, result.stderr
    commands = result.stdout.splitlines()
    assert [f"seed={i}" in command for i, command in enumerate(commands)] == [True, True]
    assert all("paths.run_dir=" in command for command in commands)
    assert not (zoo / "projects" / "toy" / "results").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["show", "toy/t2"], 2, "did you mean 'toy/t1'"),
        (["run", "toy/t1", "--row", "god"], 2, "did you mean 'good'"),
        (["run", "toy/t1", "--row", "quoted"], 2, "blocked: quoted from others"),
        (["run", "toy/t1", "--row", "counted"], 2, "must be in bestiary"),
        (["run", "toy/t1", "--row", "counted", "-o", "a=1"], 2, "measured by a function"),
        (["run", "toy/t1", "--seeds", "a"], 2, "whole numbers"),
        (["run", "toy/t1", "--seeds", "1,1"], 2, "stands twice"),
        (["run", "toy/t1", "--parallel", "0"], 2, "from 1 on"),
        (["run", "toy/t1", "--memory-gb", "-3"], 2, "above 0"),
        (["run", "toy/t1", "--tier", "tiny"], 2, "invalid choice"),
        (["adopt", "nobody"], 2, "there is no such file"),
    ],
)
def test_mistakes_get_a_short_answer(reproduce, args, code, message):
    result = reproduce(*args)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_runs_side_by_side_have_logs_of_their_own(reproduce, change, tmp_path, lines, trained):
    (tmp_path / "here").mkdir()
    change(good={"overrides": ["+project=toy", f"meet={tmp_path / 'here'}"]})
    args = ("run", "toy/t1", "--row", "broken", "--row", "good", "--seeds", "0,1", "--parallel", "2")
    result = reproduce(*args, "--memory-gb", "2")
    assert result.returncode == 2
    assert "could not run: broken" in result.stderr
    assert "broken seed 0: training ended with status 1; its output: " in result.stderr
    assert "no such thing" in result.stderr
    assert sorted(trained(result)) == [("good", "seed_0"), ("good", "seed_1")]
    (seed_0,) = (line for line in result.stdout.splitlines() if line.startswith("[good seed 0] trained "))
    folder = Path(seed_0.partition("trained ")[2])
    assert (folder / "output.log").read_text() == f"trained {folder}\n"
    assert [(line["row"], line["n_seeds"]) for line in lines()] == [("good", "2")]


def test_memory_decides_what_runs_side_by_side(reproduce, change, tmp_path, lines):
    alone = {"overrides": ["+project=toy", f"alone={tmp_path / 'mark'}"], "needs": {"ram_gb": 3}}
    change(good=alone, off={**alone, "published": {"dice": 0.9}}, huge={"needs": {"ram_gb": 50}})
    args = ("--row", "huge", "--row", "good", "--row", "off", "--seeds", "0,1", "--parallel", "4", "--memory-gb", "5")
    result = reproduce("run", "toy/t1", *args)
    assert result.returncode == 2
    assert "huge seed 0: not started: it needs 50 GB of 5.0 GB" in result.stderr
    assert sorted(line["row"] for line in lines()) == ["good", "off"]


def test_what_rows_start_from_is_run_once(reproduce, change, trained):
    change(a={"after": "good", "overrides": ["a=1"]}, b={"after": "good", "overrides": ["b=1"]})
    result = reproduce(
        "run", "toy/t1", "--row", "a", "--row", "b", "--seeds", "0,1", "--parallel", "3", "--memory-gb", "3"
    )
    assert result.returncode == 0, result.stderr
    started = trained(result)
    assert sorted(started) == sorted((row, seed) for row in ("a", "b", "good") for seed in ("seed_0", "seed_1"))
    for seed in ("seed_0", "seed_1"):
        assert started.index(("good", seed)) < min(started.index(("a", seed)), started.index(("b", seed)))


def test_a_tier_picks_its_rows(reproduce, change):
    change(good={"tier": "smoke"})
    commands = reproduce("run", "toy/t1", "--tier", "smoke", "--dry-run").stdout.splitlines()
    assert commands[0] == "os:getcwd()"
    assert len(commands) == 2
    assert "/t1/good/" in commands[1]
    result = reproduce("run", "toy/t1", "--tier", "full")
    assert result.returncode == 2
    assert "no row of tier full" in result.stdout
    assert reproduce("run", "toy/t1", "--tier", "full", "--row", "good").returncode == 2


def test_a_counted_row_runs(run_tool, root, tmp_path):
    copied = tmp_path / "copy" / "projects" / "asm_unet" / "tables"
    copied.mkdir(parents=True)
    name = "params_flops.yaml"
    (copied / name).write_text((root / "projects" / "asm_unet" / "tables" / name).read_text())
    result = run_tool("reproduce", "--root", tmp_path / "copy", "run", "asm_unet/params_flops", "--row", "acdc_plain")
    assert result.returncode == 0, result.stderr
    assert "30,377,428" in result.stdout
    assert result.stdout.count(" match") == 3
