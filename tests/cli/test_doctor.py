"""tools/doctor.py: says what is missing and how to mend it, whatever is missing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def module(root):
    spec = importlib.util.spec_from_file_location("doctor_script", root / "tools" / "doctor.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_base_works_here(run_tool):
    result = run_tool("doctor")
    assert result.returncode == 0, result.stdout
    assert "The base works." in result.stdout
    for title in ("Python", "Torch and devices", "Kernels", "Extras", "Assets", "Tracking", "Code", "Disk"):
        assert f"\n{title}\n" in "\n" + result.stdout
    assert "cannot say" not in result.stdout


def test_a_missing_torch_is_said_without_a_traceback(run_tool, tmp_path):
    (tmp_path / "broken" / "torch").mkdir(parents=True)
    (tmp_path / "broken" / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open')\n")
    result = run_tool("doctor", env={"PYTHONPATH": str(tmp_path / "broken")})
    assert result.returncode == 1
    assert "torch cannot be imported (OSError: libcudart.so.13: cannot open)" in result.stdout
    assert "pip install -e ." in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_credentials_are_never_shown(run_tool):
    result = run_tool("doctor", env={"WANDB_API_KEY": "very-secret-key"})
    assert "very-secret-key" not in result.stdout + result.stderr


def test_a_reader_may_leave_early(root):
    command = f"{sys.executable} tools/doctor.py | true"
    result = subprocess.run(command, shell=True, cwd=root, capture_output=True, text=True, timeout=300)
    assert "Error" not in result.stderr


def test_json(run_tool):
    found = json.loads(run_tool("doctor", "--json").stdout)
    assert found["problems"] == []
    assert found["sections"]["Python"]


def test_missing_and_old_packages(module):
    every = {"": ["numpy>=1"], "a": ["no-such-package>=2"], "b": ["bestiary[a]", "numpy>=99", "pytest<1 ,>=0"]}
    assert module.lacking(every[""], every) == []
    assert module.lacking(every["a"], every) == ["no-such-package"]
    found = module.lacking(every["b"], every)
    assert found[0] == "no-such-package"
    assert found[1].startswith("numpy ")
    assert found[1].endswith("(needs >=99)")
    assert len(found) == 3


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.14.1+cu130", ">=2.10", True),
        ("2.9", ">=2.10", False),
        ("1.3.8", ">=1.3.8,<1.4", True),
        ("1.4.0rc1", ">=1.3.8,<1.4", False),
        ("3", "", True),
    ],
)
def test_bounds(module, version, bounds, fits):
    assert module.satisfies(version, bounds) is fits
