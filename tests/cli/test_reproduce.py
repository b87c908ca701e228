"""tools/reproduce.py from outside, with a training script that takes no time."""

from __future__ import annotations

import copy
import csv
import shlex
from pathlib import Path

import pytest
import yaml

TABLE = {
    "schema": 1,
    "paper": {"title": "A paper", "arxiv": None, "version": None, "table": "none"},
    "protocol": {"dataset": "toy", "split": "test", "metric": "Dice", "version": 1},
    "metrics": [
        {"key": "dice", "unit": "fraction", "higher_is_better": True, "decimals": 3, "reads": "test/dice",
         "tolerance": {"abs": 0.02, "basis": "seeds"}},
    ],
    "rows": [
        {"id": "good", "label": "Good", "ours": True, "overrides": ["+project=toy"], "published": {"dice": 0.91},
         "source": "T1", "tier": "small"},
        {"id": "off", "label": "Off", "ours": True, "overrides": ["+project=toy", "off=1"], "published": {"dice": 0.1},
         "source": "T1", "tier": "small"},
        {"id": "broken", "label": "Broken", "ours": True, "overrides": ["fail=1"], "published": {}, "tier": "small"},
        {"id": "quoted", "label": "Quoted", "ours": False, "overrides": None, "published": {"dice": 0.8},
         "source": "T1", "tier": "full"},
        {"id": "counted", "label": "Counted", "ours": True, "overrides": None, "published": {}, "tier": "smoke",
         "function": "os:getcwd"},
    ],
}  # fmt: skip

