"""Steps of the causal convolution against the convolution of the whole."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from bestiary.kernels import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states

OP = "causal_conv1d_update"
F64 = torch.float64


def inputs(L=12, W=4, D=5, B=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(L + W)
    shapes = dict(x=(B, D, L), weight=(D, W), bias=(D,))
    return {k: torch.randn(*s, generator=g, dtype=F64).to(dtype) for k, s in shapes.items()}


def whole(p, activation=None):
    """Convolution of all inputs at once, in float64."""
    W = p["weight"].shape[1]
    padded = F.pad(p["x"].double(), (W - 1, 0))
    out = F.conv1d(padded, p["weight"].double()[:, None], p["bias"].double(), groups=p["weight"].shape[0])
    return out if activation is None else F.silu(out)


def close(found, want, tolerance=1e-5):
    assert found.shape == want.shape
    torch.testing.assert_close(found.double(), want.double(), rtol=0, atol=tolerance * float(want.abs().max() + 1e-6))


@pytest.mark.parametrize("W", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("room", [0, 1, 5])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_steps_are_the_convolution(backend, W, room, activation):
    p = inputs(W=W)
    want = whole(p, activation)
    state = torch.zeros(3, 5, W - 1 + room)
    for t in range(12):
        x = p["x"][..., t]
        out = causal_conv1d_update(x, state, p["weight"], p["bias"], activation, backend=backend)
        close(out, want[..., t])
        assert torch.equal(state, F.pad(p["x"], (state.shape[2], 0))[..., t + 1 : t + 1 + state.shape[2]])


@pytest.mark.parametrize("sizes", [[5, 7], [1, 2, 9], [12]])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("room", [3, 4, 6])
def test_several_inputs_at_once(backend, sizes, ring, room):
    p = inputs()
    want = whole(p, "silu")
    state, done = torch.zeros(3, 5, room), 0
    for S in sizes:
        seen = torch.full((3,), done, dtype=torch.int32) if ring else None
        x = p["x"][..., done : done + S]
        out = causal_conv1d_update(x, state, p["weight"], p["bias"], "silu", seen, backend=backend)
        close(out, want[..., done : done + S])
        done += S
    last = F.pad(p["x"], (room, 0))[..., -room:]
    if ring:
        for t in range(12 - room, 12):
            assert torch.equal(state[..., t % room], p["x"][..., t])
    else:
        assert torch.equal(state, last)


def test_a_ring_for_each_sequence(backend):
    """Rows that have seen different numbers of inputs; what stands in the ring beyond W - 1 is history."""
    p = inputs()
    want = whole(p)
    seen = torch.tensor([0, 4, 9])
    state = torch.zeros(3, 5, 5)
    for b, n in enumerate(seen.tolist()):
        for t in range(max(0, n - 5), n):
            state[b, :, t % 5] = p["x"][b, :, t]
    for k in range(3):
        x = torch.stack([p["x"][b, :, n + k] for b, n in enumerate(seen.tolist())])
        out = causal_conv1d_update(x, state, p["weight"], p["bias"], None, (seen + k).int(), backend=backend)
        close(out, torch.stack([want[b, :, n + k] for b, n in enumerate(seen.tolist())]))


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("S", [None, 2])
def test_slots(backend, ring, S):
    """Rows by index; a negative one is padding: output 0, and no row is touched for it."""
    p = inputs()
    pool = torch.randn(5, 5, 3)
    before, slots = pool.clone(), torch.tensor([4, -1, 0], dtype=torch.int32)
    x = p["x"][..., 0] if S is None else p["x"][..., :S]
    seen = torch.tensor([7, 3, 2], dtype=torch.int32) if ring else None
    dense = before[slots.clamp(min=0).long()]
    want = causal_conv1d_update(x, dense, p["weight"], p["bias"], None, seen, backend="reference")
    out = causal_conv1d_update(x, pool, p["weight"], p["bias"], None, seen, slots, backend=backend)
    close(out[[0, 2]], want[[0, 2]])
    assert not out[1].any()
    assert torch.equal(pool[[4, 0]], dense[[0, 2]])
    assert torch.equal(pool[1:4], before[1:4])


@pytest.mark.parametrize("cutting", [1, 3, 8])
def test_goes_on_from_the_convolution(backend, cutting):
    p = inputs()
    _, state = causal_conv1d_fn(p["x"][..., :cutting], p["weight"], p["bias"], return_final_states=True)
    state = state.contiguous()
    outs = [causal_conv1d_update(p["x"][..., t], state, p["weight"], p["bias"], backend=backend)
            for t in range(cutting, 12)]  # fmt: skip
    close(torch.stack(outs, -1), whole(p)[..., cutting:])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 4), st.lists(st.integers(1, 5), min_size=1, max_size=5), st.booleans())
def test_any_cut_is_the_convolution(W, room, sizes, ring):
    p = inputs(L=sum(sizes), W=W, dtype=F64)
    state, done, outs = torch.zeros(3, 5, max(1, W - 1 + room), dtype=F64), 0, []
    for x in p["x"].split(sizes, 2):
        seen = torch.full((3,), done) if ring else None
        outs.append(causal_conv1d_update(x, state, p["weight"], p["bias"], None, seen, backend="reference"))
        done += x.shape[2]
    close(torch.cat(outs, 2), whole(p), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [torch.float32, None])
def test_half_precision(backend, dtype, state_dtype):
    p = inputs(dtype=dtype)
    state = torch.zeros(3, 5, 3, dtype=state_dtype or dtype)
    want = whole(p, "silu")
    for t in range(12):
        out = causal_conv1d_update(p["x"][..., t], state, p["weight"], p["bias"], "silu", backend=backend)
        assert out.dtype == dtype
        close(out, want[..., t], 5e-3)


def test_any_strides(backend):
    p = inputs(W=3)
    want = whole(p)
    packed = torch.randn(3, 12, 20)
    packed[..., 4:9] = p["x"].transpose(1, 2)
    cache = torch.zeros(3, 2, 5).transpose(1, 2)
    weight, bias = p["weight"].t().contiguous().t(), torch.stack([p["bias"]] * 2, 1)[:, 0]
    for t in range(12):
        close(causal_conv1d_update(packed[:, t, 4:9], cache, weight, bias, backend=backend), want[..., t])
    no_bias = causal_conv1d_update(packed[:, 0, 4:9], torch.zeros(3, 5, 2), weight, backend=backend)
    close(no_bias, want[..., 0] - p["bias"].double())


def laid_out(shape, layout, dtype=torch.float32):
    """Zeros (B, D, n), each channel's inputs side by side, or the channels."""
    B, D, n = shape
    return torch.zeros(shape, dtype=dtype) if layout == "inputs" else torch.zeros(B, n, D, dtype=dtype).transpose(1, 2)


