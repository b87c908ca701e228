"""Mamba-2's scan against its definition, written here step by step in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from bestiary.kernels import mamba_chunk_scan_combined, ssd_minimal_discrete

OP = "ssd"
F64 = torch.float64
TOKENS = ("x", "dt", "B", "C", "z")
INF = float("inf")


def naive(p, softplus=True, limit=(0.0, INF), seq_idx=None):
    """One step after the other; everything in float64."""
    x, dt, A, B, C, D, z, bias, S = (p[k] if p[k] is None else p[k].double() for k in ARGUMENTS)
    batch, L, H, P = x.shape
    B, C = (m.repeat_interleave(H // m.shape[2], 2) for m in (B, C))
    S = torch.zeros(batch, H, P, B.shape[3], dtype=F64) if S is None else S
    ys = []
    for t in range(L):
        if seq_idx is not None and t:
            S = S * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        d = dt[:, t] if bias is None else dt[:, t] + bias
        d = (F.softplus(d) if softplus else d).clamp(*limit)
        S = torch.exp(d * A)[..., None, None] * S + (d[..., None] * x[:, t])[..., None] * B[:, t, :, None]
        y = (S * C[:, t, :, None]).sum(-1)
        if D is not None:
            y = y + x[:, t] * (D if D.ndim == 2 else D[:, None])
        ys.append(y if z is None else y * F.silu(z[:, t]))
    return torch.stack(ys, 1), S


ARGUMENTS = ("x", "dt", "A", "B", "C", "D", "z", "bias", "S0")


def inputs(B=2, L=9, H=4, P=5, G=2, N=7, seed=0, dtype=torch.float32, D_per_channel=False):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=F64).to(dtype)

    return dict(
        x=rand(B, L, H, P), dt=rand(B, L, H), A=-torch.rand(H, generator=g, dtype=F64).to(dtype) * 4 - 0.1,
        B=rand(B, L, G, N), C=rand(B, L, G, N), D=rand(H, P) if D_per_channel else rand(H), z=rand(B, L, H, P),
        bias=rand(H), S0=rand(B, H, P, N),
    )  # fmt: skip


def scan(p, chunk=64, softplus=True, **options):
    return mamba_chunk_scan_combined(
        p["x"], p["dt"], p["A"], p["B"], p["C"], chunk, p["D"], p["z"], p["bias"], p["S0"],
        dt_softplus=softplus, return_final_states=True, **options,
    )  # fmt: skip


def cut(p, part, **changes):
    return {k: v[:, part] if k in TOKENS and v is not None else v for k, v in p.items()} | changes


def close(found, want, tolerance=1e-5):
    """Within the tolerance of the largest number: sums of terms of that size cannot be better."""
    for f, w in zip(found, want, strict=True):
        assert f.shape == w.shape
        assert torch.isfinite(f).all()
        if w.numel():
            error, scale = float((f.double() - w.double()).abs().max()), float(w.abs().max())
            assert error <= tolerance * max(scale, 1e-6), (error, scale)


def gradients(function, p):
    """Outputs, and gradients of a loss that weighs every output differently."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in p.items() if v is not None}
    outputs = function({k: leaves.get(k) for k in p})
    g = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=g, dtype=F64).to(o.dtype)).sum() for o in outputs)
    loss.backward()
    return [o.detach() for o in outputs], [v.grad for v in leaves.values()]


def check(p, backend, options=None, oracle=None, **both):
    found, grads = gradients(lambda q: scan(q, backend=backend, **(options or {}), **both), p)
    want, want_grads = gradients(oracle or (lambda q: naive(q, **(options or {}))), p)
    close(found, want)
    close(grads, want_grads, 1e-4)


@pytest.mark.parametrize("L", [1, 63, 64, 65, 130, 300])
def test_equals_the_definition(backend, L):
    check(inputs(L=L, seed=L), backend)


@pytest.mark.parametrize(("P", "N"), [(1, 1), (16, 16), (64, 128), (80, 7), (15, 1), (5, 300), (17, 33)])
def test_odd_and_large_sizes(backend, P, N):
    check(inputs(B=1, L=67, H=2, P=P, G=1, N=N), backend)


