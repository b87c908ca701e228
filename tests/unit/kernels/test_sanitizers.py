"""Every C++ op over odd shapes under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bestiary.kernels.backends import native

FLAGS = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-O1", "-g1")
RUNTIMES = ("libasan.so", "libubsan.so")

WALK = """
import itertools, sys, warnings
from importlib.util import find_spec
from pathlib import Path
import torch
from bestiary.kernels.backends import native
native.PREBUILT = Path(sys.argv[1])
import bestiary.kernels as k
warnings.simplefilter("ignore")
torch.manual_seed(0)
torch.set_num_threads(2)
ran = {}


def rand(*shape, dtype=torch.float32, last=False, odd=False):
    if last:  # channels contiguous
        t = torch.randn(shape[0], shape[2], shape[1]).transpose(1, 2)
    elif odd:  # no stride is 1, and the storage ends with the last element
        t = torch.randn(*shape[:-1], 2 * shape[-1])[..., 1::2]
    else:
        t = torch.randn(*shape)
    return t.to(dtype).requires_grad_()


def backward(op, out, *inputs):
    outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    inputs = [t for t in inputs if t is not None]
    grads = torch.autograd.grad([o.float().sum() for o in outputs], inputs, allow_unused=True)
    assert all(torch.isfinite(t).all() for t in (*outputs, *(g for g in grads if g is not None)))
    ran[op] = ran.get(op, 0) + 1


def orders(batch, L, several):
    shape = (batch, L) if several is None else (batch, several, L)
    return torch.argsort(torch.rand(shape), -1)


def seq(batch, L):
    return torch.randint(0, 2, (batch, L)).cumsum(-1).int()


lengths, channels = (1, 2, 15, 17, 63, 64, 65, 130), (1, 7, 16, 17, 33)
dtypes = (torch.float32, torch.bfloat16, torch.float16)
number = 0
for L, D in itertools.product(lengths, channels):
    number += 1
    dtype, N, flag = dtypes[number % 3], (1, 3, 16, 17, 64)[number % 5], number % 2 == 0
    how = dict(dtype=dtype, last=number % 3 == 0, odd=number % 7 == 0)
    several = (None, 2)[number % 2]
    order = orders(2, L, several) if number % 4 < 2 else None
    if order is not None and number % 3 == 0:
        order = order.int()
    rows = dict(scan_order=order, reverse=flag, seq_idx=seq(2, L) if number % 5 < 2 else None)
    u, delta, z = rand(2, D, L, **how), rand(2, D, L, **how), rand(2, D, L, **how) if number % 3 else None
    A = (-torch.rand(D, N)).requires_grad_()
    shape = ((2, N, L), (D, N), (2, D, N, L) if D < 8 else (2, 1, N, L))[number % 3]
    B, C = (rand(*shape, dtype=torch.float32 if len(shape) == 2 else dtype) for _ in range(2))
    skip, bias, h0 = (rand(D), rand(D), rand(2, D, N)) if number % 4 else (None, None, None)
    out = k.selective_scan_fn(u, delta, A, B, C, skip, z, bias, flag or True, True, initial_state=h0, backend="cpu",
                              **rows)
    backward("scan", out, u, delta, A, B, C, skip, z, bias, h0)
    for W in (1, 2, 4, 7):
        x, weight = rand(2, D, L, **how), rand(D, W)
        bias, past = (rand(D), rand(2, D, W - 1, dtype=dtype)) if number % 3 else (None, None)
        out = k.causal_conv1d_fn(x, weight, bias, rows["seq_idx"], past, True, activation="silu" if flag else None,
                                 scan_order=order, reverse=flag, backend="cpu")
        backward("conv", out, x, weight, bias, past)

if find_spec("bestiary.kernels.ssd.cpu"):
    for L, (H, G), (P, N) in itertools.product(
        (1, 3, 16, 63, 65, 257), ((1, 1), (6, 3)), ((1, 1), (17, 5), (64, 16), (3, 130))
    ):
        number += 1
        dtype = dtypes[number % 3]
        x, dt = rand(2, L, H, P, dtype=dtype, odd=number % 4 == 0), rand(2, L, H, dtype=dtype)
        A = (-torch.rand(H)).requires_grad_()
        B, C = rand(2, L, G, N, dtype=dtype), rand(2, L, G, N, dtype=dtype, odd=number % 5 == 0)
        skip, h0 = (rand(H), rand(2, H, P, N)) if number % 3 else (None, None)
        out = k.mamba_chunk_scan_combined(
            x, dt, A, B, C, 64, skip, None, None, h0, seq(2, L) if number % 4 < 2 else None, dt_softplus=True,
            return_final_states=True, scan_order=orders(2, L, None) if number % 5 < 2 else None,
            reverse=number % 2 == 0, backend="cpu")
        backward("ssd", out, x, dt, A, B, C, skip, h0)

if find_spec("bestiary.kernels.state_update.cpu"):
    with torch.no_grad():
        for H, P, N in itertools.product((1, 6), (1, 7, 64), (1, 3, 16, 33, 128)):
            for dtype in dtypes:
                state, x, dt = rand(5, H, P, N, dtype=dtype), rand(3, H, P), rand(3, H, P)
                B, C = rand(3, H, N), rand(3, 1, N)
                slots = torch.tensor([4, -1, 0])
                A = -torch.rand(H, P, N)
                k.selective_state_update(state, x, dt, A, B, C, rand(H, P), x, rand(H, P), True, slots, backend="cpu")
                tied = -torch.rand(H)[:, None, None].expand(H, P, N)
                same = rand(3, H)[..., None].expand(3, H, P)
                k.selective_state_update(state, x, same, tied, B, C, state_batch_indices=slots.int(), backend="cpu")
                ran["state_update"] = ran.get("state_update", 0) + 2

