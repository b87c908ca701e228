"""One step of a scan: against its definition in float64, and against the scan of which it is a step."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from bestiary.kernels import (
    BackendUnavailableError,
    mamba_chunk_scan_combined,
    selective_scan_fn,
    selective_state_update,
    selective_state_update_ref,
)
from bestiary.kernels.backends import why_absent

OP = "state_update"
F64 = torch.float64
ARGUMENTS = ("state", "x", "dt", "A", "B", "C", "D", "z", "bias")
BATCHED = ("state", "x", "dt", "B", "C", "z")


def usable(op):
    """The backends that run here: a test of Hypothesis asks itself, instead of taking the fixture."""
    return [name for name in ("reference", "cpu") if why_absent(op, name) is None]


def naive(p, softplus=True):
    """The definition in float64: out and new state, for any number of axes before the state."""
    state, x, dt, A, B, C, D, z, bias = (p[k] if p[k] is None else p[k].double() for k in ARGUMENTS)
    heads = x.shape[1] if x.ndim == 3 else 1
    B, C = (m if m.ndim == 2 else m.repeat_interleave(heads // m.shape[1], 1) for m in (B, C))
    B, C = (m.reshape(len(m), *[1] * (x.ndim - m.ndim + 1), m.shape[-1]) if m.ndim == 2 else m[:, :, None]
            for m in (B, C))  # fmt: skip
    d = dt if bias is None else dt + bias
    d = F.softplus(d) if softplus else d
    new = state * torch.exp(d[..., None] * A) + (d * x)[..., None] * B
    out = (new * C).sum(-1)
    out = out if D is None else out + D * x
    return out if z is None else out * F.silu(z), new


def inputs(heads=(4, 5), N=7, G=2, B=3, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=F64).to(dtype)

    maps = (B, N) if G is None else (B, G, N)
    return dict(
        state=rand(B, *heads, N), x=rand(B, *heads), dt=rand(B, *heads),
        A=-torch.rand(*heads, N, generator=g, dtype=F64).to(dtype) * 4 - 0.1, B=rand(*maps), C=rand(*maps),
        D=rand(*heads), z=rand(B, *heads), bias=rand(*heads),
    )  # fmt: skip


def step(p, softplus=True, indices=None, **options):
    return selective_state_update(*(p[k] for k in ARGUMENTS), softplus, indices, **options)


def close(found, want, tolerance=1e-5):
    assert found.shape == want.shape
    torch.testing.assert_close(found.double(), want.double(), rtol=0, atol=tolerance * float(want.abs().max() + 1e-6))


@pytest.mark.parametrize(("heads", "G"), [((5,), None), ((4, 5), None), ((4, 5), 1), ((4, 5), 2), ((4, 16), 4)])
@pytest.mark.parametrize("N", [1, 7, 16, 128, 300])
def test_equals_the_definition(backend, heads, G, N):
    p = inputs(heads, N, G)
    want, new = naive(p)
    state, storage = p["state"], p["state"].data_ptr()
    close(step(p, backend=backend), want)
    close(state, new)
    assert state.data_ptr() == storage


@pytest.mark.parametrize("P", [1, 15, 17, 64, 130])
@pytest.mark.parametrize("heads", [(), (3,)])
def test_odd_sizes(backend, P, heads):
    p = inputs((*heads, P), 16, None)
    want, new = naive(p)
    close(step(p, backend=backend), want)
    close(p["state"], new)


@pytest.mark.parametrize("heads", [(5,), (4, 5)])
@pytest.mark.parametrize("names", [("D",), ("bias",), ("z",), ("D", "bias", "z")])
@pytest.mark.parametrize("softplus", [False, True])
def test_arguments_that_are_left_out(backend, heads, names, softplus):
    """D=None and dt_bias=None crash upstream."""
    p = inputs(heads, G=None) | dict.fromkeys(names)
    want, new = naive(p, softplus)
    close(step(p, softplus, backend=backend), want)
    close(p["state"], new)


@pytest.mark.parametrize("softplus", [False, True])
def test_one_number_per_head_without_memory(backend, softplus):
    """Mamba-2 expands A, dt and dt_bias to channels and states; that is recognised and changes nothing."""
    p = inputs((4, 5))
    p |= {"A": p["A"][:, :1, :1].expand(4, 5, 7), "dt": p["dt"][..., :1].expand(3, 4, 5)}
    p |= {"bias": p["bias"][:, :1].expand(4, 5), "D": p["D"][:, :1].expand(4, 5)}
    for change in ({}, {"bias": None}, {"dt": p["dt"].clone()}, {"A": p["A"].clone()}):
        q = p | change | {"state": p["state"].clone()}
        want, new = naive(q, softplus)
        close(step(q, softplus, backend=backend), want)
        close(q["state"], new)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("heads", [(5,), (4, 5)])
def test_slots(backend, dtype, heads):
    """Rows by index; a negative one is padding: output 0, and no row is touched for it."""
    p = inputs(heads, G=None, B=4)
    pool = torch.randn(6, *heads, 7)
    before, slots = pool.clone(), torch.tensor([5, -1, 0, -7], dtype=dtype)
    want, new = naive(p | {"state": before[slots.clamp(min=0).long()]})
    out = step(p | {"state": pool}, indices=slots, backend=backend)
    close(out[[0, 2]], want[[0, 2]])
    assert not out[[1, 3]].any()
    close(pool[[5, 0]], new[[0, 2]])
    assert torch.equal(pool[1:5], before[1:5])


def test_a_padded_slot_hides_what_is_not_finite(backend):
    p = inputs()
    p["x"][1] = torch.nan
    p["dt"][1] = torch.inf
    out = step(p, indices=torch.tensor([0, -1, 2]), backend=backend)
    assert torch.isfinite(out).all()
    assert torch.isfinite(p["state"]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision(backend, dtype, state_dtype):
    """All is computed in float32 and rounded once, the output from the state before it is rounded."""
    p = inputs((4, 16), 16)
    p = {k: v.to(dtype) if k in BATCHED else v for k, v in p.items()} | {"state": p["state"].to(state_dtype)}
    want, new = naive(p)
    exact = step(p | {"state": p["state"].clone()}, out_dtype=torch.float32, backend=backend)
    assert exact.dtype == torch.float32
    close(exact, want)
    out = step(p, backend=backend)
    assert (out.dtype, p["state"].dtype) == (dtype, state_dtype)
    close(out, want, 5e-3)
    close(p["state"], new, 1e-5 if state_dtype == torch.float32 else 5e-3)


def test_any_strides(backend):
    p = inputs((4, 5), B=3)
    want, new = naive(p)
    cache = torch.zeros(3, 7, 5, 4).permute(0, 3, 2, 1)
    cache.copy_(p["state"])
    packed = torch.cat([p["x"].flatten(1), p["z"].flatten(1), p["B"].flatten(1), p["C"].flatten(1)], 1)
    x, z, B, C = packed.split([20, 20, 14, 14], 1)
    q = p | dict(state=cache, x=x.unflatten(1, (4, 5)), z=z.unflatten(1, (4, 5)), B=B.unflatten(1, (2, 7)),
                 C=C.unflatten(1, (2, 7)), dt=p["dt"].transpose(1, 2).contiguous().transpose(1, 2))  # fmt: skip
    close(step(q, backend=backend), want)
    close(cache, new)


@pytest.mark.parametrize("indices", [None, torch.zeros(0, dtype=torch.int32)])
def test_empty_batch(backend, indices):
    p = {k: v[:0] if k in BATCHED else v for k, v in inputs().items()}
    assert step(p, indices=indices, backend=backend).shape == (0, 4, 5)


@settings(max_examples=25, deadline=None)
@given(st.tuples(*(st.integers(1, n) for n in (3, 4, 40, 40))), st.booleans(), st.booleans(), st.integers(0, 999))
def test_any_size(sizes, grouped, softplus, seed):
    B, H, P, N = sizes
    p = inputs((H, P), N, H if grouped else 1, B, seed)
    want, new = naive(p, softplus)
    for backend in usable(OP):
        q = p | {"state": p["state"].clone()}
        close(step(q, softplus, backend=backend), want)
        close(q["state"], new)


@pytest.mark.parametrize("bias", [-20.0, -10.0, 5.0, 20.0, 80.0])
def test_tails_of_the_softplus(backend, bias):
    """Small steps are exact to their last digits; upstream's are 0 below -16.6 and off by 0.3 % at -10."""
    p = inputs() | {"D": None, "bias": torch.full((4, 5), bias)}
    p |= {"dt": p["dt"] / 10, "state": torch.zeros(3, 4, 5, 7)}
    want, new = naive(p)
    close(step(p, backend=backend), want)
    torch.testing.assert_close(p["state"].double(), new, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bias", [-20.0, -10.0, 0.0, 10.0, 20.0])
def test_steps_are_the_scan_of_mamba_1(backend, bias):
    L, D, N, batch = 6, 5, 4, 2
    u, delta, z = (torch.randn(batch, D, L) for _ in range(3))
    A, skip, b = -torch.rand(D, N) - 0.1, torch.randn(D), torch.full((D,), bias)
    B, C = torch.randn(batch, N, L), torch.randn(batch, N, L)
    want, last = selective_scan_fn(u, delta, A, B, C, skip, z, b, True, True, backend="reference")
    state = torch.zeros(batch, D, N)
    outs = [
        selective_state_update(state, u[..., t], delta[..., t], A, B[..., t], C[..., t], skip, z[..., t], b, True,
                               backend=backend)
        for t in range(L)
    ]  # fmt: skip
    close(torch.stack(outs, -1), want)
    close(state, last)


@pytest.mark.parametrize("bias", [-20.0, -10.0, 0.0, 10.0, 20.0])
def test_steps_are_the_scan_of_mamba_2(backend, bias):
    L, H, P, G, N, batch = 6, 4, 5, 2, 3, 2
    x, z = torch.randn(batch, L, H, P), torch.randn(batch, L, H, P)
    dt, A, b, D = torch.randn(batch, L, H), -torch.rand(H) - 0.1, torch.full((H,), bias), torch.randn(H)
    B, C = torch.randn(batch, L, G, N), torch.randn(batch, L, G, N)
    want, last = mamba_chunk_scan_combined(x, dt, A, B, C, 4, D, z, b, dt_softplus=True, return_final_states=True,
                                           backend="reference")  # fmt: skip
    state = torch.zeros(batch, H, P, N)
    A_HPN, b_HP, D_HP = A[:, None, None].expand(H, P, N), b[:, None].expand(H, P), D[:, None].expand(H, P)
    outs = [
        selective_state_update(state, x[:, t], dt[:, t, :, None].expand(batch, H, P), A_HPN, B[:, t], C[:, t], D_HP,
                               z[:, t], b_HP, True, backend=backend)
        for t in range(L)
    ]  # fmt: skip
    close(torch.stack(outs, 1), want)
    close(state, last)


def test_gradients_of_a_step(backend):
    """Without a state that requires grad: the output has gradients, the state is a number written down."""
    p = inputs()
    leaves = {k: v.clone().requires_grad_(k != "state") for k, v in p.items()}
    out = step(leaves, backend=backend)
    assert not leaves["state"].requires_grad
    close(leaves["state"], naive(p)[1])
    step(leaves, backend=backend)  # the old state was kept: a second step does not spoil the first's gradient
    out.square().sum().backward()
    doubles = {k: v.double().requires_grad_(k != "state") for k, v in p.items()}
    naive(doubles)[0].square().sum().backward()
    for k in ARGUMENTS[1:]:
        close(leaves[k].grad, doubles[k].grad, 1e-4)


def test_gradient_of_a_subset(backend):
    p = inputs()

    def loss(q):
        return step(q | {"state": q["state"].clone()}, backend=backend).square().sum()

    whole = [v.clone().requires_grad_() for v in p.values()]
    want = torch.autograd.grad(loss(dict(zip(p, whole, strict=True))), whole)
    for name, right in zip(p, want, strict=True):
        some = {k: v.clone().requires_grad_(k == name) for k, v in p.items()}
        close(torch.autograd.grad(loss(some), some[name])[0], right, 1e-6)


def test_gradients_along_steps_are_the_scans(backend):
    L, D, N = 6, 4, 3
    leaves = [torch.randn(2, D, L), torch.randn(2, D, L), -torch.rand(D, N), torch.randn(2, N, L), torch.randn(2, N, L)]
    u, delta, A, B, C = (t.requires_grad_() for t in leaves)
    first = torch.randn(2, D, N, requires_grad=True)
    state = first.clone()
    outs = [
        selective_state_update(
            state, u[..., t], delta[..., t], A, B[..., t], C[..., t], dt_softplus=True, backend=backend
        )
        for t in range(L)
    ]
    whole = (u, delta, A, B, C, None, None, None, True, True)
    want, last = selective_scan_fn(*whole, initial_state=first, backend="reference")
    found = torch.autograd.grad(torch.stack(outs, -1).square().sum() + state.sum(), [*leaves, first])
    right = torch.autograd.grad(want.square().sum() + last.sum(), [*leaves, first])
    for a, b in zip(found, right, strict=True):
        close(a, b, 1e-4)


@pytest.mark.parametrize("slots", [None, torch.tensor([2, -1, 0])])
def test_gradients_from_step_to_step(slots):
    p = inputs(dtype=F64)

    def function(state, x, dt, A, B, C, D, z, bias):
        carried = state.clone()
        q = dict(zip(ARGUMENTS, (carried, x, dt, A, B, C, D, z, bias), strict=True))
        outs = [step(q, indices=slots, backend="reference") for _ in range(3)]
        return torch.stack(outs), carried

    leaves = [p[k].requires_grad_() for k in ARGUMENTS]
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


def test_gradient_through_expanded_parameters():
    A, dt = (-torch.rand(4, dtype=F64) - 0.1).requires_grad_(), torch.randn(3, 4, dtype=F64, requires_grad=True)
    p = inputs(dtype=F64)

    def function(A, dt):
        wide = {"A": A[:, None, None].expand(4, 5, 7), "dt": dt[..., None].expand(3, 4, 5), "state": p["state"].clone()}
        return step(p | wide)

    assert gradcheck(function, [A, dt])


def test_float64_takes_the_reference():
    p = inputs(dtype=F64)
    want, new = naive(p)
    torch.testing.assert_close(step(p), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p["state"], new, rtol=1e-12, atol=1e-12)
    if "cpu" in usable(OP):
        with pytest.raises(BackendUnavailableError, match="float64"):
            step(p, backend="cpu")
    p = inputs() | {"state": p["state"]}
    want, new = naive(p)
    assert step(p).dtype == torch.float32
    torch.testing.assert_close(p["state"], new, rtol=1e-12, atol=1e-12)


def test_reference_has_upstreams_arguments():
    p = inputs()
    want, new = naive(p)
    close(selective_state_update_ref(*p.values(), True, None), want)
    close(p["state"], new)


def test_under_autocast_nothing_is_rounded(backend):
    p, q = inputs(), inputs()
    want = step(p, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(step(q, backend=backend), want)
    assert torch.equal(p["state"], q["state"])


def test_compiles_whole(backend):
    def function(p):
        return step(p, backend=backend) + 1

    p, q = inputs(), inputs()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p), function(q))
    torch.testing.assert_close(p["state"], q["state"])


