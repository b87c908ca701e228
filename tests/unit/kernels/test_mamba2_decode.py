"""A decoding step of Mamba-2 in one call: against its definition in float64, and against the scan of the whole."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bestiary.kernels import (
    BackendUnavailableError,
    causal_conv1d_fn,
    mamba2_step,
    mamba2_step_ref,
    mamba_chunk_scan_combined,
    rms_norm_gated,
)
from bestiary.kernels.backends import why_absent

OP = "mamba2_decode"
NO_LIMIT = (0.0, math.inf)
PARAMETERS = ("conv_weight", "conv_bias", "dt_bias", "A", "D", "norm_weight")
SHAPES = [(1, 1, 1, 1, 2), (4, 5, 2, 7, 4), (3, 8, 3, 16, 3), (6, 17, 3, 3, 2), (2, 3, 1, 5, 1), (4, 16, 2, 33, 5),
          (9, 64, 1, 12, 4)]  # fmt: skip
needs_cpp = pytest.mark.skipif(why_absent(OP, "cpu") is not None, reason="no C++ kernels here")


def inputs(
    H=4, P=5, G=2, N=7, W=4, batch=3, slots=None, dtype=torch.float32, state_dtype=torch.float32
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(H + P + N + W)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    inner, slots = H * P, slots or batch
    channels = inner + 2 * G * N
    return dict(
        zxbcdt=rand(batch, inner + channels + H).to(dtype), conv_state=rand(slots, W - 1, channels).to(dtype),
        ssm_state=rand(slots, H, P, N).to(state_dtype), conv_weight=rand(channels, W), conv_bias=rand(channels),
        dt_bias=rand(H), A=-rand(H).abs() - 0.1, D=rand(H), norm_weight=1 + 0.1 * rand(inner),
    )  # fmt: skip


def step(p, backend, G=2, **options):
    """Output and new states; the inputs stay as they are."""
    conv, ssm = p["conv_state"].clone(), p["ssm_state"].clone()
    parameters = [p[name] for name in PARAMETERS]
    out = mamba2_step(
        p["zxbcdt"], conv, ssm, *parameters, headdim=ssm.shape[2], ngroups=G, backend=backend, **options
    )  # fmt: skip
    return out, conv, ssm


def definition(p: dict[str, Any], G=2, eps=1e-5, limit=NO_LIMIT):
    """The equations with loops over rows and heads, in float64."""
    p = {name: t if t is None else t.double() for name, t in p.items()}
    (batch, H, P, N), inner = p["ssm_state"].shape, p["norm_weight"].shape[0]
    outs, convs, states = [], [], []
    for b in range(batch):
        z, xBC, dt = p["zxbcdt"][b].split([inner, inner + 2 * G * N, H])
        window = torch.cat([p["conv_state"][b], xBC[None]])
        xBC = (window * p["conv_weight"].T).sum(0) + (0 if p["conv_bias"] is None else p["conv_bias"])
        x, B, C = (xBC * torch.sigmoid(xBC)).split([inner, G * N, G * N])
        y, state = torch.empty(H, P, dtype=torch.float64), p["ssm_state"][b].clone()
        for h in range(H):
            group = slice(h // (H // G) * N, (h // (H // G) + 1) * N)
            d = torch.log1p(torch.exp(dt[h] + p["dt_bias"][h])).clamp(*limit)
            state[h] = state[h] * torch.exp(d * p["A"][h]) + torch.outer(d * x.view(H, P)[h], B[group])
            y[h] = state[h] @ C[group] + p["D"][h] * x.view(H, P)[h]
        gated = (y.flatten() * z * torch.sigmoid(z)).view(G, -1)
        outs.append((gated / (gated.square().mean(1, keepdim=True) + eps).sqrt()).flatten() * p["norm_weight"])
        convs.append(window[1:])
        states.append(state)
    return torch.stack(outs), torch.stack(convs), torch.stack(states)


def close(found, want, tolerance=3e-6):
    for a, b in zip(found, want, strict=True):
        assert a.shape == b.shape
        if b.numel():
            torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("H, P, G, N, W", SHAPES)
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_equals_the_definition(backend, H, P, G, N, W, batch):
    p = inputs(H, P, G, N, W, batch)
    out, conv, ssm = step(p, backend, G)
    close((out, conv, ssm), definition(p, G))
    assert out.is_contiguous()
    p["conv_bias"] = None
    close(step(p, backend, G, eps=0.1), definition(p, G, eps=0.1))


@pytest.mark.parametrize("limit", [(0.0, 0.3), (0.7, math.inf), (0.2, 0.9)])
def test_step_sizes_are_bounded(backend, limit):
    p = inputs(H=8, P=4)
    close(step(p, backend, dt_limit=limit), definition(p, limit=limit))
    assert not torch.equal(step(p, backend, dt_limit=limit)[2], step(p, backend)[2])


@pytest.mark.parametrize("dt", [-200.0, -30.0, 19.0, 30.0])
def test_step_sizes_of_any_size(backend, dt):
    p = inputs()
    p["zxbcdt"][:, -4:] = dt
    p["dt_bias"] = torch.zeros(4)
    want = definition(p)
    close(step(p, backend), want)


@pytest.mark.parametrize("layout", ["a slice", "every other channel", "rows far apart", "one row for all"])
def test_any_strides(backend, layout):
    p = inputs()
    wide = torch.randn(3, 2, 3 * p["zxbcdt"].shape[1], generator=torch.Generator().manual_seed(1))
    n = p["zxbcdt"].shape[1]
    p["zxbcdt"] = {
        "a slice": wide[:, 0, 5 : 5 + n],
        "every other channel": wide[:, 1, 1 : 1 + 2 * n : 2],
        "rows far apart": wide.flatten(0, 1)[::2, :n],
        "one row for all": wide[:1, 0, :n].expand(3, n),
    }[layout]
    close(step(p, backend), definition(p))
    apart = {name: p[name].repeat_interleave(2, 0)[::2] for name in PARAMETERS}  # no parameter is contiguous
    apart["conv_weight"] = p["conv_weight"].T.contiguous().T
    close(step(p | apart, backend), definition(p))


def test_states_of_any_strides(backend):
    p = inputs()
    want = definition(p)
    conv = p["conv_state"].transpose(1, 2).contiguous().transpose(1, 2)  # a channel's inputs side by side
    ssm = p["ssm_state"].transpose(2, 3).contiguous().transpose(2, 3)
    parameters = [p[name] for name in PARAMETERS]
    out = mamba2_step(p["zxbcdt"], conv, ssm, *parameters, headdim=5, ngroups=2, backend=backend)
    close((out, conv, ssm), want)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rows_of_padding_keep_their_states_and_give_zeros(backend, index):
    p = inputs(batch=4, slots=6)
    rows = torch.tensor([5, -1, 0, -7], dtype=index)
    p["zxbcdt"][1] = torch.nan
    out, conv, ssm = step(p, backend, rows=rows)
    own = rows[[0, 2]].long()
    part = p | {name: p[name][own] for name in ("conv_state", "ssm_state")} | {"zxbcdt": p["zxbcdt"][[0, 2]]}
    close((out[[0, 2]], conv[own], ssm[own]), definition(part))
    assert not out[[1, 3]].any()
    others = [1, 2, 3, 4]
    assert torch.equal(conv[others], p["conv_state"][others])
    assert torch.equal(ssm[others], p["ssm_state"][others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_states", [False, True])
def test_half_precision_is_rounded_once(backend, dtype, half_states):
    p = inputs(H=4, P=16, N=17, dtype=dtype, state_dtype=dtype if half_states else torch.float32)
    found, want = step(p, backend), definition(p)
    assert [t.dtype for t in found] == [dtype, dtype, dtype if half_states else torch.float32]
    assert torch.equal(found[1].double(), want[1])  # inputs are kept as they came
    for a, b in ((found[0], want[0]), (found[2], want[2])):
        nearest = torch.finfo(a.dtype).eps * b.abs() / 2
        assert ((a.double() - b).abs() <= 1.01 * nearest + 4e-6 * b.abs().max()).all()


def test_dtypes_may_differ(backend):
    """As under autocast: activations in bfloat16, states and parameters in float32, and the other way round."""
    p = inputs()
    half = p | {"zxbcdt": p["zxbcdt"].bfloat16()}
    out, conv, ssm = step(half, backend)
    assert (out.dtype, conv.dtype) == (torch.bfloat16, torch.float32)
    close((conv, ssm), definition(half)[1:])
    close([out], definition(half)[:1], 8e-3)
    low = p | {name: p[name].bfloat16() for name in PARAMETERS}
    close(step(low, backend), definition(low))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(step(p, backend), step(p, backend), strict=True))
        close(step(p, backend), definition(p))


def test_float64_takes_the_reference():
    p = {name: t.double() for name, t in inputs().items()}
    found = step(p, None)
    assert all(t.dtype == torch.float64 for t in found)
    close(found, definition(p), 1e-14)
    # Where there are no C++ kernels at all, that is the reason given.
    with pytest.raises(BackendUnavailableError, match="float64" if why_absent(OP, "cpu") is None else "cannot use it"):
        step(p, "cpu")


@pytest.mark.parametrize("limit", [NO_LIMIT, (0.1, 0.8)])
def test_twenty_steps_are_the_scan(backend, limit):
    """The layer over all tokens at once, by the ops of the prefill."""
    H, P, G, N, W, batch, length = 4, 8, 2, 16, 4, 2, 20
    p = inputs(H, P, G, N, W, batch)
    conv, ssm = torch.zeros_like(p["conv_state"]), torch.zeros_like(p["ssm_state"])
    tokens = torch.randn(batch, length, p["zxbcdt"].shape[1], generator=torch.Generator().manual_seed(2))
    parameters = [p[name] for name in PARAMETERS]
    options = dict(headdim=P, ngroups=G, eps=1e-3, dt_limit=limit, backend=backend)
    outs = [mamba2_step(tokens[:, t], conv, ssm, *parameters, **options) for t in range(length)]
    z, xBC, dt = tokens.split([H * P, H * P + 2 * G * N, H], -1)
    mixed = causal_conv1d_fn(xBC.transpose(1, 2), p["conv_weight"], p["conv_bias"], activation="silu").transpose(1, 2)
    x, B, C = mixed.split([H * P, G * N, G * N], -1)
    y, last = mamba_chunk_scan_combined(
        x.unflatten(-1, (H, P)), dt, p["A"], B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N)), 8, D=p["D"],
        dt_bias=p["dt_bias"], dt_softplus=True, dt_limit=limit, return_final_states=True,
    )  # fmt: skip
    want = rms_norm_gated(y.flatten(2), p["norm_weight"], z, 1e-3, H * P // G, norm_before_gate=False)
    close((torch.stack(outs, 1), conv, ssm), (want, xBC[:, -3:], last), 1e-5)


@needs_cpp
@pytest.mark.parametrize("batch, H, P", [(1, 32, 64), (40, 6, 17)])
def test_the_number_of_threads_changes_no_bit(batch, H, P):
    p = inputs(H, P, 2, 24, 4, batch)
    one = step(p, "cpu")
    torch.set_num_threads(2)
    try:
        two = step(p, "cpu")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_no_sequences(backend):
    p = inputs()
    p["zxbcdt"] = p["zxbcdt"][:0]
    rows = torch.zeros(0, dtype=torch.int32)
    out, conv, ssm = step(p, backend, rows=rows)
    assert out.shape == (0, 20)
    assert torch.equal(conv, p["conv_state"])
    assert torch.equal(ssm, p["ssm_state"])


def test_a_gradient_takes_the_reference(backend):
    p = inputs()
    wanted = ("zxbcdt", *PARAMETERS)
    exact = {name: t.double() for name, t in p.items()}
    for tensors in (p, exact):
        for name in wanted:
            tensors[name].requires_grad_()
    want = torch.autograd.grad(step(exact, None)[0].sum(), [exact[name] for name in wanted])
    found = torch.autograd.grad(step(p, backend)[0].sum(), [p[name] for name in wanted])
    close(found, want, 1e-5)
    p["ssm_state"].requires_grad_()
    with pytest.raises(ValueError, match="ssm_state, which is a leaf"):
        mamba2_step(**p, headdim=5, ngroups=2, backend=backend)


@needs_cpp
def test_compiled_whole_equals_eager():
    p = inputs()
    want = step(p, "cpu")
    compiled = torch.compile(lambda: step(p, "cpu"), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(), want, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zxbcdt": torch.zeros(3, 20)}, "zxbcdt must be"),
        ({"zxbcdt": torch.zeros(72)}, "needs zxbcdt"),
        ({"conv_state": torch.zeros(3, 48, 3)}, "conv_state must be"),
        ({"conv_weight": torch.zeros(48, 2)}, "conv_state must be"),
        ({"conv_bias": torch.zeros(20)}, "conv_bias must be"),
        ({"dt_bias": torch.zeros(1)}, "dt_bias must be"),
        ({"A": torch.zeros(4, 1)}, "A must be"),
        ({"norm_weight": torch.zeros(4)}, "norm_weight must be"),
        ({"headdim": 4}, "headdim"),
        ({"ngroups": 3}, "ngroups"),
        ({"rows": torch.tensor([0, 1])}, "rows must be"),
        ({"rows": torch.tensor([0, 1, 3])}, "has 3 rows"),
    ],
)
def test_wrong_arguments_are_one_clear_error(change, words):
    with pytest.raises(ValueError, match=f"mamba2_step.*{words}"):
        mamba2_step(**(inputs() | {"headdim": 5, "ngroups": 2} | change))


def test_the_reference_by_name():
    p = inputs()
    conv, ssm = p["conv_state"].clone(), p["ssm_state"].clone()
    parameters = [p[name] for name in PARAMETERS]
    out = mamba2_step_ref(p["zxbcdt"], conv, ssm, *parameters, None, 2, 1e-5, NO_LIMIT)
    assert all(torch.equal(a, b) for a, b in zip((out, conv, ssm), step(p, "reference"), strict=True))
    assert F.cosine_similarity(out.flatten(), step(p, None)[0].flatten(), dim=0) > 0.9999
