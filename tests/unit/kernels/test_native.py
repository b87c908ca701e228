"""The C++ library: found, built once, or refused with a remedy. Each test asks a process of its own.

The compiler of most tests is a script that counts its calls and copies a library that was really built: what is tested
is the loader.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bestiary.kernels import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba2_step,
    rms_norm_gated,
    selective_scan_fn,
)
from bestiary.kernels.backends import native

needs_cpp = pytest.mark.skipif(native.why_absent() is not None, reason="no C++ kernels here")

SCAN = """
import torch
from bestiary.kernels import selective_scan_fn, causal_conv1d_fn
from bestiary.kernels.backends import native
torch.manual_seed(0)
u = torch.randn(1, 3, 9)
out = selective_scan_fn(u, u, -torch.ones(3, 4), torch.randn(1, 4, 9), torch.randn(1, 4, 9))
causal_conv1d_fn(u, torch.randn(3, 4))
print("ran", "cpu" if native._namespaces else "reference")
"""


@pytest.fixture
def python(root, clean_env, tmp_path):
    """`python(code, NAME=value)` runs code with an empty cache of its own; `start=True` does not wait for it."""

    def run(code: str = SCAN, *arguments: str, start: bool = False, **env: str | None):
        settings = {
            "PYTHONPATH": str(root / "src"),
            "HOME": str(tmp_path),
            "BESTIARY_CACHE": str(tmp_path / "cache"),
            "CXX": None,
        }
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=clean_env(**{**settings, **env}),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if start:
            return process
        out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture
def compiler(tmp_path):
    """`compiler(body)` is a compiler: a script that counts its calls, and by default copies a built library."""

    def make(body: str = 'sleep 1; cp "$library" "$out"') -> str:
        script, calls = tmp_path / "my c++", tmp_path / "calls"
        calls.touch()
        script.write_text(
            "#!/bin/sh\n"
            f"echo called >> '{calls}'\n"
            f"library='{native.library(native.isa())}'\n"
            'while [ $# -gt 0 ]; do [ "$1" = -o ] && out="$2"; shift; done\n'
            f"{body}\n"
        )
        script.chmod(0o755)
        return f"'{script}'"

    return make


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().split())


def test_settings(monkeypatch):
    for value in ("auto", "require", "off"):
        monkeypatch.setenv("BESTIARY_NATIVE", value)
        assert native.setting() == value
    monkeypatch.setenv("BESTIARY_NATIVE", "yes")
    with pytest.raises(ValueError, match="BESTIARY_NATIVE=yes is not known; there are auto, require, off"):
        selective_scan_fn(torch.ones(1, 1, 1), *[torch.ones(1, 1, 1)], *[torch.ones(1, 1)] * 3)


def test_an_unknown_instruction_set_is_one_clear_error(python):
    for value in ("avx3", "neon"):
        result = python(BESTIARY_ISA=value)
        assert result.returncode == 1
        lines = [line for line in result.stderr.splitlines() if line.startswith("ValueError")]
        assert lines == [f"ValueError: BESTIARY_ISA={value}: this machine runs {', '.join(native.isas())}"]


@needs_cpp
def test_prebuilt_comes_before_the_cache_and_the_cache_before_a_build(monkeypatch, tmp_path):
    name = native.isa()
    monkeypatch.setenv("BESTIARY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "PREBUILT", tmp_path / "lib")
    monkeypatch.setattr(native, "_compile", lambda command, log: Path(command[-1]).write_text("built"))
    built = native.library(name)
    assert built.read_text() == "built"
    assert built.is_relative_to(tmp_path / "cache" / "native")
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("built again"))
    assert native.library(name) == built
    (tmp_path / "lib").mkdir()
    prebuilt = tmp_path / "lib" / f"bestiary_{name}.so"
    prebuilt.write_text("prebuilt")
    assert native.library(name) == prebuilt


def test_the_sources_hold_no_library():
    assert list(native.SOURCES.rglob("*.so")) == []


@needs_cpp
def test_the_fingerprint_follows_sources_flags_and_compiler(monkeypatch, tmp_path):
    first = native._fingerprint("portable")
    assert native._fingerprint("portable") == first
    assert native._fingerprint("avx2") != first
    monkeypatch.setenv("CXX", "some-other-compiler")
    assert native._fingerprint("portable") != first
    monkeypatch.undo()
    for file in native.SOURCES.glob("*.[ch]*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    assert native._fingerprint("portable") == first
    with (tmp_path / "scan.h").open("a") as file:
        file.write("// changed\n")
    assert native._fingerprint("portable") != first


@needs_cpp
def test_two_processes_build_once_and_both_run(python, compiler, tmp_path):
    cxx = compiler()
    both = [python(start=True, CXX=cxx, BESTIARY_NATIVE="require") for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out == "ran cpu\n"
    assert calls(tmp_path) == 1
    warm = python(CXX=cxx, BESTIARY_NATIVE="require")
    assert (warm.returncode, warm.stdout, warm.stderr) == (0, "ran cpu\n", "")
    assert calls(tmp_path) == 1


@needs_cpp
def test_a_killed_build_leaves_no_half_file(python, compiler, tmp_path):
    cxx = compiler('printf half > "$out"; sleep 60')
    process = python(start=True, CXX=cxx)
    deadline = time.monotonic() + 60
    while not any(p.stat().st_size for p in tmp_path.rglob("*.part")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.rglob("*.part"))
    assert list(tmp_path.rglob("*.so")) == []
    compiler()  # the same command, so the same folder
    result = python(CXX=cxx, BESTIARY_NATIVE="require")
    assert result.stdout == "ran cpu\n", result.stderr
    assert list(tmp_path.rglob("*.part")) == []
    assert len(list(tmp_path.rglob("*.so"))) == 1


@needs_cpp
def test_an_interrupted_build_cleans_up(monkeypatch, tmp_path):
    def interrupted(command, log):
        Path(command[-1]).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "_compile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        native.build(native.isa(), tmp_path / "x" / "bestiary_x.so")
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["bestiary_x.lock"]


def failing(tmp_path, compiler, how) -> tuple[dict[str, str], str]:
    """Settings under which no library can be had, and what the message must say."""
    if how == "the compiler fails":
        return {"CXX": compiler("echo 'a.h:1:2: error: no such thing' >&2; exit 1")}, "set CXX to a C++17 compiler"
    if how == "CXX is missing":
        return {"CXX": "no-such-compiler -m64"}, "CXX=no-such-compiler -m64 is not found; unset it, or name a C++17"
    if how == "no compiler":
        return {"PATH": str(tmp_path)}, "no C++ compiler found; install one (Debian: apt-get install g++)"
    if how == "what is built does not load":
        return {"CXX": compiler('echo text > "$out"')}, "and start again, or set BESTIARY_NATIVE=off"
    (tmp_path / "file").touch()
    return {"BESTIARY_CACHE": str(tmp_path / "file" / "cache")}, "set BESTIARY_CACHE to a folder that can be written"


@needs_cpp
@pytest.mark.parametrize(
    "how",
    [
        "the compiler fails",
        "CXX is missing",
        "no compiler",
        "the cache cannot be written",
        "what is built does not load",
    ],
)
def test_without_a_library(how, python, compiler, tmp_path):
    env, message = failing(tmp_path, compiler, how)

    result = python(**env, BESTIARY_NATIVE="auto")  # falls back, and says so once
    assert result.returncode == 0, result.stderr
    assert result.stdout == "ran reference\n"
    warnings = [line for line in result.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warnings) == 1, result.stderr
    assert "bestiary runs its slow PyTorch kernels" in warnings[0]
    assert message in warnings[0]

    result = python(**env, BESTIARY_NATIVE="require")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "BuildError" in last
    assert message in last
    assert "RuntimeWarning" not in result.stderr

    result = python(**env, BESTIARY_NATIVE="off")
    assert (result.returncode, result.stdout, result.stderr) == (0, "ran reference\n", "")
    if how == "the compiler fails":
        assert "no such thing" in warnings[0]
        (log,) = tmp_path.rglob("*.log")
        assert "error: no such thing" in log.read_text()
        assert "bestiary_cpu.cpp" in log.read_text()


def test_no_home_folder_is_said(monkeypatch):
    monkeypatch.delenv("BESTIARY_CACHE", raising=False)

    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(native.BuildError, match="no home folder to build into; set BESTIARY_CACHE"):
        native.cache_folder()


def test_the_command_builds_ahead(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(native, "compiler", lambda: ["c++"])
    monkeypatch.setattr(native, "_compile", lambda command, log: Path(command[-1]).write_text("built"))
    assert native.main(["--isa", "all", "--out", str(tmp_path / "out")]) == 0
    names = native._ISA_FLAGS if native._x86() else ("portable",)
    assert {p.name for p in (tmp_path / "out").glob("*.so")} == {f"bestiary_{name}.so" for name in names}
    assert str(tmp_path / "out" / "bestiary_portable.so") in capsys.readouterr().out


# --- what the library computes -----------------------------------------------------------------------------------


def several_ops(channels: int = 37, length: int = 131, batch: int = 2) -> list[torch.Tensor]:
    """Outputs and all gradients of scan, convolution and norm; steps of the convolution and of Mamba-2."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).requires_grad_()

    x, delta, z = (rand(batch, channels, length) for _ in range(3))
    B, C = (rand(batch, 16, length) for _ in range(2))
    D, bias = rand(channels), rand(channels)
    weight = rand(channels, 4)
    A = (-torch.rand(channels, 16, generator=g) * 4 - 0.1).requires_grad_()
    out, last = selective_scan_fn(x, delta, A, B, C, D, z, bias, True, True, backend="cpu")
    conv = causal_conv1d_fn(x, weight, bias, activation="silu", backend="cpu")
    inputs = (x, delta, A, B, C, D, z, bias)
    norm = rms_norm_gated(x.transpose(1, 2), D, z.transpose(1, 2), 1e-3, backend="cpu")
    state = delta.detach()[..., :3].contiguous()
    step = causal_conv1d_update(x.detach()[..., 0], state, weight.detach(), None, "silu", backend="cpu")
    wide, past, ssm = rand(batch, 5 * channels + 16), rand(batch, 3, 2 * channels + 16), rand(batch, channels, 2, 8)
    parameters = rand(2 * channels + 16, 4), None, bias, A[:, 0], D, rand(2 * channels)
    with torch.no_grad():
        layer = mamba2_step(wide, past, ssm, *parameters, headdim=2, ngroups=1, backend="cpu")
    scan_grads = torch.autograd.grad(out.square().sum() + last.sum(), inputs)
    return [
        out.detach(),
        last.detach(),
        *scan_grads,
        conv.detach(),
        *torch.autograd.grad(conv.square().sum(), (x, weight, bias)),
        norm.detach(),
        *torch.autograd.grad(norm.square().sum(), (x, D, z)),
        step,
        state,
        layer,
        past.detach(),
        ssm.detach(),
    ]


