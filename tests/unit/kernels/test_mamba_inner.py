"""The inner functions of Mamba-1 against their formulas, written here step by step in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from bestiary.kernels import bimamba_inner_fn, mamba_inner_fn, mamba_inner_fn_no_out_proj

F64 = torch.float64


def conv(x, weight, bias):
    """(B, D, L) by F.conv1d, left-padded, then SiLU."""
    out = F.conv1d(F.pad(x, (weight.shape[-1] - 1, 0)), weight, bias, groups=weight.shape[0])
    return out * torch.sigmoid(out)


def rms(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def scan(u, delta, A, B, C, D, z, bias, softplus):
    """Step by step; B and C (B, D, N, L)."""
    dt = delta if bias is None else delta + bias[:, None]
    dt = F.softplus(dt) if softplus else dt
    h, ys = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype), []
    for t in range(u.shape[2]):
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, -1)
    y = y if D is None else y + D[:, None] * u
    return y * z * torch.sigmoid(z)


def projected(p, eps=1e-6):
    """u, delta, B and C of the branch, B and C widened to (B, D, N, L)."""
    xz = p["xz"]
    dim, (batch, _, length), N = p["A"].shape[0], xz.shape, p["A"].shape[1]
    u = conv(xz[:, :dim], p["conv1d_weight"], p["conv1d_bias"])
    rank = p["delta_proj_weight"].shape[1]
    x_dbl = torch.einsum("rd,bdl->blr", p["x_proj_weight"], u)
    delta = torch.einsum("dr,blr->bld", p["delta_proj_weight"], x_dbl[..., :rank])
    if p.get("dt_rms_weight") is not None:
        delta = rms(delta, p["dt_rms_weight"], eps)
    maps = []
    for name, columns in (("B", x_dbl[..., rank : rank + N]), ("C", x_dbl[..., -N:])):
        value = p.get(name)
        if value is None:
            value = columns
            if p.get(f"{name}_proj_bias") is not None:
                value = value + p[f"{name}_proj_bias"]
            if p.get(f"{name.lower()}_rms_weight") is not None:
                value = rms(value, p[f"{name.lower()}_rms_weight"], eps)
            value = value.transpose(1, 2)
        if value.ndim == 2:
            value = value[None, :, :, None].expand(batch, dim, N, length)
        elif value.ndim == 3:
            value = value[:, None].expand(batch, dim, N, length)
        else:
            value = value.repeat_interleave(dim // value.shape[1], 1)
        maps.append(value)
    return u, delta.transpose(1, 2), *maps


def expected(p, softplus=True, eps=1e-6):
    u, delta, B, C = projected(p, eps)
    y = scan(u, delta, p["A"], B, C, p.get("D"), p["xz"][:, len(p["A"]) :], p.get("delta_bias"), softplus)
    out = torch.einsum("md,bdl->blm", p["out_proj_weight"], y)
    return out if p.get("out_proj_bias") is None else out + p["out_proj_bias"]


def inputs(B=2, D=4, L=7, N=3, R=2, M=5, W=4, extra=(), seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "xz": (B, 2 * D, L),
        "conv1d_weight": (D, 1, W),
        "conv1d_bias": (D,),
        "x_proj_weight": (R + N * (("B" not in extra) + ("C" not in extra)), D),
        "delta_proj_weight": (D, R),
        "out_proj_weight": (M, D),
        "out_proj_bias": (M,),
        "A": (D, N),
        "D": (D,),
        "delta_bias": (D,),
        "B": (D, N),
        "C": (B, 2, N, L),
        "B_proj_bias": (N,),
        "C_proj_bias": (N,),
        "b_rms_weight": (N,),
        "c_rms_weight": (N,),
        "dt_rms_weight": (D,),
    }
    plain = list(shapes)[:10]
    p = {k: torch.randn(*shapes[k], generator=g, dtype=F64).to(dtype) for k in [*plain, *extra]}
    p["A"] = -p["A"].abs() - 0.1
    return {k: v.requires_grad_() for k, v in p.items()}


CASES = {
    "plain": {},
    "one_token": {"L": 1},
    "biases": {"extra": ("B_proj_bias", "C_proj_bias")},
    "norms": {"extra": ("b_rms_weight", "c_rms_weight", "dt_rms_weight")},
    "given_B": {"extra": ("B",)},
    "given_C": {"extra": ("C",)},
    "given_both": {"extra": ("B", "C")},
    "all": {"extra": ("B_proj_bias", "C_proj_bias", "b_rms_weight", "c_rms_weight", "dt_rms_weight"), "D": 6, "W": 2},
}


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula_with_gradients(case, level):
    p = inputs(**CASES[case])
    found, want = mamba_inner_fn(**p, checkpoint_lvl=level), expected(p)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-11)
    weight = torch.randn_like(want)
    mine = torch.autograd.grad((found * weight).sum(), list(p.values()))
    theirs = torch.autograd.grad((want * weight).sum(), list(p.values()))
    for name, a, b in zip(p, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_options_are_positional_as_upstream():
    p = inputs(extra=("B_proj_bias", "C_proj_bias"))
    names = ["xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight", "out_proj_weight",
             "out_proj_bias", "A", "B", "C", "D", "delta_bias", "B_proj_bias", "C_proj_bias"]  # fmt: skip
    found = mamba_inner_fn(*[p.get(n) for n in names], False, 0, None, None, None, 1e-3)
    torch.testing.assert_close(found, expected(p, softplus=False), rtol=1e-10, atol=1e-11)


def test_optional_parts_may_be_missing():
    p = inputs()
    for name in ("conv1d_bias", "out_proj_bias", "D", "delta_bias"):
        p[name] = None
    torch.testing.assert_close(mamba_inner_fn(**p), expected(p), rtol=1e-10, atol=1e-11)


def test_eps_of_the_norms():
    p = inputs(extra=("b_rms_weight", "dt_rms_weight"))
    found = mamba_inner_fn(**p, b_c_dt_rms_eps=0.5)
    torch.testing.assert_close(found, expected(p, eps=0.5), rtol=1e-10, atol=1e-11)
    assert (found - expected(p)).abs().max() > 1e-3


def test_without_out_proj():
    p = inputs()
    full = {k: v for k, v in p.items() if not k.startswith("out_proj")}
    found = mamba_inner_fn_no_out_proj(**full)
    assert found.shape == (2, 4, 7)
    out = F.linear(found.transpose(1, 2), p["out_proj_weight"], p["out_proj_bias"])
    torch.testing.assert_close(out, expected(p), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("level", [0, 1])
def test_bidirectional(level):
    p = inputs(L=9)
    A_b = (-torch.rand(4, 3, dtype=F64) - 0.1).requires_grad_()
    u, delta, B, C = projected(p)
    z = p["xz"][:, 4:]
    forward = scan(u, delta, p["A"], B, C, p["D"], z, p["delta_bias"], True)
    flipped = (t.flip(-1) for t in (u, delta, B, C, z))
    u, delta, B, C, z = flipped
    backward = scan(u, delta, A_b, B, C, p["D"], z, p["delta_bias"], True).flip(-1)
    want = F.linear((forward + backward).transpose(1, 2), p["out_proj_weight"], p["out_proj_bias"])
    found = bimamba_inner_fn(**p, A_b=A_b, checkpoint_lvl=level)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-11)
    leaves = [*p.values(), A_b]
    for a, b in zip(
        *(torch.autograd.grad(o.pow(2).sum(), leaves, retain_graph=True) for o in (found, want)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("level", [0, 1])
def test_gradcheck(level):
    p = inputs(B=1, D=2, L=4, N=2, R=1, M=2, W=3, extra=("B_proj_bias", "C_proj_bias", "b_rms_weight", "dt_rms_weight"))
    names = list(p)

    def call(*values):
        return mamba_inner_fn(**dict(zip(names, values, strict=True)), checkpoint_lvl=level)

    assert gradcheck(call, tuple(p.values()))


def test_any_strides():
    p = inputs(dtype=torch.float32)
    tokens = p["xz"].detach().transpose(1, 2).contiguous().requires_grad_()
    found, want = mamba_inner_fn(**(p | {"xz": tokens.transpose(1, 2)})), mamba_inner_fn(**p)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(tokens.grad.transpose(1, 2), p["xz"].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_order_equals_gathering(reverse):
    p = inputs(L=9)
    order = torch.stack([torch.randperm(9) for _ in range(2)])
    walk = order.flip(1) if reverse else order
    index = walk[:, None].expand(2, 8, 9)
    gathered = mamba_inner_fn(**(p | {"xz": p["xz"].gather(2, index)}))
    want = torch.zeros_like(gathered).scatter(1, walk[..., None].expand_as(gathered), gathered)
    found = mamba_inner_fn(**p, scan_order=order, reverse=reverse)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-11)


def test_packed_sequences_are_apart():
    p = inputs(L=9)
    seq = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]] * 2)
    found = mamba_inner_fn(**p, seq_idx=seq)
    parts = [mamba_inner_fn(**(p | {"xz": part})) for part in p["xz"].split([4, 5], dim=2)]
    torch.testing.assert_close(found, torch.cat(parts, 1), rtol=1e-10, atol=1e-11)


def test_checkpointing_keeps_less():
    def kept(level):
        p, sizes = inputs(D=32, L=64, dtype=torch.float32), {}

        def pack(t):
            sizes[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            mamba_inner_fn(**p, checkpoint_lvl=level)
        return sum(sizes.values())

    assert kept(1) < 0.5 * kept(0)


def test_autocast():
    p = inputs(D=8, L=11, dtype=torch.float32)
    want = mamba_inner_fn(**p)
    with torch.autocast("cpu", torch.bfloat16):
        found = mamba_inner_fn(**(p | {"xz": p["xz"].bfloat16()}))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), want, rtol=0.1, atol=0.1 * float(want.detach().abs().max()))
    found.float().sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in p.values())


@pytest.mark.parametrize("level", [0, 1])
def test_compiles_whole(level):
    p = inputs(dtype=torch.float32)
    order = torch.stack([torch.randperm(7) for _ in range(2)])
    compiled = torch.compile(mamba_inner_fn, fullgraph=True, backend="aot_eager")
    want = mamba_inner_fn(**p, scan_order=order, checkpoint_lvl=level)
    found = compiled(**p, scan_order=order, checkpoint_lvl=level)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad(o.sum(), list(p.values())) for o in (found, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xz": torch.zeros(2, 7, 5)}, "xz"),
        ({"conv1d_weight": torch.zeros(5, 1, 4)}, "conv1d_weight"),
        ({"x_proj_weight": torch.zeros(3, 4)}, "x_proj_weight"),
        ({"delta_proj_weight": torch.zeros(3, 2)}, "delta_proj_weight"),
        ({"A": torch.zeros(4, 3, dtype=torch.complex64)}, "complex"),
        ({"checkpoint_lvl": 2}, "checkpoint_lvl"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        mamba_inner_fn(**(inputs(dtype=torch.float32) | change))
