"""The selective scan against its definition, written here as three plain loops in float64."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from bestiary.kernels import selective_scan_fn

F64 = torch.float64


def naive(u, delta, A, B, C, D=None, z=None, bias=None, softplus=False, h0=None, seq_idx=None):
    """Three loops over batch, channels and time, in Python floats where it can be."""
    batch, dim, length = u.shape
    N = A.shape[1]
    if B.ndim == 2:
        B = B[None, :, :, None].expand(batch, dim, N, length)
    if C.ndim == 2:
        C = C[None, :, :, None].expand(batch, dim, N, length)
    B, C = (m[:, None] if m.ndim == 3 else m for m in (B, C))
    out = torch.zeros_like(u)
    last = torch.zeros(batch, dim, N, dtype=u.dtype)
    for b, d in itertools.product(range(batch), range(dim)):
        gb, gc = d // (dim // B.shape[1]), d // (dim // C.shape[1])
        h = torch.zeros(N, dtype=u.dtype) if h0 is None else h0[b, d].clone()
        for t in range(length):
            if seq_idx is not None and t and seq_idx[b, t] != seq_idx[b, t - 1]:
                h = torch.zeros(N, dtype=u.dtype)
            step = float(delta[b, d, t]) + (0.0 if bias is None else float(bias[d]))
            if softplus:
                step = step if step > 20 else math.log1p(math.exp(step))
            h = torch.exp(step * A[d]) * h + step * float(u[b, d, t]) * B[b, gb, :, t]
            y = float((h * C[b, gc, :, t]).sum()) + (0.0 if D is None else float(D[d] * u[b, d, t]))
            if z is not None:
                y *= float(z[b, d, t]) / (1 + math.exp(-float(z[b, d, t])))
            out[b, d, t] = y
        last[b, d] = h
    return out, last


def inputs(B, D, L, N, G=None, const=False, seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=F64).to(dtype)

    maps = (D, N) if const else (B, N, L) if G is None else (B, G, N, L)
    A = -torch.rand(D, N, generator=g, dtype=F64).to(dtype) * 4 - 0.1
    return dict(u=rand(B, D, L), delta=rand(B, D, L), A=A, B=rand(*maps), C=rand(*maps), D=rand(D), z=rand(B, D, L),
                bias=rand(D), h0=rand(B, D, N))  # fmt: skip


def scan(p, softplus=True, **options):
    return selective_scan_fn(
        p["u"], p["delta"], p["A"], p["B"], p["C"], p["D"], p["z"], p["bias"], softplus, True,
        initial_state=p["h0"], **options,
    )  # fmt: skip


def expected(p, softplus=True, **options):
    return naive(p["u"], p["delta"], p["A"], p["B"], p["C"], p["D"], p["z"], p["bias"], softplus, p["h0"], **options)


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch):
    """Chunks of 8 steps, so that short sequences have several."""
    monkeypatch.setattr("bestiary.kernels.selective_scan.reference._CHUNK_ELEMENTS", 1)


@pytest.mark.parametrize("L", [1, 2, 7, 8, 9, 64, 65])
@pytest.mark.parametrize("N", [1, 16])
def test_equals_the_definition(L, N):
    p = inputs(2, 3, L, N, seed=L)
    for found, want in zip(scan(p), expected(p), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("G", "const"), [(1, False), (2, False), (4, False), (None, True)])
def test_groups_and_constant_maps(G, const):
    p = inputs(2, 4, 9, 3, G, const)
    for found, want in zip(scan(p), expected(p), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


def test_b_and_c_may_have_different_forms():
    p = inputs(2, 4, 9, 3)
    p["C"] = inputs(2, 4, 9, 3, G=2, seed=1)["C"]
    torch.testing.assert_close(scan(p)[0], expected(p)[0], rtol=1e-10, atol=1e-12)
    p["B"] = inputs(2, 4, 9, 3, const=True)["B"]
    torch.testing.assert_close(scan(p)[0], expected(p)[0], rtol=1e-10, atol=1e-12)


def test_bare_call_takes_upstreams_positions():
    p = inputs(1, 2, 5, 3)
    out = selective_scan_fn(p["u"], p["delta"].abs(), p["A"], p["B"], p["C"])
    torch.testing.assert_close(out, naive(p["u"], p["delta"].abs(), p["A"], p["B"], p["C"])[0])


@pytest.mark.parametrize("value", [-40.0, 19.99, 20.01, 80.0])
def test_softplus_tails(value):
    p = inputs(1, 2, 7, 3)
    p["delta"], p["bias"] = torch.full_like(p["delta"], value), torch.zeros_like(p["bias"])
    p["A"] = p["A"] * 2  # exp(80 * -2...) underflows to zero, which must be harmless
    leaves = {k: v.clone().requires_grad_() for k, v in p.items()}
    out, last = scan(leaves)
    want = expected(p)
    torch.testing.assert_close(out.detach(), want[0], rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(last.detach(), want[1], rtol=1e-12, atol=1e-300)
    (out.sum() + last.sum()).backward()
    assert all(torch.isfinite(v.grad).all() for v in leaves.values())


def test_extreme_gates_and_decays_stay_finite_in_float32():
    p = inputs(1, 2, 9, 3, dtype=torch.float32)
    p["z"] = torch.tensor([100.0, -100.0, 0.0] * 3).expand(1, 2, 9)
    p["A"] = p["A"] * 1000
    leaves = {k: v.clone().requires_grad_() for k, v in p.items()}
    out, _ = scan(leaves)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(v.grad).all() for v in leaves.values())


ORDER = torch.tensor([[4, 0, 8, 2, 7, 1, 3, 6, 5], [8, 7, 1, 3, 5, 4, 0, 2, 6]])
SEQ = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 3, 3, 3, 3, 3, 3, 3, 1]], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_scan_order_is_gather_scan_scatter(dtype):
    p = inputs(2, 4, 9, 3)
    walked = {k: torch.stack([v[b][..., ORDER[b]] for b in range(2)]) if k in ("u", "delta", "B", "C", "z") else v
              for k, v in p.items()}  # fmt: skip
    want, want_last = expected(walked)
    out, last = scan(p, scan_order=ORDER.to(dtype))
    for b in range(2):
        torch.testing.assert_close(out[b][:, ORDER[b]], want[b])
    torch.testing.assert_close(last, want_last)


@pytest.mark.parametrize("order", [None, ORDER])
def test_reverse_is_flip(order):
    p = inputs(2, 4, 9, 3)
    if order is None:
        flipped = {k: v.flip(-1) if k in ("u", "delta", "B", "C", "z") else v for k, v in p.items()}
        want, want_last = expected(flipped)
        want = want.flip(-1)
    else:
        want, want_last = scan(p, scan_order=order.flip(1))
    out, last = scan(p, scan_order=order, reverse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(last, want_last)


def test_packed_rows_equal_separate_sequences():
    p = inputs(2, 4, 9, 3)
    out, last = scan(p, seq_idx=SEQ)
    for b in range(2):
        edges = [0] + [t for t in range(1, 9) if SEQ[b, t] != SEQ[b, t - 1]] + [9]
        for i, (lo, hi) in enumerate(itertools.pairwise(edges)):
            one = {k: v[b : b + 1, ..., lo:hi] if k in ("u", "delta", "B", "C", "z") else v for k, v in p.items()}
            one["h0"] = p["h0"][b : b + 1] * (i == 0)
            want, want_last = expected(one)
            torch.testing.assert_close(out[b : b + 1, :, lo:hi], want)
        torch.testing.assert_close(last[b : b + 1], want_last)


def test_initial_and_last_state_continue_a_sequence():
    p = inputs(2, 4, 9, 3)
    whole, end = scan(p)
    first = {k: v[..., :4] if k in ("u", "delta", "B", "C", "z") else v for k, v in p.items()}
    rest = {k: v[..., 4:] if k in ("u", "delta", "B", "C", "z") else v for k, v in p.items()}
    a, rest["h0"] = scan(first)
    b, last = scan(rest)
    torch.testing.assert_close(torch.cat([a, b], -1), whole)
    torch.testing.assert_close(last, end)


def gradient_inputs(L=9, G=2, N=2):
    p = inputs(2, 4, L, N, G)
    return [p[k].requires_grad_() for k in ("u", "delta", "A", "B", "C", "D", "z", "bias", "h0")]


def as_function(**options):
    def function(u, delta, A, B, C, D, z, bias, h0):
        return selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True, initial_state=h0, **options)

    return function


@pytest.mark.parametrize(
    "options", [{}, {"reverse": True, "seq_idx": SEQ}, {"scan_order": ORDER, "seq_idx": SEQ}], ids=str
)
def test_gradients(options):
    assert gradcheck(as_function(**options), gradient_inputs(), fast_mode=False)


def test_gradients_of_gradients():
    assert gradgradcheck(as_function(scan_order=ORDER, seq_idx=SEQ), gradient_inputs(), fast_mode=True)
    assert gradgradcheck(as_function(reverse=True), gradient_inputs(), fast_mode=True)


def test_gradients_of_gradients_where_one_input_depends_on_another():
    x = torch.randn(1, 2, 9, dtype=F64, requires_grad=True)
    A = -torch.rand(2, 3, dtype=F64)

    def function(x):
        maps = x[:, :1].expand(1, 3, 9)
        return selective_scan_fn(x, x * x, A, maps, torch.sin(maps), None, x, None, True)

    assert gradcheck(function, [x])
    assert gradgradcheck(function, [x])


def test_gradient_of_a_subset():
    p = inputs(2, 4, 9, 3)
    whole = {k: v.clone().requires_grad_() for k, v in p.items()}
    scan(whole)[0].square().sum().backward()
    for name in p:
        some = {k: v.clone().requires_grad_(k == name) for k, v in p.items()}
        loss = scan(some)[0].square().sum()
        (grad,) = torch.autograd.grad(loss, some[name], create_graph=True)
        torch.testing.assert_close(grad.detach(), whole[name].grad)


def test_backward_is_linear_in_length():
    """Counts operations instead of timing them: twice the length, about twice the operations and elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Elements(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                Elements.total += out.numel() + 1
            return out

    def cost(L):
        p = {k: v.requires_grad_() for k, v in inputs(1, 4, L, 4).items()}
        Elements.total = 0
        with Elements():
            scan(p)[0].sum().backward()
        return Elements.total

    assert cost(256) < 2.2 * cost(128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_a_float32_state(dtype):
    p = inputs(2, 4, 65, 8)
    half = {k: v.to(dtype) if k in ("u", "delta", "B", "C", "z") else v.float() for k, v in p.items()}
    out, last = scan(half)
    assert out.dtype == dtype
    assert last.dtype == torch.float32
    want, want_last = scan({k: v.double() for k, v in half.items()})
    torch.testing.assert_close(last, want_last.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, want.to(dtype), rtol=1e-2, atol=1e-2)
    assert scan(half, out_dtype=torch.float32)[0].dtype == torch.float32


@pytest.mark.parametrize("order", [None, ORDER])
@pytest.mark.parametrize("reverse", [False, True])
def test_reference_compiles_whole(order, reverse):
    p = {k: v.float() for k, v in inputs(2, 4, 9, 3).items()}

    def function(p):
        out, last = scan(p, scan_order=order, reverse=reverse, backend="reference")
        return out, last

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (function, compiled):
        leaves = {k: v.clone().requires_grad_() for k, v in p.items()}
        out, last = f(leaves)
        (out.square().sum() + last.square().sum()).backward()
        results.append([out, last, *(v.grad for v in leaves.values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_any_strides_and_shared_storage():
    big = torch.randn(2, 9, 3 * 4, dtype=F64)
    p = inputs(2, 4, 9, 3)
    p["u"], p["delta"], p["z"] = (big[..., i * 4 : i * 4 + 4].transpose(1, 2) for i in range(3))
    p["B"] = torch.randn(1, 3, 1, dtype=F64).expand(2, 3, 9)
    torch.testing.assert_close(scan(p)[0], expected(p)[0])


def test_empty_batch():
    p = inputs(1, 4, 9, 3)
    out = selective_scan_fn(p["u"][:0], p["delta"][:0], p["A"], p["B"][:0], p["C"][:0])
    assert out.shape == (0, 4, 9)


def test_under_autocast_nothing_is_rounded():
    p = {k: v.float() for k, v in inputs(2, 4, 9, 3).items()}
    want = scan(p)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scan(p)[0], want)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"delta": torch.zeros(2, 4, 8)}, "delta must be"),
        ({"A": torch.zeros(3, 3)}, "A must be"),
        ({"A": torch.zeros(4, 3, dtype=torch.complex64)}, r"B must be .* = \(2, 3, 18\)"),  # 2L with complex A
        ({"B": torch.zeros(2, 3, 3, 9)}, "B must be"),
        ({"C": torch.zeros(2, 3, 8)}, "C must be"),
        ({"h0": torch.zeros(2, 4, 1)}, "initial_state must be"),
        ({"u": torch.zeros(4, 9)}, "needs u"),
    ],
)
def test_wrong_shapes_are_one_clear_error(change, words):
    with pytest.raises(ValueError, match=words):
        scan(inputs(2, 4, 9, 3) | change)


def test_wrong_orders(monkeypatch):
    p = inputs(2, 4, 9, 3)
    with pytest.raises(ValueError, match="scan_order must be"):
        scan(p, scan_order=ORDER[:, :5])
    with pytest.raises(ValueError, match="int32 or int64"):
        scan(p, scan_order=ORDER.float())
    monkeypatch.setenv("BESTIARY_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="not a permutation"):
        scan(p, scan_order=torch.zeros(2, 9, dtype=torch.long))
