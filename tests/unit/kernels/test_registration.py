"""The C++ ops as torch sees them: schema, autograd, compilation, second derivatives, checkpoints, autocast."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bestiary.kernels import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba2_step,
    mamba_chunk_scan_combined,
    rms_norm_gated,
    selective_scan_fn,
    selective_state_update,
)
from bestiary.kernels.backends import _IMPLEMENTATIONS, native

pytestmark = pytest.mark.skipif(native.why_absent() is not None, reason="no C++ kernels here")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def order(batch: int, length: int, several: int | None = None) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    rows = [torch.randperm(length, generator=g) for _ in range(batch * (several or 1))]
    return torch.stack(rows).reshape(*((batch, several, length) if several else (batch, length)))


@dataclass
class Case:
    """A function of tensors that want gradients."""

    run: Callable[..., Any]
    inputs: tuple[torch.Tensor, ...]

    def fresh(self, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [t.detach().clone().to(dtype).requires_grad_() for t in self.inputs]


def scan_case(D: int = 6, L: int = 70, N: int = 4, maps: tuple[int, ...] | None = None, last: bool = True, **options):
    shape = (2, N, L) if maps is None else maps
    inputs = (
        *(rand(2, D, L), rand(2, D, L, seed=1) - 1, -rand(D, N).abs() - 0.1, rand(*shape), rand(*shape, seed=1)),
        *(rand(D), rand(2, D, L, seed=2), rand(D, seed=1), rand(2, D, N)),
    )

    def run(u, delta, A, B, C, D, z, bias, h0, backend="cpu"):
        more = {"initial_state": h0, "backend": backend, **options}
        return selective_scan_fn(u, delta, A, B, C, D, z, bias, True, last, **more)

    return Case(run, inputs)


def conv_case(L: int = 70, W: int = 4, **options):
    def run(x, weight, bias, past, backend="cpu"):
        out, end = causal_conv1d_fn(
            x, weight, bias, None, past, True, activation="silu", backend=backend, **options
        )  # fmt: skip
        return out, end

    return Case(run, (rand(2, 6, L), rand(6, W), rand(6), rand(2, 6, W - 1)))


def ssd_case(L: int = 70, G: int = 2, **options):
    H, P, N = 4, 3, 5
    inputs = (
        *(rand(2, L, H, P), rand(2, L, H) - 1, -rand(H).abs() - 0.1, rand(2, L, G, N), rand(2, L, G, N, seed=1)),
        *(rand(H), rand(2, L, H, P, seed=2), rand(H, seed=1), rand(2, H, P, N)),
    )

    def run(x, dt, A, B, C, D, z, bias, initial, backend="cpu"):
        return mamba_chunk_scan_combined(
            x, dt, A, B, C, 16, D, z, bias, initial, dt_softplus=True, return_final_states=True, backend=backend,
            **options,
        )  # fmt: skip

    return Case(run, inputs)


def norm_case(**options):
    def run(x, weight, z, backend="cpu"):
        return (rms_norm_gated(x, weight, z, group_size=8, backend=backend, **options),)

    return Case(run, (rand(2, 5, 24), rand(24), rand(2, 5, 24, seed=1)))


CASES = {
    "scan": scan_case(),
    "scan, groups": scan_case(maps=(2, 3, 4, 70)),
    "scan, constant maps": scan_case(maps=(6, 4)),
    "scan, order": scan_case(scan_order=order(2, 70), reverse=True),
    "scan, orders": scan_case(scan_order=order(2, 70, 3)),
    "conv": conv_case(),
    "conv, short": conv_case(L=2),
    "conv, order": conv_case(scan_order=order(2, 70, 2), reverse=True),
    "ssd": ssd_case(),
    "ssd, order": ssd_case(G=1, scan_order=order(2, 70)),
    "norm": norm_case(),
    "norm, gate first": norm_case(norm_before_gate=False),
}


def available(name: str) -> bool:
    """Whether the C++ of a case's op is in this tree."""
    ops = {"scan": "selective_scan", "conv": "causal_conv1d", "ssd": "ssd", "norm": "gated_norm"}
    op = ops[name.split(",")[0]]
    try:
        import_module(_IMPLEMENTATIONS[op]["cpu"].split(":")[0])
    except ImportError:
        return False
    return True


NAMES = [name for name in CASES if available(name)]
FEW = [name for name in NAMES if "," not in name or name in ("scan, order", "norm, gate first")]
SCANS = [name for name in FEW if name.startswith(("scan", "ssd"))]


def total(outputs: Any) -> torch.Tensor:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((out.float() if out.dtype != torch.float64 else out).square().sum() for out in outputs)  # type: ignore[return-value]


def gradients(case: Case, inputs: list[torch.Tensor], run: Callable | None = None) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total((run or case.run)(*inputs)), inputs))


def close(found, wanted, tolerance: float = 2e-6) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max() + 1e-12


# --- opcheck -----------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of an op of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bestiary":
            kept = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
            self.calls.append((func, tuple(kept)))
        return func(*args, **(kwargs or {}))


def recorded(name: str) -> list[tuple[Any, tuple]]:
    with Recorder() as recorder:
        if name == "single steps":
            selective_state_update(
                rand(2, 6, 4), rand(2, 6), rand(2, 6), -rand(6, 4).abs(), rand(2, 4), rand(2, 4), rand(6), rand(2, 6),
                rand(6), True, backend="cpu",
            )  # fmt: skip
            causal_conv1d_update(rand(2, 6), rand(2, 6, 3), rand(6, 4), rand(6), "silu", backend="cpu")
            mamba2_step(
                rand(2, 30), rand(2, 3, 20), rand(2, 2, 4, 3), rand(20, 4), rand(20), rand(2), -rand(2).abs(), rand(2),
                rand(8), headdim=4, ngroups=2, rows=torch.tensor([1, -1]), backend="cpu",
            )  # fmt: skip
        else:
            case = CASES[name]
            gradients(case, case.fresh())
    return recorder.calls


