"""Research scripts under the shim, each in a process of its own."""

import subprocess
import sys

import pytest


@pytest.fixture
def shim(tmp_path, root, clean_env):
    """`shim(*arguments)` is `python -m bestiary.kernels.shim`, in an empty folder."""

    def start(*arguments, env=None):
        command = [sys.executable, "-W", "error::RuntimeWarning:runpy", "-m", "bestiary.kernels.shim"]
        return subprocess.run(
            [*command, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
            env=clean_env(**{"PYTHONPATH": str(root / "src")} | (env or {})),
        )  # fmt: skip

    return start


@pytest.fixture
def run(shim, tmp_path):
    """`run(text, *args)` writes a script and runs it under the shim."""

    def start(text, *args, options=(), env=None):
        (tmp_path / "script.py").write_text(text)
        return shim(*options, tmp_path / "script.py", *args, env=env)

    return start
