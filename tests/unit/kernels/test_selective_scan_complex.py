"""The selective scan with complex A against its definition, in Python's complex numbers."""

import cmath
import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from bestiary.kernels import BackendUnavailableError, selective_scan_fn

F64 = torch.float64
ORDER = torch.tensor([[4, 0, 8, 2, 7, 1, 3, 6, 5], [8, 7, 1, 3, 5, 4, 0, 2, 6]])
SEQ = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 3, 3, 3, 3, 3, 3, 3, 1]], dtype=torch.int32)


def scan(p, **options):
    return selective_scan_fn(
        p["u"], p["delta"], p["A"], p["B"], p["C"], p["D"], p["z"], p["bias"], True, True,
        initial_state=p["h0"], **options,
    )  # fmt: skip


def inputs(L=9, const=(), G=2):
    """Complex A; maps that vary are real with (re, im) by turns along 2L, constant ones are complex."""
    g = torch.Generator().manual_seed(L)

    def rand(*shape, dtype=F64):
        return torch.randn(*shape, generator=g, dtype=dtype)

    p = {k: rand(2, 4, L) for k in ("u", "delta", "z")} | {k: rand(4) for k in ("D", "bias")}
    p["A"] = torch.complex(-rand(4, 3).abs(), 3 * rand(4, 3))
    p["h0"] = rand(2, 4, 3, dtype=torch.complex128)
    for name in "BC":
        shape = (4, 3) if name in const else (2, 3, 2 * L) if G is None else (2, G, 3, 2 * L)
        p[name] = rand(*shape, dtype=torch.complex128 if name in const else F64)
    return p


def naive(p, seq_idx=None):
    """Three loops in Python's complex numbers."""
    batch, dim, length = p["u"].shape
    N = p["A"].shape[1]
    out, last = torch.zeros_like(p["u"]), torch.zeros_like(p["h0"])

    def value(name, b, d, n, t):
        m = p[name]
        if m.ndim == 2:
            return complex(m[d, n])
        m = m[b, d // (dim // m.shape[1])] if m.ndim == 4 else m[b]
        return complex(m[n, 2 * t], m[n, 2 * t + 1])

    for b, d in itertools.product(range(batch), range(dim)):
        h = [complex(v) for v in p["h0"][b, d]]
        for t in range(length):
            if seq_idx is not None and t and seq_idx[b, t] != seq_idx[b, t - 1]:
                h = [0j] * N
            u, delta, z = (float(p[k][b, d, t]) for k in ("u", "delta", "z"))
            step = math.log1p(math.exp(delta + float(p["bias"][d])))
            h = [cmath.exp(step * complex(p["A"][d, n])) * h[n] + step * u * value("B", b, d, n, t) for n in range(N)]
            y = 2 * sum(value("C", b, d, n, t) * h[n] for n in range(N)).real + float(p["D"][d]) * u
            out[b, d, t] = y * z / (1 + math.exp(-z))
        last[b, d] = torch.tensor(h, dtype=last.dtype)
    return out, last


@pytest.mark.parametrize("const", ["", "B", "C", "BC"])
@pytest.mark.parametrize("G", [None, 2, 4])
def test_states(const, G):
    p = inputs(const=const, G=G)
    for seq_idx in (None, SEQ):
        for found, want in zip(scan(p, seq_idx=seq_idx), naive(p, seq_idx), strict=True):
            torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


def test_orders():
    p = inputs(G=None)
    pairs = {k: p[k].unflatten(-1, (-1, 2)) for k in "BC"}
    orders = torch.stack([ORDER, ORDER.flip(1)], 1)
    out, last = scan(p, scan_order=orders)
    assert last.dtype == torch.complex128
    for b, k in itertools.product(range(2), range(2)):
        walk = {n: v[b : b + 1] if n in ("u", "delta", "z", "h0") else v for n, v in p.items()}
        walk |= {n: walk[n][..., orders[b, k]] for n in ("u", "delta", "z")}
        walk |= {n: pairs[n][b : b + 1, :, orders[b, k]].flatten(-2) for n in "BC"}
        want, want_last = naive(walk)
        torch.testing.assert_close(out[b, k][:, orders[b, k]], want[0])
        torch.testing.assert_close(last[b, k], want_last[0])
    back = scan(p, scan_order=ORDER, reverse=True)
    torch.testing.assert_close(back[0], out[:, 1])
    torch.testing.assert_close(back[1], last[:, 1])


def test_float32_and_its_backends():
    p = {k: v.to(torch.complex64 if v.is_complex() else torch.float32) for k, v in inputs(const="B").items()}
    out, last = scan(p)
    assert (out.dtype, last.dtype) == (torch.float32, torch.complex64)
    want = naive(inputs(const="B"))
    torch.testing.assert_close(out, want[0].float(), rtol=1e-4, atol=1e-4)
    half = p | {k: p[k].bfloat16() for k in ("u", "delta", "C", "z")}
    assert (scan(half)[0].dtype, scan(half)[1].dtype) == (torch.bfloat16, torch.complex64)
    with pytest.raises(BackendUnavailableError, match="cpu"):
        scan(p, backend="cpu")


@pytest.mark.parametrize("const", ["", "BC"])
def test_gradients(const):
    p = inputs(5, const)
    names = ("u", "delta", "A", "B", "C", "D", "z", "bias", "h0")
    leaves = [p[name].requires_grad_() for name in names]

    def packed(*leaves):
        return scan(dict(zip(names, leaves, strict=True)), seq_idx=SEQ[:, :5])

    def backwards(*leaves):
        return scan(dict(zip(names, leaves, strict=True)), reverse=True)

    assert gradcheck(packed, leaves)
    assert gradgradcheck(backwards, leaves, fast_mode=True)