def steps_available() -> bool:
    try:
        for op in ("state_update", "causal_conv1d_update", "mamba2_decode"):
            import_module(_IMPLEMENTATIONS[op]["cpu"].split(":")[0])
    except ImportError:
        return False
    return True


RECORDS = [*NAMES, *(["single steps"] if steps_available() else [])]


def differentiable(op: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "Autograd")


@pytest.mark.parametrize("name", RECORDS)
def test_opcheck(name):
    calls = recorded(name)
    assert calls
    for op, arguments in calls:
        if differentiable(op):
            arguments = tuple(
                a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments
            )
        torch.library.opcheck(op, arguments)


def test_every_op_is_checked():
    seen = {op.name() for name in RECORDS for op, _ in recorded(name)}
    defined = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bestiary::")}
    assert seen == defined


# --- torch.compile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_compiled_whole_equals_eager(name):
    case = CASES[name]
    compiled = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    inputs = case.fresh()
    for found, want in zip(compiled(*inputs), case.run(*inputs), strict=True):
        assert torch.equal(found, want)
        assert found.stride() == want.stride()
    for found, want in zip(gradients(case, inputs, compiled), gradients(case, inputs), strict=True):
        assert torch.equal(found, want)


def block(x, weight, delta, A, B):
    y = causal_conv1d_fn(x, weight, activation="silu", backend="cpu")
    return selective_scan_fn(y, delta, A, B, B, z=y, delta_softplus=True, backend="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_takes_two_ops_in_one_graph(dynamic):
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    for L in (33, 65):
        shapes = ((2, 6, L), (6, 4), (2, 6, L))
        inputs = [
            *(rand(*shape).requires_grad_() for shape in shapes),
            -rand(6, 4).abs().requires_grad_(),
            rand(2, 4, L),
        ]
        inputs = [t.detach().requires_grad_() for t in inputs]
        close([compiled(*inputs)], [block(*inputs)])
        close(torch.autograd.grad(total(compiled(*inputs)), inputs), torch.autograd.grad(total(block(*inputs)), inputs))


# --- autograd ----------------------------------------------------------------------------------------------------


def penalty(case: Case, inputs: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    """Gradients of a gradient penalty: what needs second derivatives."""

    def run(*tensors):
        return case.run(*tensors, backend=backend)

    first = torch.autograd.grad(total(run(*inputs)), inputs, create_graph=True)
    return list(torch.autograd.grad(total(tuple(first)), inputs))


@pytest.mark.parametrize("name", FEW)
def test_double_backward_equals_float64(name):
    case = CASES[name]
    close(penalty(case, case.fresh(), "cpu"), penalty(case, case.fresh(torch.float64), "reference"), 5e-6)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_change_nothing(name, reentrant):
    case = CASES[name]
    inputs = case.fresh()
    wanted = gradients(case, inputs)
    total(checkpoint(case.run, *inputs, use_reentrant=reentrant)).backward()
    for t, want in zip(inputs, wanted, strict=True):
        assert torch.equal(t.grad, want)


@pytest.mark.parametrize("name", FEW)
def test_a_subset_of_gradients(name):
    case = CASES[name]
    wanted = gradients(case, case.fresh())
    for i in range(len(case.inputs)):
        inputs = [t.detach().clone().requires_grad_(i == j) for j, t in enumerate(case.inputs)]
        (found,) = torch.autograd.grad(total(case.run(*inputs)), inputs[i])
        assert torch.equal(found, wanted[i])


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_saved(name, mode):
    case = CASES[name]
    packed = []
    inputs = case.fresh()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        case.run(*inputs)
        assert packed
        packed.clear()
        with mode():
            out = case.run(*inputs)
        case.run(*(t.detach() for t in inputs))  # gradients on, and nobody wants one
    assert packed == []
    assert not any(t.requires_grad for t in out)


@pytest.mark.parametrize("name", SCANS)
def test_the_op_gives_no_states_to_save_without_gradients(name, monkeypatch):
    module = import_module(f"bestiary.kernels.{'ssd' if name.startswith('ssd') else 'selective_scan'}.cpu")
    saved, original = [], module._scan

    def spy(*arguments):
        outputs = original(*arguments)
        saved.append(outputs[2].numel())
        return outputs

    monkeypatch.setattr(module, "_scan", spy)
    case = CASES[name]
    inputs = case.fresh()
    case.run(*inputs)
    with torch.no_grad():
        case.run(*inputs)
    case.run(*(t.detach() for t in inputs))
    assert saved[0] > 0
    assert saved[1:] == [0, 0]


# --- autocast ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_ops_alone(name, dtype):
    """The inputs' dtype counts, and with the same inputs the result has the same bits, gradients too."""
    case = CASES[name]
    parameters = {2, 5, 7} if name in SCANS else {1} if "norm" in name else set()  # stay float32, as in mixed training
    inputs = [
        (t.detach() if i in parameters else t.detach().to(dtype)).requires_grad_() for i, t in enumerate(case.inputs)
    ]
    plain = case.run(*inputs)
    grads = gradients(case, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = case.run(*inputs)
        found = torch.autograd.grad(total(cast), inputs)
    assert cast[0].dtype == dtype
    assert all(last.dtype == (torch.float32 if name in SCANS else dtype) for last in cast[1:])
    for a, b in itertools.chain(zip(cast, plain, strict=True), zip(found, grads, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for g, t in zip(found, inputs, strict=True):
        assert g.dtype == t.dtype