@needs_cpp
@pytest.mark.parametrize("name", [n for n in native.isas() if n != native.isas()[0]])
def test_instruction_sets_agree(name, monkeypatch):
    monkeypatch.delenv("BESTIARY_ISA", raising=False)
    best = several_ops()
    monkeypatch.setenv("BESTIARY_ISA", name)
    assert native.isa() == name
    assert native.lanes() == native._LANES[name]
    for found, want in zip(several_ops(), best, strict=True):
        assert (found - want).abs().max() <= 1e-6 * want.abs().max()


@needs_cpp
@pytest.mark.parametrize("channels, length, batch", [(8, 4096, 1), (3, 4096, 1), (70, 301, 3)])
def test_the_number_of_threads_changes_no_bit(channels, length, batch):
    one = several_ops(channels, length, batch)
    torch.set_num_threads(2)
    try:
        two = several_ops(channels, length, batch)
    finally:
        torch.set_num_threads(1)
    for found, want in zip(two, one, strict=True):
        assert torch.equal(found, want)


@needs_cpp
@pytest.mark.parametrize("threads", [1, 2])
def test_flush_to_zero_does_not_leak(threads):
    torch.set_num_threads(threads)
    try:
        several_ops(8, 200)
        tiny = torch.full((100_000,), 1e-40)  # long enough for every thread to take a part
        # bits, because a comparison under the setting takes both for zero
        assert torch.equal((tiny * 1).view(torch.int32), tiny.view(torch.int32))
        assert float(torch.tensor(1e-40) * 1) != 0
    finally:
        torch.set_num_threads(1)


