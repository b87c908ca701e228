"""What the tests on a GPU share: they are skipped without one, and runs are killed in the middle."""

import signal
import subprocess
import sys

import pytest

KILLED = """
import builtins, os, runpy, signal, sys
said, seen = builtins.print, sys.argv[1]
def spoken(*words, **options):
    said(*words, **options)
    if seen in " ".join(map(str, words)):
        os.kill(os.getpid(), signal.SIGKILL)
builtins.print = spoken
sys.argv[:] = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(autouse=True)
def gpu():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU here")


@pytest.fixture
def train_until(root, clean_env, tmp_path):
    """`train_until("train 4/8", *arguments)` runs tools/train.py and kills it when it has printed that."""

    def run(printed, *arguments):
        command = [sys.executable, "-c", KILLED, printed, str(root / "tools" / "train.py"), *arguments]
        killed = subprocess.run(command, cwd=tmp_path, env=clean_env(), capture_output=True, text=True, timeout=300)
        assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr

    return run