@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("D_per_channel", [False, True])
def test_groups_and_skips(backend, G, D_per_channel):
    check(inputs(L=70, G=G, D_per_channel=D_per_channel), backend)


@pytest.mark.parametrize("names", itertools.combinations(("D", "z", "bias", "S0"), 3))
def test_arguments_that_are_left_out(backend, names):
    check(inputs() | dict.fromkeys(names), backend)
    out = mamba_chunk_scan_combined(*(inputs()[k] for k in ARGUMENTS[:5]), 64, backend=backend)
    want = naive(inputs() | dict.fromkeys(("D", "z", "bias", "S0")), softplus=False)[0]
    close([out], [want])  # without the softplus a negative step is clamped to none


@pytest.mark.parametrize("chunk", [1, 7, 32, 256])
def test_chunk_size_changes_nothing(backend, chunk):
    check(inputs(L=70), backend, chunk=chunk)


@pytest.mark.parametrize("limit", [(0.5, INF), (0.0, 0.9), (0.5, 0.9), (1e-3, 1e-3)])
def test_limits_of_the_step_and_their_gradient(backend, limit):
    check(inputs(L=20), backend, {"dt_limit": limit}, lambda p: naive(p, limit=limit))


SEQ = torch.tensor([[3, 3, 3, 1, 1, 3, 3, 2, 2], [0, 4, 4, 4, 4, 4, 4, 4, 1]], dtype=torch.int32)


