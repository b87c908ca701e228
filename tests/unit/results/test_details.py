"""details.csv: what is kept of each run, watched over, and compared structure by structure."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.results import details, join, render, runs, trace
from bestiary.shared.results.details import Detail
from bestiary.shared.results.tables import TableError, read_table

TABLE = {
    "schema": 1,
    "paper": {"title": "A paper", "arxiv": None, "version": None, "table": "none"},
    "protocol": {"dataset": "toy", "split": "test", "metric": "Dice", "version": 1},
    "details": "test/dice/",
    "metrics": [
        {"key": key, "unit": "fraction", "higher_is_better": True, "decimals": 3, "reads": f"test/{key}",
         "tolerance": {"abs": 0.02, "basis": "seeds"}}
        for key in ("dice/mean", "dice/quarter_1")
    ],
    "rows": [
        {"id": "plain", "label": "Plain", "ours": True, "overrides": ["a=1"], "published": {}, "tier": "small"},
        {"id": "new", "label": "New | method", "ours": True, "overrides": ["a=2"], "published": {}, "tier": "small",
         "against": "plain", "lacks": ["dice/quarter_1"]},
    ],
}  # fmt: skip


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "projects" / "toy" / "tables" / "t1.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(TABLE))
    return read_table(path)


def detail(row: str, seed: int, offset: float = 0.0, **changes) -> Detail:
    values = {"A": 0.5 + offset, "B": 0.7 + offset, "C": math.nan, "mean": 0.6 + offset, "quarter_1": 0.5 + 2 * offset}
    return Detail(**{"table": "t1", "row": row, "metric": "test/dice/", "seed": seed, "scope": "full", "commit": "c",
                     "date": "2026-01-01T00:00:00Z", "values": values, **changes})  # fmt: skip


def test_lines_come_back_and_are_added_once(tmp_path):
    path = tmp_path / "results" / "details.csv"
    details.append(path, [detail("plain", 0), detail("plain", 1)])
    details.append(path, [detail("plain", 1, date="later"), detail("new", 1)])
    found = details.read(path)
    assert [(d.row, d.seed) for d in found] == [("plain", 0), ("plain", 1), ("new", 1)]
    assert found[0].values["A"] == 0.5
    assert math.isnan(found[0].values["C"])
    assert trace.problems(path) == []
    assert details.read(tmp_path / "none.csv") == []


def test_a_changed_value_is_seen(tmp_path):
    path = tmp_path / "details.csv"
    details.append(path, [detail("plain", 0)])
    path.write_text(path.read_text().replace("0.5", "0.9", 1))
    assert "changed after it was measured" in trace.problems(path)[0]
    path.write_text("table,row\n")
    with pytest.raises(BadDataError, match="columns"):
        details.append(path, [detail("plain", 1)])
    path.write_text(",".join(details.COLUMNS) + "\nt1,plain,x,zero,full,c,d,{}\n")
    with pytest.raises(BadDataError, match=r"details\.csv:2"):
        details.read(path)


def test_rows_are_compared_where_they_share_seeds(table):
    # New is better by 0.02, 0.04 and 0.06 on every structure; seed 3 ran for one row only.
    lines = [detail("plain", seed) for seed in (0, 1, 2, 3)]
    lines += [detail("new", seed, 0.02 * (seed + 1)) for seed in (0, 1, 2)]
    (found,) = details.compare(table, lines)
    assert (found.row.id, found.against.id, found.seeds) == ("new", "plain", (0, 1, 2))
    assert found.difference.mean == pytest.approx(0.04)
    assert found.difference.seed_std == pytest.approx(0.02)
    assert (found.difference.better, found.difference.worse) == (2, 0)
    assert found.parts["quarter_1"] == pytest.approx((0.08, 4.303 * 0.04 / math.sqrt(3), 0.04))
    # The newest full line of a seed counts; a reduced run neither replaces it nor is mixed with full ones.
    (changed,) = details.compare(table, [*lines, detail("new", 0, 0.08)])
    assert changed.difference.mean == pytest.approx(0.06)
    (same,) = details.compare(table, [*lines, detail("new", 0, 0.5, scope="reduced: steps")])
    assert same == found
    assert not found.reduced
    small = [detail("new", 3, 0.1, scope="reduced: steps"), detail("plain", 3)]
    assert details.compare(table, [*lines, small[0]])[0].seeds == (0, 1, 2)
    (reduced,) = details.compare(table, small)
    assert (reduced.seeds, reduced.reduced) == ((3,), True)
    assert details.compare(table, lines[:4]) == []
    assert details.compare(table, lines, rows=["plain"]) == []


def test_measured_means_are_those_of_the_details(table):
    plan = runs.Plan(table, table.row("new"), (0, 1), (), "c", False, runs.now())
    lines = [detail("new", 0, 0.02), detail("new", 1, 0.04)]
    results = [{"metrics": {f"test/dice/{k}": v for k, v in d.values.items()}} for d in lines]
    measured = runs.summarise(plan, results)
    assert details.disagreements(table, measured, lines) == []
    (missing,) = details.disagreements(table, measured, lines[:1])
    assert "no line in details.csv" in missing
    (other,) = details.disagreements(table, measured, [*lines, detail("new", 1, 0.06)])
    assert "measured.csv says 0.63000, its details 0.64000" in other
    (stray,) = details.disagreements(table, [], [detail("gone", 0)])
    assert "'gone'" in stray
    assert join.outdated(table, measured) == []
    changed = [replace(m, overrides="a=3") for m in measured]
    assert "measured with 'a=3'" in join.outdated(table, changed)[0]


def test_comparisons_are_shown_everywhere(table):
    lines = [detail(row, seed, 0.02 * (row == "new")) for row in ("plain", "new") for seed in (0, 1, 2)]
    cells, found = join.join(table, []), details.compare(table, lines)
    text, markdown = render.to_terminal(table, cells, found), render.to_markdown(table, cells, found)
    assert "+0.020 (n=3)" in text
    assert (
        "| New \\| method | Plain | +0.020 (n=3) | +0.020 to +0.020 | 0.000 | 2 / 0 | outside noise | +0.040 ± 0.000 |"
        in markdown
    )
    pair = json.loads(render.to_json(table, cells, found))["comparisons"][0]
    assert (pair["row"], pair["mean"], pair["within_noise"]) == ("new", pytest.approx(0.02), False)
    assert "within noise" not in markdown
    assert pair["parts"] == {"quarter_1": {"mean": pytest.approx(0.04), "reach": pytest.approx(0)}}
    few = details.compare(table, lines[:1] + lines[3:4])
    (alone,) = json.loads(render.to_json(table, cells, few), parse_constant=pytest.fail)["comparisons"]
    assert (alone["seed_low"], alone["seed_std"], alone["parts"]["quarter_1"]["reach"]) == (None, None, None)
    assert "too few seeds (1)" in render.to_markdown(table, cells, few)


def test_what_a_run_leaves(table):
    plan = runs.Plan(table, table.row("new"), (0, 1), (), "abc", False, runs.now())
    metrics = {"test/dice/A": 0.5, "test/dice/mean": 0.5, "test/dice/C": None, "val/dice/A": 0.1}
    results = [{"metrics": metrics}, {"metrics": metrics, "commits": ["abc", "def"], "scope": "reduced: debug"}]
    first, second = runs.detail_lines(plan, results)
    assert first.values["A"] == 0.5
    assert math.isnan(first.values["C"])
    assert set(first.values) == {"A", "mean", "C"}
    assert (second.seed, second.commit, second.scope) == (1, "abc def", "reduced: debug")
    measured = runs.summarise(plan, results)
    assert [m.metric for m in measured] == ["dice/mean"]  # the row lacks the other one


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"details": ""}, "details"),
        ({"rows": [{**TABLE["rows"][0], "against": "plain"}]}, "another row"),
        ({"rows": [{**TABLE["rows"][0], "lacks": ["dice/median"]}]}, "metrics"),
    ],
)
def test_tables_that_contradict_themselves(tmp_path, change, words):
    path = tmp_path / "toy" / "tables" / "t1.yaml"
    path.parent.mkdir(parents=True)
    data = {**TABLE, **change}
    path.write_text(yaml.safe_dump({k: v for k, v in data.items() if v != ""}))
    with pytest.raises(TableError, match=words):
        read_table(path)


def test_a_last_line_that_an_editor_left_open(tmp_path):
    path = tmp_path / "details.csv"
    details.append(path, [detail("plain", 0)])
    path.write_text(path.read_text().rstrip("\n"))
    details.append(path, [detail("plain", 1)])
    assert [d.seed for d in details.read(path)] == [0, 1]
    assert trace.problems(path) == []


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from bestiary.shared.results import details
from bestiary.shared.results.details import Detail
path = Path(sys.argv[1])
lines = [Detail("t1", "row", "test/dice/", seed, "full", "c", "d", {"A" * 40: 0.5}) for seed in range(int(sys.argv[3]))]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 150, resource.RLIM_INFINITY))
try:
    details.append(path, lines)
except OSError as error:
    print("refused", path.stat().st_size == size)
"""


@pytest.mark.parametrize("count", [2, 40])
def test_a_file_that_cannot_grow_keeps_what_it_held(tmp_path, root, count):
    path = tmp_path / "details.csv"
    details.append(path, [detail("plain", 0)])
    before = path.read_bytes()
    words = [sys.executable, "-c", FULL, str(path), str(root / "src"), str(count)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "refused True", done.stderr
    assert path.read_bytes() == before
    assert trace.problems(path) == []