LAYOUTS = pytest.mark.parametrize("layout", ["inputs", "channels"])


@LAYOUTS
@pytest.mark.parametrize("D", [8, 16, 19, 70, 133])
@pytest.mark.parametrize("W, room", [(1, 0), (2, 0), (3, 0), (4, 0), (4, 2), (5, 0)])
def test_any_number_of_channels(backend, layout, D, W, room):
    """What is taken several channels at once, and what is left over; more rows than are taken at once."""
    p = inputs(L=5, W=W, D=D, B=18)
    want = whole(p, "silu")
    packed = torch.randn(18, 5, D + 30)
    packed[..., 7 : 7 + D] = p["x"].transpose(1, 2)
    state = laid_out((18, D, W - 1 + room), layout)
    for t in range(5):
        x = packed[:, t, 7 : 7 + D]
        close(causal_conv1d_update(x, state, p["weight"], p["bias"], "silu", backend=backend), want[..., t])
        assert torch.equal(state, F.pad(p["x"], (W - 1 + room, 0))[..., t + 1 : t + 1 + W - 1 + room])


@LAYOUTS
@pytest.mark.parametrize("sizes", [[2, 3], [5, 1], [1, 70, 2]])
@pytest.mark.parametrize("room", [3, 5, 70])
@pytest.mark.parametrize("x_layout", ["inputs", "channels"])
def test_several_inputs_of_many_channels(backend, layout, sizes, room, x_layout):
    p = inputs(L=sum(sizes), D=19)
    want, state = whole(p, "silu"), laid_out((3, 19, room), layout)
    x = laid_out(p["x"].shape, x_layout).copy_(p["x"])
    for new, truth in zip(x.split(sizes, 2), want.split(sizes, 2), strict=True):
        close(causal_conv1d_update(new, state, p["weight"], p["bias"], "silu", backend=backend), truth)
    assert torch.equal(state, F.pad(p["x"], (room, 0))[..., -room:])


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_slots_of_many_channels(backend, layout, dtype):
    p = inputs(D=19, dtype=dtype)
    pool = laid_out((5, 19, 3), layout, dtype).copy_(torch.randn(5, 19, 3))
    before, slots = pool.clone(), torch.tensor([4, -1, 0])
    dense = before[slots.clamp(min=0)].contiguous()
    x = p["x"][..., 0]
    want = causal_conv1d_update(x, dense, p["weight"], p["bias"], "silu", backend="reference")
    out = causal_conv1d_update(x, pool, p["weight"], p["bias"], "silu", None, slots, backend=backend)
    close(out[[0, 2]], want[[0, 2]], 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert not out[1].any()
    assert torch.equal(pool[[4, 0]], dense[[0, 2]])
    assert torch.equal(pool[1:4], before[1:4])


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [torch.float32, None])
def test_half_precision_of_many_channels(backend, layout, dtype, state_dtype):
    p = inputs(D=27, dtype=dtype)
    state = laid_out((3, 27, 3), layout, state_dtype or dtype)
    want = whole(p, "silu")
    for t in range(12):
        out = causal_conv1d_update(p["x"][..., t], state, p["weight"], p["bias"], "silu", backend=backend)
        assert out.dtype == dtype
        assert ((out.double() - want[..., t]).abs() <= torch.finfo(dtype).eps * want[..., t].abs() + 1e-6).all()
    assert torch.equal(state.to(dtype), p["x"][..., 9:])


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_stays_in_its_channel(backend, layout, dtype):
    p = inputs(D=19, dtype=dtype)
    state = laid_out((3, 19, 3), layout, dtype)
    p["x"][1, 5, 2], p["x"][2, 18, 2] = torch.nan, torch.nan
    for t in range(12):
        out = causal_conv1d_update(p["x"][..., t], state, p["weight"], p["bias"], "silu", backend=backend)
        bad = torch.zeros(3, 19, dtype=torch.bool)
        bad[1, 5] = bad[2, 18] = 2 <= t < 6
        assert torch.equal(out.isnan(), bad)