def test_a_leaf_is_not_written_to(backend):
    p = inputs()
    p["state"].requires_grad_()
    with pytest.raises(ValueError, match=r"leaf that requires grad; pass state\.clone\(\)"):
        step(p, backend=backend)
    with torch.no_grad():
        step(p, backend=backend)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": torch.zeros(3, 7)}, "needs state"),
        ({"state": torch.zeros(2, 4, 5, 7)}, "give state_batch_indices"),
        ({"x": torch.zeros(3, 5)}, "x must be"),
        ({"dt": torch.zeros(3, 4)}, "dt must be"),
        ({"A": torch.zeros(4, 7)}, "A must be"),
        ({"B": torch.zeros(3, 3, 7)}, "B must be"),
        ({"C": torch.zeros(3, 2, 6)}, "C must be"),
        ({"D": torch.zeros(4)}, "D must be"),
        ({"z": torch.zeros(3, 4)}, "z must be"),
        ({"bias": torch.zeros(5)}, "dt_bias must be"),
    ],
)
def test_wrong_shapes_are_one_clear_error(change, words):
    with pytest.raises(ValueError, match=words):
        step(inputs() | change)


@pytest.mark.parametrize("indices", [torch.zeros(2, dtype=torch.int32), torch.zeros(3)])
def test_wrong_indices(indices):
    with pytest.raises(ValueError, match="state_batch_indices must be"):
        step(inputs(), indices=indices)
    with pytest.raises(ValueError, match="state has 3 rows, and state_batch_indices has 3"):
        step(inputs(), indices=torch.tensor([0, 3, -1]))