TWO_IN_ONE_GRAPH = """
import torch
from bestiary.kernels import selective_scan_fn, causal_conv1d_fn

def block(x, w, A, B):
    y = causal_conv1d_fn(x, w, activation="silu")
    return selective_scan_fn(y, y, A, B, B, delta_softplus=True)

torch.manual_seed(0)
inputs = [torch.randn(1, 4, 9), torch.randn(4, 4), -torch.rand(4, 16), torch.randn(1, 16, 9)]
inputs = [t.requires_grad_() for t in inputs]
out = torch.compile(block, fullgraph=True, backend="aot_eager")(*inputs)
grads = torch.autograd.grad(out.square().sum(), inputs)
want = block(*inputs)
torch.testing.assert_close(out, want)
torch.testing.assert_close(grads, torch.autograd.grad(want.square().sum(), inputs))
"""


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_two_ops_never_called_before_compile_into_one_graph(kernels, python):
    """What the first op's resolution adds must be seen by the second, in the same trace."""
    cache = os.environ.get("BESTIARY_CACHE")
    env = {"BESTIARY_KERNELS": kernels, "BESTIARY_CACHE": cache, "HOME": os.environ.get("HOME")}
    result = python(TWO_IN_ONE_GRAPH, **env, BESTIARY_NATIVE=os.environ.get("BESTIARY_NATIVE"))
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_command_warns_of_nothing(clean_env):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "bestiary.kernels.backends", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_env())
    assert result.returncode == 0, result.stderr
    assert "--isa" in result.stdout