@pytest.mark.parametrize("value", [-1e4, -100.0, -88.5, 88.5, 1e4])
def test_silu_of_any_size(backend, value):
    out = causal_conv1d_update(torch.full((1, 9), value), torch.zeros(1, 9, 3), torch.ones(9, 4), None, "silu",
                               backend=backend)  # fmt: skip
    torch.testing.assert_close(out, torch.full((1, 9), max(value, 0.0)), rtol=1e-6, atol=1e-35)


@LAYOUTS
def test_the_number_of_threads_changes_no_bit(backend, layout):
    p = inputs(L=2, D=1024, B=64)

    def run():
        state = laid_out((64, 1024, 3), layout)
        outs = [causal_conv1d_update(p["x"][..., t], state, p["weight"], p["bias"], "silu", backend=backend)
                for t in range(2)]  # fmt: skip
        return [*outs, state]

    one = run()
    torch.set_num_threads(2)
    try:
        two = run()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_empty_batch(backend):
    out = causal_conv1d_update(torch.zeros(0, 5), torch.zeros(0, 5, 3), torch.zeros(5, 4), backend=backend)
    assert out.shape == (0, 5)


@pytest.mark.parametrize("ring", [None, torch.tensor([5, 1, 0])])
@pytest.mark.parametrize("slots", [None, torch.tensor([1, -1, 0])])
def test_gradients(ring, slots):
    p = inputs(L=2, dtype=F64)
    past = torch.randn(3, 5, 4, dtype=F64)

    def function(x, weight, bias, past):
        state = past.clone()
        outs = [causal_conv1d_update(x, state, weight, bias, "silu", None if ring is None else ring + 2 * i, slots)
                for i in range(2)]  # fmt: skip
        return torch.stack(outs), state

    leaves = [v.requires_grad_() for v in (*p.values(), past)]
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