TRAIN = """
import json, pathlib, sys
given = dict(a.lstrip("+").split("=", 1) for a in sys.argv[1:])
if "fail" in given:
    sys.exit("no such thing")
seed, folder = int(given["seed"]), pathlib.Path(given["paths.run_dir"].strip("'"))
folder.mkdir(parents=True, exist_ok=True)
print("trained", folder)
result = {"run_dir": str(folder), "metrics": {"test/dice": 0.9 + seed / 100}, "seed": seed, "config_hash": "abc",
          "data_revision": "toy-1", "torch": "2", "device": "cpu", "wall_s": 2.0 + seed, "peak_gb": 0.5,
          "scope": "reduced: debug" if "debug" in given else "full"}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def zoo(tmp_path):
    """A root with one table and a training script of its own."""
    folder = tmp_path / "a root" / "projects" / "toy" / "tables"
    folder.mkdir(parents=True)
    (folder / "t1.yaml").write_text(yaml.safe_dump(TABLE))
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path / "a root"


@pytest.fixture
def reproduce(zoo, run_tool, tmp_path):
    def run(*args, **options):
        extra = ["--train", tmp_path / "train.py"] if args[0] == "run" else []
        return run_tool("reproduce", "--root", zoo, *args, *extra, **options)

    return run


def lines(zoo):
    with (zoo / "projects" / "toy" / "results" / "measured.csv").open() as file:
        return list(csv.DictReader(file))


def test_run_averages_the_seeds(reproduce, zoo):
    result = reproduce("run", "toy/t1", "--row", "good", "--seeds", "0,1,2")
    assert result.returncode == 0, result.stderr
    assert "0.910 ± 0.010 (n=3)" in result.stdout
    assert "match" in result.stdout
    (line,) = lines(zoo)
    assert (line["table"], line["row"], line["metric"]) == ("t1", "good", "dice")
    assert float(line["value"]) == pytest.approx(0.91)
    assert float(line["std"]) == pytest.approx(0.01)
    assert (line["n_seeds"], line["seeds"], line["overrides"]) == ("3", "0 1 2", "+project=toy")
    assert (line["wall_s"], line["scope"], line["data_revision"]) == ("3.0", "full", "toy-1")
    assert len(line["commit"]) == 40 or line["commit"] == "unknown"


def test_a_row_after_another_starts_from_its_run_of_the_same_seed(reproduce, zoo):
    data = copy.deepcopy(TABLE)
    data["rows"].insert(1, {**data["rows"][0], "id": "later", "overrides": ["+project=toy", "more=1"], "after": "good"})
    (zoo / "projects" / "toy" / "tables" / "t1.yaml").write_text(yaml.safe_dump(data))
    result = reproduce("run", "toy/t1", "--row", "later", "--seeds", "0,1")
    assert result.returncode == 0, result.stderr
    made = [line.removeprefix("trained ") for line in result.stdout.splitlines() if line.startswith("trained ")]
    assert [Path(folder).parts[-3::2] for folder in made] == [
        ("good", "seed_0"), ("later", "seed_0"), ("good", "seed_1"), ("later", "seed_1")
    ]  # fmt: skip
    starts = [word for word in shlex.split(result.stdout) if word.startswith("init_from=")]
    assert [word.partition("=")[2].strip("'") for word in starts] == [made[0], made[2]]
    assert [line["row"] for line in lines(zoo)] == ["later"]
    again = reproduce("run", "toy/t1", "--row", "later", "--seeds", "0").stdout
    assert [line for line in again.splitlines() if line.startswith("trained ")] == [f"trained {made[1]}"]


def test_a_number_outside_is_one(reproduce):
    result = reproduce("run", "toy/t1", "--row", "good", "--row", "off")
    assert result.returncode == 1
    assert "above" in result.stdout
    assert reproduce("report", "toy/t1").returncode == 1


def test_a_failed_row_is_two_and_the_others_stay(reproduce, zoo):
    result = reproduce("run", "toy/t1", "--row", "broken", "--row", "good")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "could not run: broken" in result.stderr
    assert [line["row"] for line in lines(zoo)] == ["good"]


def test_changed_overrides_make_a_reduced_run(reproduce, zoo):
    result = reproduce("run", "toy/t1", "--row", "good", "-o", "steps=3")
    assert result.returncode == 0, result.stderr
    assert "0.900 (reduced, n=1)" in result.stdout
    assert "match" not in result.stdout
    assert lines(zoo)[0]["scope"] == "reduced: steps=3"


def test_a_run_that_calls_itself_reduced_is_believed(reproduce, zoo):
    data = copy.deepcopy(TABLE)
    data["rows"][0]["overrides"] = ["debug=fast"]
    (zoo / "projects" / "toy" / "tables" / "t1.yaml").write_text(yaml.safe_dump(data))
    reproduce("run", "toy/t1", "--row", "good")
    assert lines(zoo)[0]["scope"] == "reduced: debug"


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
    ],
)
def test_mistakes_get_a_short_answer(reproduce, args, code, message):
    result = reproduce(*args)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bad_table_is_three(reproduce, zoo):
    (zoo / "projects" / "toy" / "tables" / "t1.yaml").write_text("schema: 1\n")
    for args in (["list"], ["show", "toy/t1"], ["run", "toy/t1"], ["report", "toy/t1"], ["check"]):
        result = reproduce(*args)
        assert result.returncode == 3, args
        assert "t1.yaml: the file lacks" in result.stderr


def test_list_show_and_report(reproduce):
    assert "5 rows" in reproduce("list").stdout
    shown = reproduce("show", "toy/t1").stdout
    assert "dice 0.910 (T1)" in shown
    assert "blocked    quoted from others" in shown
    report = reproduce("report", "toy/t1", "--markdown")
    assert "| Good | not run, published 0.910 |" in report.stdout


def test_check_keeps_readmes_equal(reproduce, zoo):
    readme = zoo / "projects" / "toy" / "README.md"
    readme.write_text("# toy\n<!-- table toy/t1 -->\n<!-- /table -->\n")
    assert reproduce("check").returncode == 3
    assert reproduce("check", "--write").returncode == 0
    assert "| Good | not run, published 0.910 |" in readme.read_text()
    assert reproduce("check").returncode == 0
    reproduce("run", "toy/t1", "--row", "good")
    result = reproduce("check")
    assert result.returncode == 3
    assert "out of date" in result.stderr


def test_the_committed_tables_check(run_tool):
    result = run_tool("reproduce", "check")
    assert result.returncode == 0, result.stderr


def test_a_counted_row_runs(run_tool, root, tmp_path):
    copied = tmp_path / "copy" / "projects" / "asm_unet" / "tables"
    copied.mkdir(parents=True)
    name = "params_flops.yaml"
    (copied / name).write_text((root / "projects" / "asm_unet" / "tables" / name).read_text())
    result = run_tool("reproduce", "--root", tmp_path / "copy", "run", "asm_unet/params_flops", "--row", "acdc_plain")
    assert result.returncode == 0, result.stderr
    assert "30,377,428" in result.stdout
    assert result.stdout.count(" match") == 3
