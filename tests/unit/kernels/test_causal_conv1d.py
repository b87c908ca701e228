"""The causal convolution against torch's Conv1d and against loops."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from bestiary.kernels import causal_conv1d_fn

F64 = torch.float64
ORDER = torch.tensor([[4, 0, 2, 1, 3, 6, 5], [1, 3, 5, 4, 0, 2, 6]])
SEQ = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 3, 3, 3, 3, 3, 1]])


def inputs(L=7, W=4, D=3, B=2):
    g = torch.Generator().manual_seed(L + W)
    shapes = dict(x=(B, D, L), weight=(D, W), bias=(D,), past=(B, D, W - 1))
    return {k: torch.randn(*s, generator=g, dtype=F64) for k, s in shapes.items()}


@pytest.mark.parametrize("L", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("W", [1, 2, 4, 7])
def test_equals_conv1d(L, W):
    p = inputs(L, W)
    conv = torch.nn.Conv1d(3, 3, W, groups=3, padding=W - 1, dtype=F64)
    conv.weight.data, conv.bias.data = p["weight"][:, None], p["bias"]
    want = conv(p["x"])[..., :L]
    torch.testing.assert_close(causal_conv1d_fn(p["x"], p["weight"], p["bias"]), want)
    for name in ("silu", "swish"):
        torch.testing.assert_close(causal_conv1d_fn(p["x"], p["weight"], p["bias"], activation=name), F.silu(want))
    no_bias = causal_conv1d_fn(p["x"], p["weight"])
    torch.testing.assert_close(no_bias, want - p["bias"][:, None])


@pytest.mark.parametrize("W", [1, 4])
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_states_continue_a_sequence(W, cut):
    p = inputs(7, W)
    whole, end = causal_conv1d_fn(p["x"], p["weight"], p["bias"], None, p["past"], True)
    a, state = causal_conv1d_fn(p["x"][..., :cut], p["weight"], p["bias"], None, p["past"], True)
    room = torch.empty_like(end)
    b, last = causal_conv1d_fn(p["x"][..., cut:], p["weight"], p["bias"], None, state, True, room)
    torch.testing.assert_close(torch.cat([a, b], -1), whole)
    torch.testing.assert_close(last, end)
    assert last is room
    torch.testing.assert_close(end, torch.cat([p["past"], p["x"]], -1)[..., 7:])


def test_packed_rows_equal_separate_sequences():
    p = inputs()
    out = causal_conv1d_fn(p["x"], p["weight"], p["bias"], SEQ, p["past"], activation="silu")
    for b in range(2):
        edges = [0] + [t for t in range(1, 7) if SEQ[b, t] != SEQ[b, t - 1]] + [7]
        for i, (lo, hi) in enumerate(itertools.pairwise(edges)):
            past = p["past"][b : b + 1] * (i == 0)
            x = p["x"][b : b + 1, :, lo:hi]
            want = causal_conv1d_fn(x, p["weight"], p["bias"], None, past, activation="silu")
            torch.testing.assert_close(out[b : b + 1, :, lo:hi], want)


def test_order_and_reverse():
    p = inputs()
    out = causal_conv1d_fn(p["x"], p["weight"], p["bias"], scan_order=ORDER)
    for b in range(2):
        want = causal_conv1d_fn(p["x"][b : b + 1][..., ORDER[b]], p["weight"], p["bias"])
        torch.testing.assert_close(out[b : b + 1][..., ORDER[b]], want)
    back = causal_conv1d_fn(p["x"], p["weight"], p["bias"], reverse=True)
    torch.testing.assert_close(back, causal_conv1d_fn(p["x"].flip(-1), p["weight"], p["bias"]).flip(-1))
    both = causal_conv1d_fn(p["x"], p["weight"], p["bias"], SEQ, scan_order=ORDER, reverse=True)
    want = causal_conv1d_fn(p["x"], p["weight"], p["bias"], SEQ, scan_order=ORDER.flip(1))
    torch.testing.assert_close(both, want)


@pytest.mark.parametrize("options", [{}, {"scan_order": ORDER, "seq_idx": SEQ, "reverse": True}], ids=str)
def test_gradients(options):
    def function(x, weight, bias, past):
        return causal_conv1d_fn(
            x, weight, bias, initial_states=past, return_final_states=True, activation="silu", **options
        )

    leaves = [v.requires_grad_() for v in inputs().values()]
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves, fast_mode=True)


def test_half_precision_sums_in_float32():
    p = {k: v.bfloat16() for k, v in inputs(64).items()}
    out = causal_conv1d_fn(p["x"], p["weight"], p["bias"])
    want = causal_conv1d_fn(p["x"].double(), p["weight"].double(), p["bias"].double())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, want.bfloat16())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(3, 7)}, "needs x"),
        ({"weight": torch.zeros(4, 4)}, "weight must be"),
        ({"bias": torch.zeros(4)}, "bias must be"),
        ({"activation": "gelu"}, "activation must be"),
        ({"initial_states": torch.zeros(2, 3, 4)}, "initial_states must be"),
    ],
)
def test_wrong_arguments_are_one_clear_error(change, words):
    p = {k: v for k, v in inputs().items() if k != "past"}
    with pytest.raises(ValueError, match=words):
        causal_conv1d_fn(**(p | change))
