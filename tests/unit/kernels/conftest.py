"""What the tests of the kernels share: the backends that run here, and oracles that others wrote."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest

from bestiary.kernels.backends import why_absent


def usable(op: str) -> list[str]:
    """The backends that can run `op` on this machine's CPU."""
    return [name for name in ("reference", "cpu") if why_absent(op, name) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` runs once for each backend of its module's `OP`."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", usable(metafunc.module.OP))


def _loaded(folder: str, name: str, stubs: dict[str, Any], wanted: list[str]) -> dict[str, Any]:
    """Modules of a package that was unpacked and not installed, with stubs for what a machine without a GPU lacks.

    The package's own __init__ is not run. Nothing of it stays in sys.modules, where others would take it for an
    installed one.
    """
    package = ModuleType(name)
    package.__path__ = [f"{folder}/{name}"]
    before = dict(sys.modules)
    with patch.dict(sys.modules, {name: package} | stubs):
        for module in wanted:
            importlib.import_module(f"{name}.{module}")
        return {k: v for k, v in sys.modules.items() if before.get(k) is not v}


@pytest.fixture(scope="session")
def upstream(need_asset) -> SimpleNamespace:
    """The pure PyTorch functions of mamba-ssm and causal-conv1d, as their authors wrote them.

    Their Triton kernels are there in name only, and where the functions call CUDA they get each other instead.
    """
    folders = need_asset("causal_conv1d"), need_asset("mamba_ssm")
    pytest.importorskip("einops")
    triton = MagicMock(__version__="3.0.0")
    triton.Config = lambda kwargs, **_: SimpleNamespace(kwargs=kwargs)
    triton.autotune = lambda configs, **_: lambda kernel: SimpleNamespace(configs=configs)
    stubs: dict[str, Any] = {"triton": triton, "triton.language": triton.language, "selective_scan_cuda": MagicMock()}
    cpp = {"causal_conv1d.cpp_functions": MagicMock()}
    modules = _loaded(str(folders[0]), "causal_conv1d", stubs | cpp, ["causal_conv1d_interface"])
    conv = modules["causal_conv1d.causal_conv1d_interface"]
    package = modules["causal_conv1d"]
    package.causal_conv1d_fn, package.causal_conv1d_update = conv.causal_conv1d_ref, conv.causal_conv1d_update_ref
    wanted = ["ops.selective_scan_interface", "ops.triton.selective_state_update", "ops.triton.ssd_combined"]
    wanted += ["ops.triton.layernorm_gated", "modules.ssd_minimal"]
    norm_kernel = {"mamba_ssm.ops.triton.layer_norm": MagicMock()}  # it looks for a GPU when it is imported
    modules |= _loaded(str(folders[1]), "mamba_ssm", stubs | modules | norm_kernel, wanted)
    scan, ssd = modules["mamba_ssm.ops.selective_scan_interface"], modules["mamba_ssm.ops.triton.ssd_combined"]
    norm = modules["mamba_ssm.ops.triton.layernorm_gated"]
    scan.selective_scan_fn = scan.selective_scan_ref
    ssd.rmsnorm_fn = norm.rms_norm_ref

    def public(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with patch.dict(sys.modules, modules):  # some import each other when they are called
                return function(*args, **options)

        return call

    return SimpleNamespace(
        causal_conv1d_ref=public(conv.causal_conv1d_ref),
        causal_conv1d_update_ref=public(conv.causal_conv1d_update_ref),
        mamba_inner_ref=public(scan.mamba_inner_ref),
        mamba_split_conv1d_scan_ref=public(ssd.mamba_split_conv1d_scan_ref),
        rms_norm_gated_ref=public(norm.rms_norm_ref),
        selective_scan_ref=public(scan.selective_scan_ref),
        selective_state_update_ref=public(
            modules["mamba_ssm.ops.triton.selective_state_update"].selective_state_update_ref
        ),
        ssd_chunk_scan_combined_ref=public(ssd.ssd_chunk_scan_combined_ref),
        ssd_minimal_discrete=public(modules["mamba_ssm.modules.ssd_minimal"].ssd_minimal_discrete),
        ssd_selective_scan=public(ssd.ssd_selective_scan),
    )
