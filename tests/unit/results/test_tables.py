"""The schema of tables, the committed tables, and the join."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from bestiary.shared.core import config
from bestiary.shared.core.errors import UserError
from bestiary.shared.results import join, measured, render, tables

GOOD = {
    "schema": 1,
    "paper": {"title": "A paper", "arxiv": "2508.07237", "version": "v1", "table": "Table 1"},
    "protocol": {"dataset": "toy", "split": "test", "metric": "Dice", "version": 1},
    "metrics": [
        {
            "key": "dice",
            "unit": "fraction",
            "higher_is_better": True,
            "decimals": 3,
            "tolerance": {"abs": 0.005, "basis": "paper std"},
        }
    ],
    "rows": [
        {
            "id": "ours",
            "label": "Ours",
            "ours": True,
            "overrides": ["+project=asm_unet"],
            "published": {"dice": 0.912},
            "source": "Table 1",
            "tier": "small",
        },
        {"id": "theirs", "label": "U-Net", "ours": False, "overrides": None, "published": {"dice": 0.9}, "source": "T1",
         "tier": "full"},
    ],
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def make(data, name: str = "t1") -> Path:
        path = tmp_path / "projects" / "asm_unet" / "tables" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
        return path

    return make


def measurement(**changes) -> measured.Measurement:
    values = {
        "table": "t1", "row": "ours", "metric": "dice", "value": 0.91, "n_seeds": 3, "std": 0.002, "seeds": "0 1 2",
        "commit": "abc", "dirty": False, "config_hash": "h", "overrides": "+project=asm_unet", "data_revision": "d",
        "torch": "2.14", "device": "cpu", "wall_s": 1.5, "peak_gb": None, "date": "2026-01-01T00:00:00Z",
        "scope": "full",
    }  # fmt: skip
    return measured.Measurement(**{**values, **changes})


def test_a_good_table_is_read(write):
    table = tables.read_table(write(GOOD))
    assert table.ref == "asm_unet/t1"
    assert table.title == "A paper"
    assert [row.runnable for row in table.rows] == [True, False]
    assert table.metrics[0].reads == "dice"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(schema=2), "schema is 2"),
        (lambda t: t.update(row=[]), "unknown key 'row'; did you mean 'rows'"),
        (lambda t: t.pop("protocol"), "the file lacks protocol"),
        (lambda t: t["protocol"].pop("version"), "protocol lacks version"),
        (lambda t: t["metrics"][0].update(tolerance={"abs": 0.1}), r"metrics\[0\].tolerance lacks basis"),
        (lambda t: t["metrics"][0]["tolerance"].update(abs=-1), "must not be negative"),
        (lambda t: t["metrics"].append(t["metrics"][0]), "has 'dice' twice"),
        (lambda t: t["metrics"][0].update(decimals="two"), "decimals must be a whole number"),
        (lambda t: t["rows"][0].update(published={"dise": 0.9}), "unknown key 'dise'; did you mean 'dice'"),
        (lambda t: t["rows"][0].update(published={"dice": "0.9"}), "must be a number, not '0.9'"),
        (lambda t: t["rows"][0].update(published={"dice": float("nan")}), "must be a number"),
        (lambda t: t["rows"][0].pop("source"), "every published value names where"),
        (lambda t: t["rows"][0].update(overrides="+project=x"), "must be null or a list"),
        (lambda t: t["rows"][0].update(function="bestiary.x:f"), "both overrides and a function"),
        (lambda t: t["rows"][0].update(tier="huge"), "tier must be one of smoke, small, full"),
        (lambda t: t["rows"][0].update(scope="half"), "must be 'full' or 'reduced: what'"),
        (lambda t: t["rows"][1].update(id="ours"), "has 'ours' twice"),
        (lambda t: t["rows"][0].update(after=t["rows"][1]["id"]), "must be an earlier row that is trained"),
        (lambda t: t.update(rows=[]), "rows must be a list with at least one"),
    ],
)
def test_a_bad_table_is_named(write, change, message):
    data = copy.deepcopy(GOOD)
    change(data)
    path = write(data)
    with pytest.raises(tables.TableError, match=message) as error:
        tables.read_table(path)
    assert str(path) in str(error.value)
    assert error.value.exit_code == 3


def test_text_that_is_not_yaml_is_named(write):
    with pytest.raises(tables.TableError, match="not valid YAML"):
        tables.read_table(write("rows: [\n"))


def test_an_unknown_table_or_row_names_the_nearest(write, tmp_path):
    table = tables.read_table(write(GOOD))
    with pytest.raises(UserError, match="did you mean 'ours'"):
        table.row("our")
    with pytest.raises(UserError, match="did you mean 'asm_unet/t1'"):
        tables.load_table(tmp_path / "projects", "asm_unet/t2")


def test_the_committed_tables_are_well_formed(root):
    paths = tables.find_tables(root / "projects")
    assert paths
    for table in map(tables.read_table, paths):
        lines = measured.read(root / "projects" / table.project / "results" / "measured.csv")
        assert join.orphans(table, lines) == []


def test_the_overrides_of_committed_tables_compose(root):
    for table in map(tables.read_table, tables.find_tables(root / "projects")):
        for row in table.rows:
            if row.overrides is not None:
                config.compose([*row.overrides])


@pytest.mark.parametrize(
    ("changes", "verdict", "difference"),
    [
        ({"value": 0.917}, "match", 0.005),
        ({"value": 0.918}, "above", 0.006),
        ({"value": 0.906}, "below", -0.006),
        ({"value": 0.912, "scope": "reduced: 3 steps"}, "reduced: 3 steps", None),
    ],
)
def test_verdicts(write, changes, verdict, difference):
    cells = join.join(tables.read_table(write(GOOD)), [measurement(**changes)])
    assert cells[0].verdict == verdict
    assert cells[0].difference == (difference if difference is None else pytest.approx(difference))
    assert cells[1].verdict == "blocked: quoted from others"


def test_nothing_measured_is_no_number(write):
    cells = join.join(tables.read_table(write(GOOD)), [])
    assert cells[0].verdict == "not run"
    assert render.lines_of(cells)[0][3:5] == ("-", "-")


def test_nothing_published_is_not_a_match(write):
    data = copy.deepcopy(GOOD)
    data["rows"][0]["published"] = {"dice": None}
    cells = join.join(tables.read_table(write(data)), [measurement()])
    assert cells[0].verdict == "no published value"
    assert cells[0].difference is None


def test_the_last_full_measurement_counts(write):
    table = tables.read_table(write(GOOD))
    lines = [measurement(value=0.5), measurement(value=0.6), measurement(value=0.7, scope="reduced: x")]
    assert join.join(table, lines)[0].measured.value == 0.6
    assert join.join(table, lines[2:])[0].measured.value == 0.7


def test_a_reduced_number_always_carries_the_word(write):
    table = tables.read_table(write(GOOD))
    cells = join.join(table, [measurement(scope="reduced: 3 steps")])
    for text in (render.to_terminal(table, cells), render.to_markdown(table, cells)):
        line = next(line for line in text.splitlines() if "0.910" in line)
        assert "(reduced, n=3)" in line
        assert "reduced: 3 steps" in line


def test_rendering(write):
    table = tables.read_table(write(GOOD))
    cells = join.join(table, [measurement(value=0.9173)])
    assert "| Ours | 0.917 ± 0.002 (n=3); published 0.912, above |" in render.to_markdown(table, cells)
    assert "0.917 ± 0.002 (n=3)" in render.to_terminal(table, cells)
    tiny = join.join(table, [measurement(value=0.9119999)])
    assert render.lines_of(tiny)[0][4:] == ("0.000", "match")


def test_a_readme_block_is_replaced():
    text = "before\n<!-- table a/b -->\nold\n<!-- /table -->\nafter\n"
    assert render.blocks(text) == {"a/b": "old"}
    new = render.with_block(text, "a/b", "| x |\n| \\1 |")
    assert new == "before\n<!-- table a/b -->\n| x |\n| \\1 |\n<!-- /table -->\nafter\n"
    with pytest.raises(UserError, match="no block"):
        render.with_block(text, "a/c", "x")
