"""A root with one table, and a training script that takes no time."""

from __future__ import annotations

import copy
import csv
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
import json, os, pathlib, sys, time
given = dict(a.lstrip("+").split("=", 1) for a in sys.argv[1:])
if "fail" in given:
    sys.exit("no such thing")
seed, folder = int(given["seed"]), pathlib.Path(given["paths.run_dir"].strip("'"))
folder.mkdir(parents=True, exist_ok=True)
identity = "abc"
if given.get("project") == "_examples":  # as train.py does: what a run is, its resolved config says
    sys.path.insert(0, SRC)
    from bestiary.shared.core.config import compose, config_hash, resolved
    identity = config_hash(resolved(compose(sys.argv[1:])[0]))
    (folder / "run.json").write_text(json.dumps({"config_hash": identity}))
print("trained", folder, flush=True)
if "meet" in given:  # gets through only if so many run at once
    here = pathlib.Path(given["meet"])
    (here / str(os.getpid())).touch()
    end = time.monotonic() + 30
    while len(list(here.iterdir())) < 2:
        time.sleep(0.02)
        if time.monotonic() > end:
            sys.exit("nobody came")
if "alone" in given:  # fails if another runs at the same time
    mark = pathlib.Path(given["alone"])
    mark.touch(exist_ok=False)
    time.sleep(0.3)
    mark.unlink()
if "wait" in given and not pathlib.Path(given["wait"]).exists():
    time.sleep(60)
result = {"run_dir": str(folder), "metrics": {"test/dice": 0.9 + seed / 100}, "seed": seed, "config_hash": identity,
          "data_revision": "toy-1", "torch": "2", "device": "cpu", "wall_s": 2.0 + seed, "peak_gb": 0.5,
          "scope": "reduced: debug" if "debug" in given else "full"}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def zoo(tmp_path, root):
    """A root with one table and a training script of its own."""
    folder = tmp_path / "a root" / "projects" / "toy" / "tables"
    folder.mkdir(parents=True)
    (folder / "t1.yaml").write_text(yaml.safe_dump(TABLE))
    (tmp_path / "train.py").write_text(f"SRC = {str(root / 'src')!r}{TRAIN}")
    return tmp_path / "a root"


@pytest.fixture
def reproduce(zoo, run_tool, tmp_path):
    def run(*args, **options):
        extra = ["--train", tmp_path / "train.py"] if args[0] == "run" else []
        return run_tool("reproduce", "--root", zoo, *args, *extra, **options)

    return run


@pytest.fixture
def change(zoo):
    """`change(good={"tier": "smoke"})` changes rows of the table; a row that is not there is made from `good`."""

    def rows(**changes):
        data = copy.deepcopy(TABLE)
        for name, values in changes.items():
            row = next((row for row in data["rows"] if row["id"] == name), None)
            if row is None:
                data["rows"].append(row := {**data["rows"][0], "id": name, "label": name})
            row.update(values)
        (zoo / "projects" / "toy" / "tables" / "t1.yaml").write_text(yaml.safe_dump(data))

    return rows


@pytest.fixture
def trained():
    """`trained(result)`: row and seed of the runs that were started, in order of their first lines."""

    def folders(result):
        out = [line.rpartition("trained ")[2] for line in result.stdout.splitlines() if "trained " in line]
        return [Path(folder).parts[-3::2] for folder in out]

    return folders


@pytest.fixture
def lines(zoo):
    """`lines()` of measured.csv."""

    def rows():
        with (zoo / "projects" / "toy" / "results" / "measured.csv").open() as file:
            return list(csv.DictReader(file))

    return rows