@pytest.mark.parametrize("chunk", [2, 4, 64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_rows_reset_the_state(backend, chunk, dtype):
    check(inputs(), backend, {"seq_idx": SEQ.to(dtype)}, chunk=chunk)


def test_long_packed_rows(backend):
    lengths = torch.tensor([1, 70, 2, 63, 64, 40])
    seq = torch.arange(6).repeat_interleave(lengths).expand(2, -1).contiguous()
    check(inputs(L=240, N=5, P=3), backend, {"seq_idx": seq})


def test_packed_rows_equal_separate_sequences(backend):
    """Values and gradients; the initial state belongs to the first sequence."""

    def separate(p):
        outs = []
        for b in range(2):
            edges = [0] + [t for t in range(1, 9) if SEQ[b, t] != SEQ[b, t - 1]] + [9]
            one = {k: v[b : b + 1] if k in (*TOKENS, "S0") else v for k, v in p.items()}
            parts = []
            for lo, hi in itertools.pairwise(edges):
                start = one["S0"] if lo == 0 else None
                out, last = scan(cut(one, slice(lo, hi), S0=start), backend=backend)
                parts.append(out)
            outs.append((torch.cat(parts, 1), last))
        return [torch.cat(t) for t in zip(*outs, strict=True)]

    found, grads = gradients(lambda p: scan(p, seq_idx=SEQ, backend=backend), inputs())
    want, want_grads = gradients(separate, inputs())
    close(found, want)
    close(grads, want_grads, 1e-4)


@pytest.mark.parametrize("cu", [[0, 3, 70, 130], [0, 130], [0, 1, 1, 64, 128, 130]])
@pytest.mark.parametrize("reverse", [False, True])
def test_states_of_packed_sequences(backend, cu, reverse):
    p = inputs(B=1, L=130)
    edges = torch.tensor(cu, dtype=torch.int32)
    out, _, states = scan(p, cu_seqlens=edges, return_varlen_states=True, reverse=reverse, backend=backend)
    p["x"].requires_grad_()
    assert not scan(p, cu_seqlens=edges, return_varlen_states=True, backend=backend)[2].requires_grad
    p["x"].requires_grad_(False)
    first = next(i for i in (range(len(cu) - 2, -1, -1) if reverse else range(len(cu) - 1)) if cu[i] < cu[i + 1])
    for i, (lo, hi) in enumerate(itertools.pairwise(cu)):
        if lo == hi:
            assert not states[i].any()
            continue
        want, state = scan(cut(p, slice(lo, hi), S0=p["S0"] if i == first else None), reverse=reverse, backend=backend)
        close([out[:, lo:hi], states[i : i + 1]], [want, state])
    bare = mamba_chunk_scan_combined(
        *(p[k] for k in ARGUMENTS[:5]), 64, cu_seqlens=edges, return_varlen_states=True, backend=backend
    )
    assert [t.shape for t in bare] == [out.shape, states.shape]
    plain = mamba_chunk_scan_combined(*(p[k] for k in ARGUMENTS[:5]), 64, cu_seqlens=edges, backend=backend)
    close([plain], [bare[0]])


@pytest.mark.parametrize("cutting", [1, 4, 8])
def test_a_carried_state_continues_a_sequence(backend, cutting):
    def halves(p):
        a, state = scan(cut(p, slice(None, cutting)), backend=backend)
        b, last = scan(cut(p, slice(cutting, None), S0=state), backend=backend)
        return torch.cat([a, b], 1), last

    check(inputs(), backend)
    found, grads = gradients(halves, inputs())
    want, want_grads = gradients(naive, inputs())
    close(found, want)
    close(grads, want_grads, 1e-4)


def test_padding_with_steps_of_zero_changes_nothing(backend):
    p = inputs(L=20)
    longer = {k: F.pad(v, (0, 0) * (v.ndim - 2) + (0, 5)) if k in TOKENS else v for k, v in p.items()}
    longer["dt"] = F.pad(p["dt"], (0, 0, 0, 5), value=-1e4)
    out, last = scan(longer, backend=backend)
    close([out[:, :20], last], scan(p, backend=backend))


def orders(B, L, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(L, generator=g) for _ in range(B)])


def gathered(p, order):
    rows = torch.arange(len(order))[:, None]
    return {k: v[rows, order] if k in TOKENS and v is not None else v for k, v in p.items()}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_scan_order_is_gather_scan_scatter(backend, dtype, reverse, packed):
    order = orders(2, 9)
    walked = order.flip(1) if reverse else order
    rows = torch.arange(2)[:, None]

    def oracle(p):
        out, last = naive(gathered(p, walked), seq_idx=SEQ[rows, walked] if packed else None)
        return out[rows, walked.argsort(1)], last

    options = {"scan_order": order.to(dtype), "reverse": reverse, "seq_idx": SEQ if packed else None}
    check(inputs(), backend, options, oracle)


def test_reverse_is_flip(backend):
    def oracle(p):
        out, last = naive({k: v.flip(1) if k in TOKENS else v for k, v in p.items()})
        return out.flip(1), last

    check(inputs(L=70), backend, {"reverse": True}, oracle)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_a_float32_state(backend, dtype):
    p = inputs(L=65, P=16, N=16)
    half = {k: v.to(dtype) if k in TOKENS else v for k, v in p.items()}
    want, want_last = naive(half)
    out, last = scan(half, backend=backend)
    assert (out.dtype, last.dtype) == (dtype, torch.float32)
    close([last], [want_last])
    close([out], [want], 5e-3 if dtype == torch.bfloat16 else 1e-3)
    full, small = scan(half, backend=backend, out_dtype=torch.float32, state_dtype=dtype)
    assert (full.dtype, small.dtype) == (torch.float32, dtype)
    close([full], [want])
    _, grads = gradients(lambda q: scan(q, backend=backend), half)
    _, want_grads = gradients(naive, half)
    assert all(g.dtype == half[k].dtype for k, g in zip(half, grads, strict=True))
    close(grads, want_grads, 2e-2)


def test_any_strides_and_shared_storage(backend):
    p = inputs(L=33, H=4, P=6, G=1, N=6)
    big = torch.randn(2, 33, 2 * 24 + 2 * 6 + 4)  # as a projection leaves it: z, x, B, C, dt side by side
    z, x, B, C, dt = big.split([24, 24, 6, 6, 4], -1)
    p |= dict(x=x.unflatten(2, (4, 6)), z=z.unflatten(2, (4, 6)), B=B[:, :, None], C=C[:, :, None], dt=dt)
    check(p, backend)
    want = naive(p)
    close(scan(p, backend=backend), want)
    p["x"] = p["x"].transpose(1, 2).contiguous().transpose(1, 2)
    p["B"] = p["B"][:, :1].expand(-1, 33, -1, -1)
    p["D"] = p["D"][:, None].expand(-1, 6)
    close(scan(p, backend=backend), naive(p))


def test_empty_batch(backend):
    p = {k: v[:0] if k in (*TOKENS, "S0") else v for k, v in inputs().items()}
    out, last = scan(p, backend=backend)
    assert (out.shape, last.shape) == ((0, 9, 4, 5), (0, 4, 5, 7))


def test_gradient_of_a_subset(backend):
    p = inputs(L=20)
    _, whole = gradients(lambda q: scan(q, backend=backend)[:1], p)
    for name, want in zip(p, whole, strict=True):
        some = {k: v.clone().requires_grad_(k == name) for k, v in p.items()}
        out = scan(some, backend=backend)[0]
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=F64).float()
        (out * weight).sum().backward()
        close([some[name].grad], [want], 1e-6)