if find_spec("bestiary.kernels.causal_conv1d.update_cpu"):
    with torch.no_grad():
        for D, W, S, room in itertools.product((1, 7, 16, 33), (2, 4, 5), (1, 2, 9), (0, 3)):
            state, weight, bias = rand(5, D, W - 1 + room), rand(D, W), rand(D)
            x, slots = rand(3, D, S), torch.tensor([2, -1, 4]).int()
            k.causal_conv1d_update(x, state, weight, bias, "silu", conv_state_indices=slots, backend="cpu")
            seen = torch.tensor([0, 1, 17]).int()
            k.causal_conv1d_update(x[..., 0], state[:3], weight, None, None, seen, backend="cpu")
            for dtype in dtypes:  # channels contiguous, and each channel's inputs; nothing stands after the last
                for last in (False, True):
                    own, new = rand(3, D, W - 1 + room, dtype=dtype, last=last), rand(3, D, S, last=True)
                    k.causal_conv1d_update(new.to(dtype), own, weight, bias, "silu", backend="cpu")
                    ran["conv_update"] = ran.get("conv_update", 0) + 1
            ran["conv_update"] += 2

if find_spec("bestiary.kernels.gated_norm.cpu"):
    for channels, size in ((1, 1), (7, 7), (15, 5), (16, 4), (33, 11), (130, 65), (256, 64)):
        for dtype, rows, gated, before in itertools.product(dtypes, (1, 70), (False, True), (False, True)):
            number += 1
            x, weight = rand(2, rows, channels, dtype=dtype, odd=number % 3 == 0), rand(channels)
            z = rand(2, rows, channels, dtype=dtypes[number % 3], last=number % 2 == 0) if gated else None
            out = k.rms_norm_gated(x, weight, z, 1e-5, size, before, backend="cpu")
            backward("gated_norm", out, x, weight, z)

if find_spec("bestiary.kernels.mamba2_decode.cpu"):
    with torch.no_grad():
        for (H, G), (P, N), W in itertools.product(
            ((1, 1), (6, 3), (9, 1)), ((1, 1), (7, 3), (16, 33), (64, 16)), (1, 2, 4, 6)
        ):
            C = H * P + 2 * G * N
            for dtype in dtypes:
                number += 1
                x = rand(3, H * P + C + H, dtype=dtype, odd=number % 3 == 0)
                states = rand(5, W - 1, C, dtype=dtype), rand(5, H, P, N, dtype=dtypes[number % 3])
                parameters = rand(C, W), rand(C) if number % 2 else None, rand(H), -torch.rand(H), rand(H), rand(H * P)
                k.mamba2_step(x, *states, *parameters, headdim=P, ngroups=G, rows=torch.tensor([4, -1, 0]),
                              backend="cpu")
                ran["mamba2_step"] = ran.get("mamba2_step", 0) + 1
print("ran", ran)
"""


def runtimes() -> list[str]:
    """The sanitizers' libraries, which Python must load first; empty where the compiler has none."""
    try:
        command = native.compiler()
    except native.BuildError:
        return []
    found = []
    for name in RUNTIMES:
        result = subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True)
        path = Path(result.stdout.strip())
        if not path.is_absolute():
            return []
        found.append(str(path.resolve()))
    return found


def check(code: str, folder: Path, root: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run code with the libraries of a folder; a report of a sanitizer shows in stderr."""
    settings = {
        "LD_PRELOAD": " ".join(runtimes()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(root / "src"),
        "BESTIARY_NATIVE": "require",
    }
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, env={**env, **settings}, cwd=folder, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not runtimes(), reason="the compiler has no sanitizers")
@pytest.mark.parametrize("name", sorted({native.isas()[0], "portable"}))
def test_no_op_touches_what_is_not_its_own(name, root, clean_env, tmp_path):
    library = tmp_path / f"bestiary_{name}.so"
    native._compile([*native.compiler(), *native._flags(name), *FLAGS, "-o", str(library)], tmp_path / "log")
    result = check(WALK, tmp_path, root, clean_env(BESTIARY_ISA=name))
    reports = [line for line in result.stderr.splitlines() if "runtime error:" in line or "Sanitizer" in line]
    assert reports == [], "\n".join(sorted(set(reports))[:20]) + "\n" + result.stderr[-6000:]
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.startswith("ran ")


@pytest.mark.slow
@pytest.mark.skipif(not runtimes(), reason="the compiler has no sanitizers")
def test_a_planted_overflow_is_reported(root, clean_env, tmp_path):
    source, library = tmp_path / "planted.cpp", tmp_path / "planted.so"
    source.write_text('extern "C" float past(const float* x, int n) { return x[n]; }\n')
    subprocess.run([*native.compiler(), "-shared", "-fPIC", *FLAGS, str(source), "-o", str(library)], check=True)
    code = (
        "import ctypes, sys, torch\n"
        "past = ctypes.CDLL(sys.argv[1] + '/planted.so').past\n"
        "x = torch.zeros(16)\n"
        "past(ctypes.c_void_p(x.data_ptr()), 16)\n"
    )
    result = check(code, tmp_path, root, clean_env())
    assert "heap-buffer-overflow" in result.stderr
