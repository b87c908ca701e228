"""`make wheel`'s file, in an environment that has torch alone, no compiler and no network."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from bestiary.kernels.backends import native

SITE = Path(torch.__file__).parents[1]
# torch and what it imports itself; the rest of this machine's packages stays out
TORCH = (
    *("torch", "torchgen", "functorch", "nvidia", "triton", "typing_extensions.py", "sympy", "mpmath"),
    *("networkx", "jinja2", "markupsafe", "filelock", "fsspec"),
)

RUN = """
import importlib.util, sys
for name in ("numpy", "safetensors"):
    sys.modules[name] = None
import torch
import bestiary.kernels as kernels
from bestiary.kernels.backends import native
assert importlib.util.find_spec("lightning") is None and importlib.util.find_spec("transformers") is None
assert kernels.__file__.startswith(sys.argv[1]), kernels.__file__
for name in native.isas():
    assert native.library(name) == native.PREBUILT / f"bestiary_{name}.so", native.library(name)
torch.manual_seed(0)
u, delta, z = (torch.randn(2, 17, 70, requires_grad=True) for _ in range(3))
A, B, C = -torch.rand(17, 16), torch.randn(2, 16, 70), torch.randn(2, 16, 70)
grads = []
for backend in ("cpu", "reference"):
    out = kernels.selective_scan_fn(u, delta, A, B, C, z=z, delta_softplus=True, backend=backend)
    grads.append([out, *torch.autograd.grad(out.square().sum(), (u, delta, z))])
for a, b in zip(*grads):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
assert kernels.backend_report()["selective_scan"]["uses"] == "cpu"
print("ran", native.isa())
"""


def symbols(library: Path) -> list[str]:
    """The undefined dynamic symbols, without versions."""
    text = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    return [line.split()[-1].split("@")[0] for line in text.stdout.splitlines()]


def foreign(names: list[str]) -> list[str]:
    """Symbols of what changes from one torch or Python to the next. C++ names are mangled: at:: is N2at, c10 N3c10."""
    ours = ("aoti_torch_", "torch_")
    torn = re.compile(r"^_?Py|^TH|N[KVRO]*(2at|3c10|5torch|8pybind11)\d")
    return [name for name in names if not name.startswith(ours) and torn.search(name)]


@pytest.mark.skipif(not shutil.which("nm"), reason="nm (binutils) is not on this machine")
@pytest.mark.skipif(native.why_absent() is not None, reason="no C++ kernels here")
def test_the_library_needs_torchs_c_symbols_alone():
    names = symbols(native.library(native.isa()))
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in names)
    assert foreign(names) == []
    unknown = [n for n in names if not n.startswith(("aoti_torch_", "torch_", "_Z", "__"))]
    # the C library's own: memcpy, expf …; nothing of OpenMP, MKL or CUDA
    assert not [n for n in unknown if n.startswith(("GOMP", "omp_", "kmp", "mkl", "cblas", "cuda"))]


def test_a_planted_torch_symbol_is_caught():
    planted = [
        "_ZN2at5emptyE",
        "_Z1fRKN2at6TensorE",
        "_ZNK3c1010TensorImpl4sizeEv",
        "PyObject_Call",
        "_ZN5torch3jit3fooE",
    ]
    assert foreign([*planted, "aoti_torch_get_dim", "torch_parallel_for", "memcpy", "_ZNSt6vectorIlE2atEm"]) == planted


@pytest.fixture(scope="module")
def wheel(root, clean_env, tmp_path_factory) -> Path:
    """`make wheel` in a copy of the tree."""
    pytest.importorskip("build")
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for name in ("src", "kernels", "shared", "projects", "conf"):
        shutil.copytree(root / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "Makefile"):
        shutil.copy(root / name, copy / name)
    venv = Path(sys.executable).parents[1]
    command = ["make", "wheel", f"VENV={venv}", "-o", str(venv / ".dev")]
    result = subprocess.run(command, cwd=copy, env=clean_env(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert list(copy.rglob("*.so")) == []
    return next((copy / "dist").glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_runs_where_torch_is_alone(wheel, tmp_path):
    isas = ["avx2", "avx512", "portable"] if platform.machine() in ("x86_64", "AMD64") else ["portable"]
    assert "-cp311-abi3-" in wheel.name
    assert wheel.name.endswith(f"{platform.machine()}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    libraries = [name for name in names if name.endswith(".so")]
    assert sorted(libraries) == [f"bestiary/kernels/csrc/lib/bestiary_{name}.so" for name in isas]

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = tmp_path / "venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    only = tmp_path / "only_torch"
    only.mkdir()
    for name in TORCH:
        if (SITE / name).exists():
            (only / name).symlink_to(SITE / name)
    (site / "torch.pth").write_text(f"{only}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)

    home = tmp_path / "home"
    home.mkdir()
    env = {
        "PATH": "",
        "HOME": str(home),
        "BESTIARY_CACHE": str(home / "cache"),
        "BESTIARY_NATIVE": "require",
    }
    result = subprocess.run(
        [str(python), "-W", "ignore", "-c", RUN, str(site)], cwd=home, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "building" not in result.stderr
    assert list(home.iterdir()) == []  # nothing was built or cached