@pytest.mark.parametrize("bias", [-20.0, -3.0, 3.0, 20.0])
@pytest.mark.parametrize("A", [-16.0, -1.0, -1e-3])
def test_strong_and_weak_decays(backend, bias, A):
    """Upper triangles would overflow, products underflow, and sums of large exponents cancel."""
    p = inputs(L=100, H=2, G=1)
    p |= dict(A=torch.full((2,), A), bias=torch.full((2,), bias), dt=p["dt"] * 0.5)
    check(p, backend)


def test_mixed_decays_do_not_cancel():
    """After steps that erase everything the reference still knows small decays exactly."""
    p = inputs(L=64, H=2, G=1)
    p["dt"] = torch.where(torch.arange(64)[:, None] < 32, 40.0, -3.0).expand(2, 64, 2).contiguous()
    p["A"] = torch.tensor([-16.0, -8.0])
    close(scan(p, backend="reference"), naive(p), 1e-6)


def test_under_autocast_nothing_is_rounded(backend):
    p = inputs(L=20)
    want = scan(p, backend=backend)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scan(p, backend=backend)[0], want)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_properties(data):
    """A cut anywhere, a chunk of any size, an order and its inverse: the same result."""
    L = data.draw(st.integers(2, 40))
    G = data.draw(st.sampled_from([1, 2, 4]))
    p = inputs(B=1, L=L, G=G, P=data.draw(st.integers(1, 6)), N=data.draw(st.integers(1, 9)), dtype=F64, seed=L)
    out, last = scan(p, backend="reference")
    other = scan(p, data.draw(st.integers(1, 50)), backend="reference")
    close(other, (out, last), 1e-12)
    at = data.draw(st.integers(1, L - 1))
    a, state = scan(cut(p, slice(None, at)), backend="reference")
    b, end = scan(cut(p, slice(at, None), S0=state), backend="reference")
    close((torch.cat([a, b], 1), end), (out, last), 1e-12)
    order = torch.tensor([data.draw(st.permutations(range(L)))])
    moved = gathered(p, order.argsort(1))  # token t stands at order[t], which is where the walk looks for it
    found, found_last = scan(moved, scan_order=order, backend="reference")
    close((found[:, order[0]], found_last), (out, last), 1e-12)


def as_function(**options):
    def function(x, dt, A, B, C, D, z, bias, S0):
        p = dict(zip(ARGUMENTS, (x, dt, A, B, C, D, z, bias, S0), strict=True))
        return scan(p, chunk=3, backend="reference", **options)

    return function


def small(**sizes):
    p = inputs(**(dict(B=2, L=7, H=2, P=2, G=1, N=2, dtype=F64) | sizes))
    return [p[k].requires_grad_() for k in ARGUMENTS]


SMALL_SEQ = SEQ[:, :7]


