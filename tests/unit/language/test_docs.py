"""What docs/language.md names exists, and its example runs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


@pytest.fixture
def text(root):
    return (root / "docs" / "language.md").read_text(encoding="utf-8")


def test_the_example_runs(text, clean_env, root):
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    env = clean_env(PYTHONPATH=str(root / "src"))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr


def test_every_language_backbone_is_in_the_table(text, root):
    table = text[text.index("| `backbone=` |") : text.index("The totals are counted")]
    files = [p for p in (root / "conf" / "backbone").glob("*.yaml") if "\nkind: lm" in p.read_text()]
    assert len(files) > 15
    # Of a family the first is written out: `nemotron_h_4b`, `_8b`, …
    family = re.compile(r"_\d+b(_base)?$")
    lacking = [p.stem for p in files if f"`{p.stem}`" not in table and f"`{family.sub('', p.stem)}_" not in table]
    assert lacking == []


def test_files_it_names_exist(text, root):
    paths = set(re.findall(r"`((?:shared|tests|tools|conf)/[\w/.]+\.(?:py|yaml))`", text))
    assert len(paths) > 8
    assert [p for p in sorted(paths) if not (root / p).exists()] == []
