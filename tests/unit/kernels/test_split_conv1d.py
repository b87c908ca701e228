"""The inside of a Mamba-2 block against its equations, step by step in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from bestiary.kernels import mamba_split_conv1d_scan_combined
from bestiary.kernels.ssd.split_conv1d import rms_norm_gated

OP = "ssd"
F64 = torch.float64
INF = float("inf")
H, P, G, N, W = 4, 6, 2, 5, 4
DIM, CONV = H * P, H * P + 2 * G * N


def inputs(L=11, mlp=0, B=2, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=F64) * scale).to(dtype)

    return dict(
        zxbcdt=rand(B, L, 2 * mlp + DIM + CONV + H), conv_weight=rand(CONV, W, scale=0.5), conv_bias=rand(CONV),
        dt_bias=rand(H), A=-torch.rand(H, generator=g, dtype=F64).to(dtype) - 0.1, D=rand(H), S0=rand(B, H, P, N),
        norm=rand(DIM), out_weight=rand(7, mlp + DIM, scale=0.2), out_bias=rand(7),
    )  # fmt: skip


def block(p, **options):
    return mamba_split_conv1d_scan_combined(
        p["zxbcdt"], p["conv_weight"], p["conv_bias"], p["dt_bias"], p["A"], p["D"], 4, p["S0"],
        return_final_states=True, rmsnorm_weight=p["norm"], outproj_weight=p["out_weight"],
        outproj_bias=p["out_bias"], headdim=P, ngroups=G, **options,
    )  # fmt: skip


def naive(p, norm_before_gate=True, limit=(0.0, INF), eps=1e-6, activation="silu"):
    p = {k: v if v is None else v.double() for k, v in p.items()}
    batch, L, width = p["zxbcdt"].shape
    mlp = (width - DIM - CONV - H) // 2
    one, two, z, xBC, dt = p["zxbcdt"].split([mlp, mlp, DIM, CONV, H], -1)
    taps = F.pad(xBC, (0, 0, W - 1, 0))
    xBC = p["conv_bias"] + sum(taps[:, k : k + L] * p["conv_weight"][:, k] for k in range(W))
    xBC = xBC if activation is None else xBC * torch.sigmoid(xBC)
    x, B, C = xBC.split([DIM, G * N, G * N], -1)
    x, S = x.reshape(batch, L, H, P), p["S0"]
    B, C = (m.reshape(batch, L, G, N).repeat_interleave(H // G, 2) for m in (B, C))
    d = F.softplus(dt + p["dt_bias"]).clamp(*limit)
    ys = []
    for t in range(L):
        S = S * torch.exp(d[:, t] * p["A"])[..., None, None]
        S = S + (d[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        skip = 0 if p["D"] is None else x[:, t] * p["D"].reshape(H, -1)
        ys.append((S * C[:, t, :, None]).sum(-1) + skip)
    y, gate = torch.stack(ys, 1).flatten(2), z * torch.sigmoid(z)
    if p["norm"] is None:
        y = y * gate
    else:
        y = y if norm_before_gate else y * gate
        groups = y.reshape(batch, L, G, DIM // G)
        y = (groups / (groups.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(2) * p["norm"]
        y = y * gate if norm_before_gate else y
    out = torch.cat([one * torch.sigmoid(one) * two, y], -1)
    if p["out_weight"] is not None:
        out = out @ p["out_weight"].t() + (0 if p["out_bias"] is None else p["out_bias"])
    return out, S


def close(found, want, tolerance=1e-5):
    for f, w in zip(found, want, strict=True):
        assert f.shape == w.shape
        torch.testing.assert_close(f.double(), w.double(), rtol=0, atol=tolerance * float(w.abs().max() + 1e-6))


def gradients(function, p):
    leaves = {k: v.detach().clone().requires_grad_() for k, v in p.items() if v is not None}
    outputs = function({k: leaves.get(k) for k in p})
    g = torch.Generator().manual_seed(1)
    sum((o * torch.randn(o.shape, generator=g, dtype=F64).to(o.dtype)).sum() for o in outputs).backward()
    return [o.detach() for o in outputs], [v.grad for v in leaves.values()]


def check(p, backend, options, **oracle):
    found, grads = gradients(lambda q: block(q, backend=backend, **options), p)
    want, want_grads = gradients(lambda q: naive(q, **oracle), p)
    close(found, want)
    close(grads, want_grads, 1e-4)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("mlp", [0, 3])
@pytest.mark.parametrize("left_out", [(), ("norm",), ("out_weight", "out_bias"), ("norm", "out_weight", "out_bias")])
def test_equals_the_equations(backend, before, mlp, left_out):
    p = inputs(mlp=mlp) | dict.fromkeys(left_out)
    check(p, backend, {"norm_before_gate": before}, norm_before_gate=before)


def test_options_reach_their_parts(backend):
    p = inputs(L=70) | {"D": torch.randn(H, P), "out_bias": None}
    check(p, backend, {"dt_limit": (0.4, 0.8), "rmsnorm_eps": 0.1}, limit=(0.4, 0.8), eps=0.1)
    check(p, backend, {"activation": None}, activation=None)
    check(p, backend, {"activation": "swish"})
    check(inputs() | {"D": None}, backend, {})
    assert block(p, backend=backend, state_dtype=torch.bfloat16)[1].dtype == torch.bfloat16
    no_states = mamba_split_conv1d_scan_combined(
        *(p[k] for k in ("zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A", "D")), 256, ngroups=G, backend=backend
    )
    bare = p | dict.fromkeys(("norm", "out_weight", "out_bias")) | {"S0": torch.zeros_like(p["S0"])}
    close([no_states], naive(bare)[:1])


def test_packed_rows_equal_separate_sequences(backend):
    p = inputs()
    seq = torch.tensor([0] * 4 + [1] + [2] * 6).int().expand(2, -1)

    def separate(q):
        outs, states = [], None
        for lo, hi in ((0, 4), (4, 5), (5, 11)):
            start = q["S0"] if lo == 0 else torch.zeros_like(q["S0"])
            out, states = naive(q | {"zxbcdt": q["zxbcdt"][:, lo:hi], "S0": start})
            outs.append(out)
        return torch.cat(outs, 1), states

    found, grads = gradients(lambda q: block(q, seq_idx=seq, backend=backend), p)
    want, want_grads = gradients(separate, p)
    close(found, want)
    close(grads, want_grads, 1e-4)


@pytest.mark.parametrize("reverse", [False, True])
def test_order_is_gather_and_scatter(backend, reverse):
    g = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(11, generator=g) for _ in range(2)])
    walked, rows = order.flip(1) if reverse else order, torch.arange(2)[:, None]

    def oracle(q):
        out, last = naive(q | {"zxbcdt": q["zxbcdt"][rows, walked]})
        return out[rows, walked.argsort(1)], last

    found, grads = gradients(lambda q: block(q, scan_order=order, reverse=reverse, backend=backend), inputs())
    want, want_grads = gradients(oracle, inputs())
    close(found, want)
    close(grads, want_grads, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    p = inputs(L=40)
    half = {k: v.to(dtype) if k in ("zxbcdt", "conv_weight", "conv_bias", "out_weight", "out_bias") else v
            for k, v in p.items()}  # fmt: skip
    out, last = block(half, backend=backend)
    want, want_last = naive(half)
    assert (out.dtype, last.dtype) == (dtype, torch.float32)
    close([out, last], [want, want_last], 2e-2)


def test_strides_and_empty_batch(backend):
    p = inputs(mlp=3)
    wide = torch.randn(11, 2, 100)
    width = p["zxbcdt"].shape[2]
    wide[..., 5 : 5 + width] = p["zxbcdt"].transpose(0, 1)
    view = wide.transpose(0, 1)[..., 5 : 5 + width]
    close(block(p | {"zxbcdt": view}, backend=backend), naive(p))
    empty = block(p | {"zxbcdt": view[:0], "S0": p["S0"][:0]}, backend=backend)
    assert [t.shape for t in empty] == [(0, 11, 7), (0, H, P, N)]


def test_gradients():
    names = list(inputs())

    def function(*tensors):
        return block(dict(zip(names, tensors, strict=True)), backend="reference")

    leaves = [v.requires_grad_() for v in inputs(L=6, mlp=1, B=1, dtype=F64).values()]
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


def test_upstreams_positions(backend):
    p = inputs(L=6)
    seq = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2, dtype=torch.int32)
    head = [p[k] for k in ("zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A", "D")]
    tail = ["silu", p["norm"], 1e-3, p["out_weight"], p["out_bias"], P, G, False]
    out = mamba_split_conv1d_scan_combined(*head, 4, p["S0"], seq, (0.1, 3.0), False, *tail, backend=backend)
    for part, start in ((slice(0, 3), p["S0"]), (slice(3, 6), torch.zeros_like(p["S0"]))):
        one = p | {"zxbcdt": p["zxbcdt"][:, part], "S0": start}
        close([out[:, part]], naive(one, False, (0.1, 3.0), 1e-3)[:1])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 6, 16])
def test_other_groups_and_heads(backend, groups, size, monkeypatch):
    for name, value in {"G": groups, "P": size, "DIM": H * size, "CONV": H * size + 2 * groups * N}.items():
        monkeypatch.setitem(globals(), name, value)
    # a norm over a single channel leaves its sign alone, whose gradient is rounding
    p = inputs(mlp=2) | (dict.fromkeys(["norm"]) if size == 1 else {})
    check(p, backend, {})


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_chunk_size_changes_nothing(backend, chunk):
    p = inputs(L=70)
    head = [p[k] for k in ("zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A", "D")]
    outs = [
        mamba_split_conv1d_scan_combined(*head, c, headdim=P, ngroups=G, rmsnorm_weight=p["norm"], backend=backend)
        for c in (chunk, 64)
    ]
    close(outs[:1], outs[1:])


def test_autocast_touches_the_projection_alone(backend):
    p = inputs()
    bare = p | dict.fromkeys(("out_weight", "out_bias"))
    want = block(bare, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found, (out, _) = block(bare, backend=backend), block(p, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert out.dtype == torch.bfloat16


def test_gradient_of_a_subset(backend):
    p = inputs()
    _, whole = gradients(lambda q: block(q, backend=backend)[:1], p)
    for name, want in zip(p, whole, strict=True):
        some = {k: v.clone().requires_grad_(k == name) for k, v in p.items()}
        out = block(some, backend=backend)[0]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=F64).float()
        (out * weight).sum().backward()
        close([some[name].grad], [want], 1e-6)


def test_compiles_whole(backend):
    p = inputs()
    compiled = torch.compile(lambda q: block(q, backend=backend), fullgraph=True, backend="aot_eager")
    results = [gradients(f, p) for f in (lambda q: block(q, backend=backend), compiled)]
    for found, want in zip(*results, strict=True):
        close(found, want, 1e-6)


@pytest.mark.parametrize("size", [None, 4, 12])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_norm(size, before, gated):
    x, z, weight = torch.randn(3, 12), torch.randn(3, 12) if gated else None, torch.randn(12)
    found = rms_norm_gated(x, weight, z, eps=1e-3, group_size=size, norm_before_gate=before)
    gate = 1 if z is None else F.silu(z)
    y = x if before else x * gate
    parts = [F.rms_norm(part, part.shape[-1:], None, 1e-3) for part in y.split(size or 12, -1)]
    want = torch.cat(parts, -1) * weight * (gate if before else 1)
    torch.testing.assert_close(found, want)
    half = rms_norm_gated(1e3 * x.half(), weight, None if z is None else z.half(), group_size=size)
    assert half.dtype == torch.float16
    assert torch.isfinite(half).all()  # the squares would not fit into float16
    for change in ({"weight": weight[1:]}, {"group_size": 5}, {"z": x[:, 1:]}):
        with pytest.raises(ValueError, match="rms_norm_gated"):
            rms_norm_gated(**({"x": x, "weight": weight} | change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zxbcdt": torch.zeros(2, 72)}, "needs zxbcdt"),
        ({"zxbcdt": torch.zeros(2, 11, 71)}, "zxbcdt must be"),
        ({"zxbcdt": torch.zeros(2, 11, 73)}, "zxbcdt must be"),
        ({"conv_weight": torch.zeros(CONV + 1, W)}, "conv1d_weight must be"),
        ({"conv_bias": torch.zeros(3)}, "bias must be"),
        ({"D": torch.zeros(3)}, "D must be"),
        ({"A": torch.zeros(3), "D": None}, "divisor"),
        ({"dt_bias": torch.zeros(3)}, "dt_bias must be"),
        ({"norm": torch.zeros(3)}, "rmsnorm_weight must be"),
        ({"out_weight": torch.zeros(7, 3)}, "outproj_weight must be"),
        ({"out_weight": None}, "outproj_bias must be left out"),
    ],
)
def test_wrong_shapes_are_one_clear_error(change, words):
    with pytest.raises(ValueError, match=words):
        block(inputs() | change)


def test_head_size_must_be_known():
    p = inputs()
    with pytest.raises(ValueError, match="headdim must be P, and given"):
        mamba_split_conv1d_scan_combined(p["zxbcdt"], p["conv_weight"], None, p["dt_bias"], p["A"], p["D"], 4)
