"""What every test gets: one thread, no network, no display, and the fixtures below.

Tests import nothing from `tests`: an installed package may bear that name. What they share is a fixture.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Set before torch or matplotlib load, and inherited by every subprocess.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)

_connect = socket.socket.connect
_connect_ex = socket.socket.connect_ex
_LOOPBACK = ("127.", "::1", "localhost", "::ffff:127.")


def _blocked(sock: socket.socket, address) -> bool:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return not str(address[0]).startswith(_LOOPBACK)


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections beyond this machine, except in tests marked `network`."""
    if request.node.get_closest_marker("network"):
        return

    def guarded(original: Callable) -> Callable:
        def connect(sock: socket.socket, address, *args):
            if _blocked(sock, address):
                raise RuntimeError(f"a test tried to reach {address}: tests run offline (mark it `network` if it must)")
            return original(sock, address, *args)

        return connect

    monkeypatch.setattr(socket.socket, "connect", guarded(_connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(_connect_ex))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Hold torch to one thread where a test module has loaded it: results are the same on every machine."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def clean_env() -> Callable[..., dict[str, str]]:
    """An environment for subprocesses: `clean_env(NAME="value", …)` adds to it, `NAME=None` removes.

    It carries nothing of this session's settings of bestiary, Hydra, W&B or PYTHONPATH.
    """

    def make(**changes: str | None) -> dict[str, str]:
        ours = ("BESTIARY_RUNS", "BESTIARY_KERNELS", "BESTIARY_NATIVE", "BESTIARY_ISA")
        dropped = (*ours, "PYTHONPATH", "HYDRA_FULL_ERROR", "WANDB_API_KEY")
        env = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("PYTEST_")}
        env["COLUMNS"] = "120"
        for key, value in changes.items():
            if value is None:
                env.pop(key, None)
            else:
                env[key] = value
        return env

    return make


@pytest.fixture
def run_tool(tmp_path: Path, clean_env) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_tool("train", "+project=asm_unet", …)` runs tools/train.py in a subprocess.

    The working directory is the test's temporary folder unless `cwd=` says otherwise, `BESTIARY_RUNS` points into
    it, so that no run lands in the repository, and `env={…}` changes the environment further.
    """

    def run(
        name: str, *args: object, cwd: Path | None = None, timeout: float = 240, env: dict | None = None
    ) -> subprocess.CompletedProcess[str]:
        settings: dict[str, str | None] = {"BESTIARY_RUNS": str(tmp_path / "runs"), **(env or {})}
        return subprocess.run(
            [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, args)],
            cwd=cwd or tmp_path,
            env=clean_env(**settings),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def need_asset() -> Callable[[str], Path]:
    """`need_asset("icbm152")` is the asset's path; where it is missing the test is skipped with the fetch command."""

    def need(name: str) -> Path:
        from bestiary.shared.data import assets

        if not assets.is_present(name):
            pytest.skip(f"{name} is not on this machine; get it with: python tools/fetch.py {name}")
        return assets.asset_path(name)

    return need
