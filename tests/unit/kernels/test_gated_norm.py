"""The gated RMS norm against its definition in float64: values, gradients, layouts, and what is at the rim."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from bestiary.kernels import BackendUnavailableError, rms_norm_gated, rms_norm_gated_ref
from bestiary.kernels.backends import why_absent
from bestiary.kernels.ssd import split_conv1d

OP = "gated_norm"
needs_cpp = pytest.mark.skipif(why_absent(OP, "cpu") is not None, reason="no C++ kernels here")
ORDERS = [True, False]


def inputs(*shape, gated=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(sum(shape))
    x, z = (torch.randn(*shape, generator=g).to(dtype) for _ in range(2))
    return x, 1 + 0.1 * torch.randn(shape[-1], generator=g), 2 * z if gated else None


def definition(x, weight, z=None, eps=1e-6, size=None, before=True):
    """Each group normed on its own by torch's norm; in float64."""
    x, weight = x.double(), weight.double()
    gate = 1 if z is None else F.silu(z.double())
    y = x if before else x * gate
    parts = [F.rms_norm(part, part.shape[-1:], None, eps) for part in y.split(size or x.shape[-1], -1)]
    return torch.cat(parts, -1) * weight * (gate if before else 1)


def with_gradients(function, tensors, dout):
    """The result and the gradient of each tensor that is there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    found = torch.autograd.grad(out, [t for t in leaves if t is not None], dout.to(out.dtype))
    return [out.detach(), *found]


def close(found, want, tolerance=2e-6):
    for a, b in zip(found, want, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * float(b.abs().max()) + 1e-30)


def check(backend, tensors, eps=1e-6, size=None, before=True, tolerance=2e-6):
    dout = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))
    found = with_gradients(lambda *t: rms_norm_gated(*t, eps, size, before, backend=backend), tensors, dout)
    want = with_gradients(lambda *t: definition(*t, eps, size, before), tensors, dout)
    for gradient, t in zip(found[1:], [t for t in tensors if t is not None], strict=True):
        assert gradient.dtype == t.dtype
    close(found, want, tolerance)


@pytest.mark.parametrize("channels, size", [(1, 1), (5, 5), (7, 1), (8, 4), (9, 3), (24, 12), (33, 11), (130, 65),
                                            (128, 16), (130, None)])  # fmt: skip
@pytest.mark.parametrize("before", ORDERS)
@pytest.mark.parametrize("gated", [True, False])
def test_equals_the_definition(backend, channels, size, before, gated):
    check(backend, inputs(3, 5, channels, gated=gated), 1e-3, size, before)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 1, 3, 24), (2, 1, 2, 1, 2, 24), (1, 2, 1, 2, 1, 2, 24)])
@pytest.mark.parametrize("before", ORDERS)
def test_any_number_of_dimensions(backend, shape, before):
    check(backend, inputs(*shape), size=8, before=before)


@pytest.mark.parametrize("before", ORDERS)
def test_any_strides(backend, before):
    """A gate that is a slice of a wider projection, rows that are transposed, channels that are not contiguous."""
    _, weight, _ = inputs(24)
    wide = torch.randn(4, 6, 100)
    layouts = {
        "slice": wide[..., 5:29],
        "transposed rows": wide.transpose(0, 1)[:4, :, :24].transpose(0, 1)[:, :4],
        "every other channel": wide[..., 1:49:2],
        "channels far apart": wide[:, :, :6].transpose(1, 2)[..., :6],
        "one row for all": wide[:1, :1, :24].expand(4, 6, 24),
    }
    for x in layouts.values():
        z = torch.randn(*x.shape[:-1], 2 * x.shape[-1])[..., x.shape[-1] :]
        for pair in ((x, z), (z, x)):
            check(backend, (pair[0], weight[: x.shape[-1]], pair[1]), size=x.shape[-1] // 2, before=before)
    apart = torch.randn(48)[::2]
    check(backend, (wide[..., :24], apart, wide[..., 24:48]), before=before)
    x, weight, z = inputs(3, 24)
    leaves = [t.requires_grad_() for t in (x, weight, z)]
    out = rms_norm_gated(*leaves, norm_before_gate=before, backend=backend)  # a gradient of stride 0
    want = torch.autograd.grad(definition(*leaves, before=before).sum(), leaves)
    close(torch.autograd.grad(out.sum(), leaves), want)


@needs_cpp
def test_a_slice_is_not_copied(monkeypatch):
    from bestiary.kernels.gated_norm import cpu

    x, weight, _ = inputs(2, 3, 16)
    z = torch.randn(2, 3, 40)[..., 8:24]
    seen, original = [], cpu._norm
    monkeypatch.setattr(cpu, "_norm", lambda *arguments: seen.append(arguments[2]) or original(*arguments))
    rms_norm_gated(x, weight, z, backend="cpu")
    assert seen[0].data_ptr() == z.data_ptr()
    assert seen[0].stride() == (120, 40, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [7, 40])
@pytest.mark.parametrize("before", ORDERS)
def test_half_precision_is_rounded_once(backend, dtype, channels, before):
    x, weight, z = inputs(6, channels, dtype=dtype)
    out = rms_norm_gated(x, weight, z, 1e-5, None, before, backend=backend)
    assert out.dtype == dtype
    want = definition(x, weight, z, 1e-5, None, before)
    step = torch.finfo(dtype).eps * want.abs() / 2  # the distance to the nearest number of the dtype is half a step
    assert ((out.double() - want).abs() <= 1.01 * step + 1e-6).all()
    check(backend, (x, weight.to(dtype), z), 1e-5, None, before, torch.finfo(dtype).eps)
    huge = rms_norm_gated(1e3 * x, weight, z, norm_before_gate=before, backend=backend)
    assert torch.isfinite(huge).all()  # the squares would not fit into float16


@pytest.mark.parametrize("before", ORDERS)
def test_dtypes_may_differ(backend, before):
    x, weight, z = inputs(4, 24)
    check(backend, (x.bfloat16(), weight, z), size=12, before=before, tolerance=8e-3)
    check(backend, (x, weight.half(), z.bfloat16()), size=12, before=before, tolerance=8e-3)


def test_float64_takes_the_reference():
    x, weight, z = (t.double() for t in inputs(3, 12))
    out = rms_norm_gated(x, weight, z, group_size=4)
    assert out.dtype == torch.float64
    close([out], [definition(x, weight, z, size=4)], 1e-14)
    with pytest.raises(BackendUnavailableError):
        rms_norm_gated(x, weight, z, backend="cpu")


@pytest.mark.parametrize("value", [-1e4, -100.0, -88.5, -87.5, 0.0, 87.5, 88.5, 100.0, 1e4])
@pytest.mark.parametrize("before", ORDERS)
def test_gates_of_any_size(backend, value, before):
    """A closed gate gives 0 and no NaN, an open one x itself; gradients too."""
    x, weight, z = inputs(3, 16)
    z[1] = value
    z[2, ::3] = value
    check(backend, (x, weight, z), 1e-5, 8, before)


@pytest.mark.parametrize("before", ORDERS)
@pytest.mark.parametrize("which", ["x", "z", "weight"])
def test_nan_reaches_its_group_alone(backend, before, which):
    x, weight, z = inputs(3, 16)
    if which == "weight":
        weight[9] = torch.nan
    else:
        (x if which == "x" else z)[1, 9] = torch.nan
    bad = rms_norm_gated(x, weight, z, group_size=8, norm_before_gate=before, backend=backend).isnan()
    want = torch.zeros(3, 16, dtype=torch.bool)
    if which == "weight":
        want[:, 9] = True
    elif which == "z" and before:
        want[1, 9] = True  # the gate comes last
    else:
        want[1, 8:] = True
    assert torch.equal(bad, want)


@pytest.mark.parametrize("before", ORDERS)
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_rows_of_zeros(backend, before, eps):
    x, weight, z = inputs(4, 16)
    x[1], x[2, 8:] = 0, 0
    check(backend, (x, weight, z), eps, 8, before)


@pytest.mark.parametrize("before", ORDERS)
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows(backend, before, shape):
    x, weight, z = (t.requires_grad_() for t in inputs(*shape))
    out = rms_norm_gated(x, weight, z, norm_before_gate=before, backend=backend)
    grads = torch.autograd.grad(out.sum(), (x, weight, z))
    assert out.shape == shape
    assert [g.shape for g in grads] == [x.shape, weight.shape, z.shape]
    assert not grads[1].any()


@pytest.mark.parametrize("before", ORDERS)
def test_the_weights_gradient_of_many_rows(backend, before):
    x, weight, z = inputs(20_000, 12)
    check(backend, (x, weight, z), size=6, before=before, tolerance=5e-6)


@needs_cpp
@pytest.mark.parametrize("rows, channels", [(1000, 96), (70, 1024), (5, 8192)])
@pytest.mark.parametrize("before", ORDERS)
def test_the_number_of_threads_changes_no_bit(rows, channels, before):
    tensors, dout = inputs(rows, channels), torch.randn(rows, channels)

    def run():
        return with_gradients(lambda *t: rms_norm_gated(*t, 1e-5, 32, before, backend="cpu"), tensors, dout)

    one = run()
    torch.set_num_threads(2)
    try:
        two = run()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("before", ORDERS)
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_of_gradients(before, gated):
    tensors = [t.double().requires_grad_() for t in inputs(3, 6, gated=gated) if t is not None]

    def function(*t):
        return rms_norm_gated(*t, eps=1e-3, group_size=3, norm_before_gate=before)

    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(())}, "needs x"),
        ({"x": torch.zeros(3, 0)}, "needs x"),
        ({"weight": torch.zeros(7)}, "weight must be"),
        ({"group_size": 5}, "divisor"),
        ({"group_size": -4}, "divisor"),
        ({"z": torch.zeros(1, 8)}, "z must be as x"),
    ],
)
def test_wrong_arguments_are_one_clear_error(change, words):
    with pytest.raises(ValueError, match=f"rms_norm_gated.*{words}"):
        rms_norm_gated(**({"x": torch.zeros(3, 8), "weight": torch.zeros(8)} | change))


def test_one_function_under_each_name():
    assert split_conv1d.rms_norm_gated is rms_norm_gated
    x, weight, z = inputs(3, 12)
    found = rms_norm_gated(x, weight, z, 1e-3, 4, False, backend="reference")
    assert torch.equal(found, rms_norm_gated_ref(x, weight, z, 1e-3, 4, False))
