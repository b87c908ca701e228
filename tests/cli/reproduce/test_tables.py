"""tools/reproduce.py list, show, report, check and adopt."""

from __future__ import annotations

import json

import pytest


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


@pytest.mark.parametrize("change", [("0.900", "0.950"), ("| Good |", "| Better |"), ("n=1", "n=3")])
def test_check_names_the_cell_of_a_readme_that_was_changed(reproduce, zoo, change):
    readme = zoo / "projects" / "toy" / "README.md"
    readme.write_text("# toy\n<!-- table toy/t1 -->\n<!-- /table -->\n")
    reproduce("run", "toy/t1", "--row", "good")
    assert reproduce("check", "--write").returncode == 0
    readme.write_text(readme.read_text().replace(*change))
    result = reproduce("check")
    assert result.returncode == 3
    assert str(readme) in result.stderr
    assert "row 'Good', " + ("label" if "Good" in change[0] else "dice") in result.stderr
    assert change[1].strip("| ") in result.stderr


def test_check_names_a_measurement_that_was_changed(reproduce, zoo):
    readme = zoo / "projects" / "toy" / "README.md"
    readme.write_text("# toy\n<!-- table toy/t1 -->\n<!-- /table -->\n")
    reproduce("run", "toy/t1", "--row", "good")
    reproduce("check", "--write")
    file = zoo / "projects" / "toy" / "results" / "measured.csv"
    file.write_text(file.read_text().replace(",0.9,", ",0.95,"))
    before = readme.read_text()
    for args in (["check"], ["check", "--write"]):  # the README is not brought up to what was never measured
        result = reproduce(*args)
        assert result.returncode == 3
        assert f"{file}:2: t1/good dice was changed after it was measured" in result.stderr
    assert readme.read_text() == before
    result = reproduce("adopt", "toy")
    assert result.returncode == 2
    assert "nothing is adopted" in result.stderr
    file.unlink()
    result = reproduce("check")
    assert result.returncode == 3
    assert f"{file}: is gone" in result.stderr


def test_a_line_without_a_trace_is_adopted_once(reproduce, zoo):
    reproduce("run", "toy/t1", "--row", "good")
    (zoo / "projects" / "toy" / "results" / "measured.sha256").unlink()
    result = reproduce("check")
    assert result.returncode == 3
    assert "measured.csv:2: t1/good dice has no trace" in result.stderr
    result = reproduce("adopt", "toy")
    assert result.returncode == 0, result.stderr
    assert "t1/good dice" in result.stdout
    assert reproduce("check").returncode == 0


def test_report_for_programs(reproduce, change):
    change(good={"needs": {"gpus": 0, "data": "public"}}, sealed={"blocked": "data", "needs": {"data": "request"}})
    reproduce("run", "toy/t1", "--row", "good", "--seeds", "0,1")
    result = reproduce("report", "toy/t1", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["table"], found["protocol"]["dataset"]) == ("toy/t1", "toy")
    cells = {cell["row"]: cell for cell in found["cells"]}
    assert cells["good"]["verdict"] == "match"
    assert cells["good"]["measured"]["value"] == pytest.approx(0.905)
    assert cells["good"]["measured"]["seeds"] == "0 1"
    assert cells["good"]["needs"] == {"gpus": 0, "data": "public"}
    assert (cells["off"]["measured"], cells["off"]["verdict"], cells["off"]["difference"]) == (None, "not run", None)
    assert cells["sealed"]["verdict"] == "blocked: data"
    assert "blocked: data" in reproduce("report", "toy/t1").stdout
    assert reproduce("report", "toy/t1", "--json", "--markdown").returncode == 2
    assert reproduce("run", "toy/t1", "--row", "sealed").returncode == 2


def test_the_committed_tables_check(run_tool):
    result = run_tool("reproduce", "check")
    assert result.returncode == 0, result.stderr
