"""What docs/kernels.md says of ours has a test, and its example runs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


@pytest.fixture
def text(root):
    return (root / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_every_feature_names_a_test_that_exists(text, root):
    table = text[text.index("## Features") :]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("|")][2:]
    claimed = [row for row in rows if row[1].strip()[0] in "yp"]
    assert len(claimed) > 15
    for row in claimed:
        file, name = re.fullmatch(r"`(\w+\.py)::(\w+)`", row[-1].strip()).groups()
        source = (root / "tests" / "unit" / "kernels" / file).read_text(encoding="utf-8")
        assert f"\ndef {name}(" in source, f"{row[0].strip()}: {file} has no {name}"


def test_the_functions_of_the_table_exist(text):
    import bestiary.kernels

    table = text[text.index("| function |") : text.index("`scan_order` is")]
    names = re.findall(r"`(\w+_\w+)`", " ".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    assert len(names) > 12
    assert set(names) <= set(bestiary.kernels.__all__)


def test_the_example_runs(text, clean_env):
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env())
    assert result.returncode == 0, result.stderr
