"""The Mamba-2 block against transformers' Mamba2Mixer with the same weights."""

import pytest
import torch
import torch.nn.functional as F

from bestiary.shared.nn.mamba2 import Mamba2

transformers = pytest.importorskip("transformers")
F64 = torch.float64


def peer(layer: Mamba2):
    """transformers' mixer with our weights."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=layer.d_model,
        state_size=layer.d_state,
        conv_kernel=layer.d_conv,
        expand=layer.d_inner // layer.d_model,
        num_heads=layer.nheads,
        head_dim=layer.headdim,
        n_groups=layer.ngroups,
        chunk_size=layer.chunk_size,
        time_step_limit=layer.dt_limit,
        layer_norm_epsilon=1e-5,
        rms_norm=True,
        use_bias=layer.in_proj.bias is not None,
        use_conv_bias=layer.conv1d.bias is not None,
        num_hidden_layers=1,
    )
    mixer = Mamba2Mixer(config, layer_idx=0).eval()
    missing = mixer.load_state_dict(layer.state_dict(), strict=False)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    return mixer


def make(dim=12, seed=0, **options) -> Mamba2:
    torch.manual_seed(seed)
    layer = Mamba2(dim, **{"d_state": 6, "headdim": 4, "chunk_size": 8} | options)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.add_((0.3 if name in ("A_log", "D", "norm.weight") else 0.1) * torch.randn_like(p))
    return layer


@pytest.mark.parametrize("length", [1, 7, 8, 21])
@pytest.mark.parametrize(
    "options", [{}, {"ngroups": 2, "d_conv": 3}, {"bias": True, "conv_bias": False}, {"dt_limit": (0.01, 0.2)}], ids=str
)
def test_equals_transformers(length, options):
    layer = make(**options)
    mixer = peer(layer)
    x = torch.randn(2, length, 12, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found, want = layer(x), mixer(y)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(want)
    (found * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-4)
    for name, p in mixer.named_parameters():
        scale = max(1.0, float(p.grad.abs().max()))
        torch.testing.assert_close(layer.get_parameter(name).grad, p.grad, rtol=1e-3, atol=1e-4 * scale)


def by_hand(layer: Mamba2, x):
    """The default block with one group, token by token, from the equations."""
    p = dict(layer.named_parameters())
    z, xBC, dt = (x @ p["in_proj.weight"].T).split([layer.d_ssm, layer.conv1d.out_channels, layer.nheads], -1)
    kernel = p["conv1d.weight"][:, 0]
    taps = F.pad(xBC, (0, 0, kernel.shape[1] - 1, 0))
    xBC = sum(kernel[:, k] * taps[:, k : k + x.shape[1]] for k in range(kernel.shape[1])) + p["conv1d.bias"]
    u, B, C = (xBC * torch.sigmoid(xBC)).split([layer.d_ssm, layer.d_state, layer.d_state], -1)
    u, dt = u.unflatten(-1, (layer.nheads, -1)), F.softplus(dt + p["dt_bias"])
    h, ys = torch.zeros(len(x), layer.nheads, layer.headdim, layer.d_state, dtype=x.dtype), []
    for t in range(x.shape[1]):
        decay = torch.exp(-dt[:, t] * torch.exp(p["A_log"]))
        h = decay[..., None, None] * h + torch.einsum("bhp,bn->bhpn", dt[:, t, :, None] * u[:, t], B[:, t])
        ys.append(torch.einsum("bhpn,bn->bhp", h, C[:, t]) + p["D"][:, None] * u[:, t])
    y = torch.stack(ys, 1).flatten(-2) * z * torch.sigmoid(z)
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + 1e-5) * p["norm.weight"]
    return y @ p["out_proj.weight"].T


@pytest.mark.parametrize("bias", [-20.0, -10.0, -1.0, 0.0, 5.0, 20.0])
def test_steps_of_any_size(bias):
    """Steps from exp(-20) to 20: values and gradients against the equations, and float32 against float64."""
    layer = make().double()
    with torch.no_grad():
        layer.dt_bias.fill_(bias)
    x = torch.randn(2, 21, 12, dtype=F64)
    found, want = layer(x), by_hand(layer, x)
    torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-10)
    leaves = list(layer.parameters())
    mine, theirs = (torch.autograd.grad(o.pow(3).sum(), leaves) for o in (found, want))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8 * max(1e-4, float(b.abs().max())))
    single = make()
    with torch.no_grad():
        single.dt_bias.fill_(bias)
    out = single(x.float())
    torch.testing.assert_close(out.double(), found, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(out.pow(3).sum(), list(single.parameters()))
    for a, b in zip(grads, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-3 * float(b.abs().max()))


OPTIONS = [
    {},
    {"ngroups": 2, "D_has_hdim": True, "norm_before_gate": True},
    {"rmsnorm": False},
    {"d_ssm": 16},
    {"dt_limit": (0.01, 0.2)},
    {"d_conv": 2, "bias": True, "conv_bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prefill_equals_steps(options):
    layer, x = make(**options).double(), torch.randn(2, 11, 12, dtype=F64)
    want = layer(x)
    with torch.no_grad():
        states = layer.allocate_inference_cache(2)
        for t in range(11):
            out, *states = layer.step(x[:, t : t + 1], *states)
            torch.testing.assert_close(out, want[:, t : t + 1])
        for prompt in (2, 9):
            out, *prompted = layer(x[:, :prompt], return_states=True)
            torch.testing.assert_close(out, want[:, :prompt])
            for t in range(prompt, 11):
                out, *prompted = layer.step(x[:, t : t + 1], *prompted)
                torch.testing.assert_close(out, want[:, t : t + 1])
            for a, b in zip(states, prompted, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_paths_are_equal(options):
    fast, slow = make(**options).double(), make(**options, use_mem_eff_path=False).double()
    x = torch.randn(2, 11, 12, dtype=F64)
    grads = []
    for layer in (fast, slow):
        out = layer(x)
        grads.append([out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_walking_by_an_order_equals_gathering():
    layer, x = make().double(), torch.randn(2, 11, 12, dtype=F64, requires_grad=True)
    order = torch.stack([torch.randperm(11) for _ in range(2)])
    rows = torch.arange(2)[:, None]
    for reverse in (False, True):
        walk = order.flip(1) if reverse else order
        want = torch.zeros_like(x)
        want[rows, walk] = layer(x[rows, walk])
        found = layer(x, scan_order=order, reverse=reverse)
        torch.testing.assert_close(found, want)
        for a, b in zip(*(torch.autograd.grad(o.pow(3).sum(), [x, layer.A_log]) for o in (found, want)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("walk", ["plain", "reverse", "order"])
def test_packed_rows(walk):
    layer, x = make().double(), torch.randn(2, 9, 12, dtype=F64)
    seq = torch.tensor([[0] * 4 + [1] * 5] * 2, dtype=torch.int32)
    if walk == "order":  # tokens shuffled, walked back into place
        order = torch.stack([torch.randperm(9) for _ in range(2)])
        rows = torch.arange(2)[:, None]
        shuffled, moved = torch.zeros_like(x), torch.zeros_like(seq)
        shuffled[rows, order], moved[rows, order] = x, seq
        found = layer(shuffled, seq_idx=moved, scan_order=order)[rows, order]
        want = torch.cat([layer(part) for part in x.split([4, 5], 1)], 1)
    else:
        reverse = walk == "reverse"
        found = layer(x, seq_idx=seq, reverse=reverse)
        want = torch.cat([layer(part, reverse=reverse) for part in x.split([4, 5], 1)], 1)
    torch.testing.assert_close(found, want)


def test_parameters_are_upstreams():
    layer = make(d_state=128, headdim=8, ngroups=1)
    sizes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert sizes == {
        "dt_bias": (3,), "A_log": (3,), "D": (3,), "in_proj.weight": (24 + 24 + 256 + 3, 12),
        "conv1d.weight": (280, 1, 4), "conv1d.bias": (280,), "norm.weight": (24,), "out_proj.weight": (12, 24),
    }  # fmt: skip
    layer = Mamba2(128, D_has_hdim=True, conv_init=0.01, A_init_range=(2, 3))
    dt = F.softplus(layer.dt_bias.detach())
    assert 0.99e-3 < float(dt.min()) < float(dt.max()) < 0.101
    assert 2 <= float(layer.A_log.detach().exp().min()) <= float(layer.A_log.detach().exp().max()) <= 3
    assert layer.D.shape == (256,)
    assert float(layer.conv1d.weight.detach().abs().max()) <= 0.01


@pytest.mark.parametrize(
    "options",
    [{"headdim": 5}, {"ngroups": 4}, {"d_ssm": 32}, {"A_init_range": (0, 1)}, {"A_init_range": (3, 1)}],
    ids=str,
)
def test_sizes_that_do_not_fit(options):
    with pytest.raises(ValueError):
        Mamba2(12, **{"d_state": 4, "headdim": 8} | options)


def test_wrong_inputs():
    layer = make()
    with pytest.raises(ValueError, match=r"tokens \(B, L, 12\)"):
        layer(torch.zeros(2, 3, 11))
    with pytest.raises(ValueError, match="one token"):
        layer.step(torch.zeros(2, 3, 12), *layer.allocate_inference_cache(2))


def test_bfloat16_and_autocast():
    layer, x = make(), torch.randn(2, 11, 12)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    found.float().sum().backward()
    torch.testing.assert_close(found.float(), want, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    half = make().bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    conv_state, ssm_state = half.allocate_inference_cache(2)
    assert (conv_state.dtype, ssm_state.dtype) == (torch.bfloat16, torch.float32)
    assert half.step(x[:, :1].bfloat16(), conv_state, ssm_state)[0].dtype == torch.bfloat16