def test_the_state_stays_out_of_autograd(backend):
    p = {k: v.requires_grad_() for k, v in inputs().items()}
    state = torch.zeros(3, 5, 3)
    outs = [causal_conv1d_update(p["x"][..., t], state, p["weight"], p["bias"], backend=backend) for t in range(12)]
    assert not state.requires_grad
    torch.stack(outs, -1).square().sum().backward()
    found = p["weight"].grad.clone()
    p["weight"].grad = None
    whole(p).square().sum().backward()
    close(found, p["weight"].grad, 1e-4)
    with pytest.raises(ValueError, match=r"pass conv_state\.clone\(\)"):
        causal_conv1d_update(p["x"][..., 0], state.requires_grad_(), p["weight"])


@pytest.mark.parametrize("state_len", [0, 1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_states_of_packed_sequences(state_len, dtype):
    x = torch.randn(10, 4)
    cu = [0, 2, 2, 9, 10]
    states = causal_conv1d_varlen_states(x, torch.tensor(cu, dtype=dtype), state_len)
    assert states.shape == (4, 4, state_len)
    for state, (lo, hi) in zip(states, itertools.pairwise(cu), strict=True):
        want = torch.cat([torch.zeros(6, 4), x[lo:hi]])[6 + hi - lo - state_len :]
        assert torch.equal(state, want.t())
    assert causal_conv1d_varlen_states(x[:0], torch.tensor([0, 0]), 3).shape == (1, 4, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(5)}, "needs x"),
        ({"weight": torch.zeros(4, 4)}, "weight must be"),
        ({"bias": torch.zeros(4)}, "bias must be"),
        ({"conv_state": torch.zeros(3, 5, 2)}, "conv_state must be"),
        ({"conv_state": torch.zeros(2, 5, 3)}, "give conv_state_indices"),
        ({"activation": "gelu"}, "activation must be"),
        ({"cache_seqlens": torch.zeros(2, dtype=torch.int32)}, "cache_seqlens must be"),
        ({"conv_state_indices": torch.zeros(3)}, "conv_state_indices must be"),
    ],
)
def test_wrong_arguments_are_one_clear_error(change, words):
    p = dict(x=torch.zeros(3, 5), conv_state=torch.zeros(3, 5, 3), weight=torch.zeros(5, 4))
    with pytest.raises(ValueError, match=words):
        causal_conv1d_update(**(p | change))
    with pytest.raises(ValueError, match="needs x"):
        causal_conv1d_varlen_states(torch.zeros(3), torch.tensor([0, 3]), 2)


def test_places_that_are_not_there():
    p = dict(x=torch.zeros(3, 5), conv_state=torch.zeros(3, 5, 3), weight=torch.zeros(5, 4))
    with pytest.raises(ValueError, match="conv_state has 3 rows, and conv_state_indices has 3"):
        causal_conv1d_update(**p, conv_state_indices=torch.tensor([0, 3, -1]))
    with pytest.raises(ValueError, match="must not be negative"):
        causal_conv1d_update(**p, cache_seqlens=torch.tensor([0, -3, 1]))


def test_compiles_whole(backend):
    p = inputs()

    def function(x, state):
        return causal_conv1d_update(x, state, p["weight"], p["bias"], "silu", backend=backend) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    state, other = torch.ones(3, 5, 3), torch.ones(3, 5, 3)
    torch.testing.assert_close(compiled(p["x"], state), function(p["x"], other))
    torch.testing.assert_close(state, other)


def test_under_autocast_nothing_is_rounded(backend):
    p = inputs()
    states = torch.zeros(2, 3, 5, 3)
    want = causal_conv1d_update(p["x"], states[0], p["weight"], p["bias"], backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = causal_conv1d_update(p["x"], states[1], p["weight"], p["bias"], backend=backend)
    assert torch.equal(found, want)
    assert torch.equal(states[0], states[1])