@pytest.mark.parametrize(
    "options",
    [{}, {"seq_idx": SMALL_SEQ, "reverse": True}, {"scan_order": orders(2, 7), "seq_idx": SMALL_SEQ}],
    ids=["plain", "packed", "ordered"],
)
def test_gradients(options):
    assert gradcheck(as_function(**options), small())
    assert gradgradcheck(as_function(**options), small(D_per_channel=True), fast_mode=True)


def test_backward_is_linear_in_length():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Elements(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                Elements.total += out.numel() + 1
            return out

    def cost(L):
        p = {k: v.requires_grad_() for k, v in inputs(1, L, 2, 4, 1, 4).items()}
        Elements.total = 0
        with Elements():
            scan(p, 8, backend="reference")[0].sum().backward()
        return Elements.total

    assert cost(512) < 2.2 * cost(256)


@pytest.mark.parametrize("options", [{}, {"seq_idx": SEQ, "scan_order": orders(2, 9)}], ids=["plain", "ordered"])
def test_compiles_whole(backend, options):
    def function(p):
        return scan(p, 4, backend=backend, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [gradients(f, inputs()) for f in (function, compiled)]
    for found, want in zip(*results, strict=True):
        close(found, want, 1e-6)


@pytest.mark.parametrize("block", [4, 12])
@pytest.mark.parametrize("axes", [4, 5])
def test_minimal_is_the_scan_on_discrete_inputs(block, axes):
    p = inputs(L=12, G=4, dtype=F64) | dict.fromkeys(("D", "z", "bias"))
    d = p["dt"].abs()
    start = p["S0"] if axes == 4 else p["S0"][:, None]
    found = ssd_minimal_discrete(p["x"] * d[..., None], p["A"] * d, p["B"], p["C"], block, start)
    close(found, naive(p | {"dt": d}, softplus=False), 1e-12)
    for name, change in (("block_len", {"block_len": 5}), ("A must", {"A": p["A"]}), ("C must", {"C": p["C"][..., 1:]}),
                         ("initial_states", {"initial_states": p["S0"][:1]})):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            ssd_minimal_discrete(**(dict(X=p["x"], A=d, B=p["B"], C=p["C"], block_len=4) | change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 9, 20)}, "needs x"),
        ({"x": torch.zeros(2, 0, 4, 5)}, "at least one token"),
        ({"dt": torch.zeros(2, 9, 3)}, "dt must be"),
        ({"A": torch.zeros(4, 5)}, "A must be"),
        ({"B": torch.zeros(2, 9, 3, 7)}, "B must be"),
        ({"C": torch.zeros(2, 9, 2, 6)}, "C must be"),
        ({"D": torch.zeros(4, 4)}, "D must be"),
        ({"z": torch.zeros(2, 9, 4)}, "z must be"),
        ({"bias": torch.zeros(5)}, "dt_bias must be"),
        ({"S0": torch.zeros(2, 4, 7, 5)}, "initial_states must be"),
    ],
)
def test_wrong_shapes_are_one_clear_error(change, words):
    with pytest.raises(ValueError, match=words):
        scan(inputs() | change)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_idx": SEQ[:, 1:]}, "seq_idx must be"),
        ({"chunk": 0}, "chunk_size"),
        ({"dt_limit": (1.0, 0.5)}, "dt_limit"),
        ({"scan_order": torch.zeros(2, 9)}, "int32 or int64"),
        ({"scan_order": orders(2, 8)}, "scan_order must be"),
        ({"return_varlen_states": True}, "needs cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "batch of one"),
    ],
)
def test_wrong_options_are_one_clear_error(options, words):
    with pytest.raises(ValueError, match=words):
        scan(inputs(), **options)


@pytest.mark.parametrize("cu", [[0, 5], [1, 9], [0, 6, 4, 9], [0.0, 9.0], [[0, 9]]])
def test_wrong_cu_seqlens(cu):
    with pytest.raises(ValueError, match="cu_seqlens must"):
        scan(inputs(B=1), cu_seqlens=torch.tensor(cu))
