"""The wheel: bestiary and nothing else, every module under one name."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def wheel_problems(wheel: Path) -> list[str]:
    """Anything in a wheel that is not a real file below `bestiary/` (or the wheel's own dist-info)."""
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
    problems = []
    for entry in entries:
        top = entry.filename.split("/")[0]
        if top != "bestiary" and not top.endswith(".dist-info"):
            problems.append(f"top level {top}: {entry.filename}")
        if (entry.external_attr >> 16) & 0o170000 == 0o120000:
            problems.append(f"a symlink: {entry.filename}")
    return problems


@pytest.fixture(scope="module")
def wheel(copy_tree, tmp_path_factory) -> Path:
    pytest.importorskip("setuptools")
    copy = copy_tree(tmp_path_factory.mktemp("checkout"))
    if not (copy / "README.md").exists():
        (copy / "README.md").write_text("# bestiary\n")
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    out = copy / "dist"
    out.mkdir()
    result = subprocess.run([sys.executable, "-c", code, str(out)], cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return next(out.glob("*.whl"))


def test_the_wheel_holds_bestiary_and_real_files(wheel, root):
    assert wheel_problems(wheel) == []
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    here = {
        f"bestiary/{path.relative_to(root)}"
        for room in ("kernels", "shared", "projects", "conf")
        for pattern in ("*.py", "*.yaml", "*.csv", "*.cpp", "*.h")
        for path in (root / room).rglob(pattern)
        if not path.is_relative_to(root / "conf" / "local")
    }
    assert sorted(here - names) == []
    assert "bestiary/py.typed" in names


def test_a_planted_second_top_level_is_caught(tmp_path):
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bestiary/__init__.py", "")
        archive.writestr("kernels/__init__.py", "")
        link = zipfile.ZipInfo("bestiary/conf")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "../../conf")
    assert len(wheel_problems(path)) == 2


ONE_NAME = """
import collections, importlib, os, pkgutil, sys
import bestiary
assert os.path.realpath(bestiary.__file__).startswith(os.path.realpath(sys.argv[1])), bestiary.__file__
for info in pkgutil.walk_packages(bestiary.__path__, "bestiary."):
    try:
        importlib.import_module(info.name)
    except ImportError as error:  # an optional dependency that is not installed here
        print("skipped", info.name, error)
files = collections.defaultdict(list)
for name, module in list(sys.modules.items()):
    if getattr(module, "__file__", None) and os.path.realpath(module.__file__).startswith(sys.argv[1]):
        files[os.path.realpath(module.__file__)].append(name)
twice = {f: n for f, n in files.items() if len(n) > 1}
assert not twice, twice
assert not {"kernels", "shared", "projects", "conf"} & set(sys.modules)
assert len(files) > 10, files
"""


@pytest.mark.slow
def test_each_module_of_the_wheel_loads_under_one_name(wheel, clean_env, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    site = str((tmp_path / "site").resolve())
    env = clean_env(PYTHONPATH=site, BESTIARY_NATIVE="off")
    result = subprocess.run(
        [sys.executable, "-c", ONE_NAME, site], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
