"""Which backend runs, what the others' reasons are, and what importing costs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bestiary.kernels as kernels
from bestiary.kernels import backends

SRC = Path(kernels.__file__).parents[2]
OPS = {"selective_scan", "causal_conv1d", "scan_order"}


def call(**options):
    x = torch.randn(1, 2, 5)
    return kernels.causal_conv1d_fn(x, torch.randn(2, 4), **options)


def test_report_names_every_backend_with_a_reason(monkeypatch):
    monkeypatch.delenv("BESTIARY_KERNELS", raising=False)
    report = kernels.backend_report()
    assert set(report) >= OPS
    for row in report.values():
        assert row["uses"] in backends.BACKENDS
        assert {row["uses"], *row["others"]} == set(backends.BACKENDS)
        assert all(row["others"].values())


def test_environment_picks(monkeypatch):
    monkeypatch.setenv("BESTIARY_KERNELS", "reference")
    assert all(row["uses"] == "reference" for row in kernels.backend_report().values())
    call()
    monkeypatch.setenv("BESTIARY_KERNELS", "fast")
    with pytest.raises(ValueError, match="BESTIARY_KERNELS=fast is no backend; there are auto, reference"):
        call()


def test_a_missing_backend_says_why(monkeypatch):
    monkeypatch.setitem(backends._PROBES, ("causal_conv1d", "triton"), lambda: "no GPU in this test")
    monkeypatch.setitem(backends._IMPLEMENTATIONS["causal_conv1d"], "triton", "no_such_module:nothing")
    with pytest.raises(kernels.BackendUnavailableError, match="no GPU in this test"):
        call(backend="triton")
    monkeypatch.setenv("BESTIARY_KERNELS", "triton")
    with pytest.raises(kernels.BackendUnavailableError, match="no GPU in this test"):
        call()
    row = kernels.backend_report()["causal_conv1d"]
    assert row["uses"] is None
    assert row["others"]["triton"] == "no GPU in this test"


def test_a_registered_backend_is_used(monkeypatch):
    monkeypatch.delenv("BESTIARY_KERNELS", raising=False)
    monkeypatch.setattr(backends, "_IMPLEMENTATIONS", {k: dict(v) for k, v in backends._IMPLEMENTATIONS.items()})
    monkeypatch.setattr(backends, "_PROBES", {})
    backends.register("causal_conv1d", "cpu", "operator:concat", lambda: None)
    assert backends.choose_backend("causal_conv1d", "auto") == "cpu"
    assert kernels.backend_report()["causal_conv1d"]["others"]["reference"] == "available"
    with pytest.raises(ValueError, match="unknown backend"):
        backends.register("causal_conv1d", "tpu", "x:y")


def test_every_public_name_exists():
    assert set(kernels.__all__) <= set(dir(kernels))
    for name in kernels.__all__:
        assert getattr(kernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        kernels.nothing  # noqa: B018


def test_import_is_light_and_the_kernels_need_torch_alone():
    code = (
        "import sys\n"
        "sys.modules['numpy'] = None\n"
        "import bestiary, bestiary.kernels\n"
        "assert 'torch' not in sys.modules\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "from bestiary.kernels import selective_scan_fn, backend_report\n"
        "import torch\n"
        "x = torch.ones(1, 2, 3)\n"
        "selective_scan_fn(x, x, -torch.ones(2, 4), torch.ones(1, 4, 3), torch.ones(1, 4, 3))\n"
        "heavy = {'transformers', 'monai', 'hydra', 'lightning', 'bestiary.shared', 'torch._dynamo'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SRC, env={"PYTHONPATH": str(SRC), "PATH": ""})


def test_no_init_at_the_root_and_no_folder_named_like_a_function():
    root = SRC.parent / "kernels"
    assert not (root / "__init__.py").exists()
    names = {path.stem for path in root.rglob("*") if path.name != "__init__.py"}
    assert not names & set(kernels.__all__)
    for name in (*OPS, "backends"):
        link = SRC / "bestiary" / "kernels" / name
        assert link.is_symlink()
        assert not Path(str(link.readlink())).is_absolute()
