"""The kernels' benchmark: it runs, and what is wrong gets no time."""

import json

import pytest
import torch

from bestiary.shared.testing import bench


def test_it_writes_rows_and_targets(run_tool, tmp_path):
    result = run_tool("bench_kernels", "--smoke", "--rounds", "1", "--only", "conv,update", "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr[-3000:]
    (file,) = (tmp_path / "out").glob("kernels_*.json")
    found = json.loads(file.read_text())
    assert {"commit", "torch", "date", "processor", "roofs", "rows", "targets"} <= set(found)
    assert all(row["check"] == "green" and row["cpu_ms"] > 0 for row in found["rows"])
    met = {row["target"]: row["met"] for row in found["targets"]}
    assert met["scan fwd+bwd, pscan"] is None
    assert met["state update over a copy"] is not None
    assert "not measured" in result.stdout


def test_an_unknown_part_is_named(run_tool):
    result = run_tool("bench_kernels", "--only", "scan,matmul")
    assert result.returncode == 2
    assert "no matmul; there are scan" in result.stderr


@pytest.mark.parametrize("wrong", [lambda x: x + 1e-3, lambda x: x[:2], lambda x: x * float("nan")])
def test_what_is_wrong_gets_no_time(wrong):
    x, lines = torch.ones(4), []
    rows = bench.race("case", {"right": lambda: [x], "wrong": lambda: [wrong(x)]}, [x], 1, say=lines.append)
    assert rows[0]["check"] == "green"
    assert "cpu_ms" in rows[0]
    assert rows[1]["check"] == "red"
    assert "cpu_ms" not in rows[1]
    assert "no time" in lines[1]
