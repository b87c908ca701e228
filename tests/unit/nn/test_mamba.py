"""Mamba layers against transformers' MambaMixer with the same weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from bestiary.shared.nn.mamba import BidirectionalMamba, Mamba, MambaLayer, MambaStack, SlicedMamba

transformers = pytest.importorskip("transformers")


def peer(layer: Mamba, suffix: str = ""):
    """transformers' mixer with the weights of one branch of ours."""
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = transformers.MambaConfig(
        hidden_size=layer.d_model,
        state_size=layer.d_state,
        conv_kernel=layer.d_conv,
        intermediate_size=layer.d_inner,
        expand=layer.d_inner // layer.d_model,
        time_step_rank=layer.dt_rank,
        use_bias=False,
        num_hidden_layers=1,
    )
    mixer = MambaMixer(config, layer_idx=0).eval()
    ours = layer.state_dict()
    weights = {name: ours[name] for name in ("in_proj.weight", "out_proj.weight")}
    for name in ("conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"):
        module, _, kind = name.partition(".")
        weights[name] = ours[f"{module}{suffix}.{kind}"]
    weights["A_log"], weights["D"] = ours[f"A{suffix}_log"], ours[f"D{suffix}"]
    mixer.load_state_dict(weights)
    return mixer


def randomise(layer: Mamba) -> Mamba:
    """Different values for every branch, D and A included."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.add_(0.3 * torch.randn_like(p) if "log" in name or name.startswith("D") else 0.1 * torch.randn_like(p))
    return layer


@pytest.mark.parametrize("length", [1, 3, 21])
@pytest.mark.parametrize("options", [{}, {"d_state": 5, "d_conv": 3, "expand": 3, "dt_rank": 7}], ids=str)
def test_equals_transformers(length, options):
    torch.manual_seed(length)
    layer = randomise(Mamba(20, **options))
    x = torch.randn(2, length, 20, requires_grad=True)
    y = torch.zeros_like(x).copy_(x.detach()).requires_grad_()
    mixer = peer(layer)
    found, want = layer(x), mixer(y)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(want)
    (found * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    for name, p in mixer.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("length", "n"), [(10, 5), (25, 5), (12, 3), (4, 1)])
def test_sliced_is_the_sum_of_three_mixers(length, n):
    torch.manual_seed(0)
    layer = randomise(SlicedMamba(8, n, d_state=4))
    x = torch.randn(2, length, 8)
    old = torch.tensor([c * (length // n) + t for t in range(length // n) for c in range(n)])
    assert sorted(old.tolist()) == list(range(length))
    sliced = torch.empty_like(x)
    sliced[:, old] = peer(layer, "_s")(x[:, old])
    want = peer(layer)(x) + peer(layer, "_b")(x.flip(1)).flip(1) + sliced
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 3, 7, 11])
def test_sliced_pads_the_slice_branch_alone(length):
    torch.manual_seed(0)
    layer = randomise(SlicedMamba(8, 5, d_state=4))
    x = torch.randn(2, length, 8)
    padded = F.pad(x, (0, 0, 0, -length % 5))
    width = padded.shape[1] // 5
    old = torch.tensor([c * width + t for t in range(width) for c in range(5)])
    sliced = torch.empty_like(padded)
    sliced[:, old] = peer(layer, "_s")(padded[:, old])
    want = peer(layer)(x) + peer(layer, "_b")(x.flip(1)).flip(1) + sliced[:, :length]
    found = layer(x)
    assert found.shape == x.shape
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_initialisation():
    torch.manual_seed(0)
    layer = SlicedMamba(128)
    assert layer.dt_rank == 8
    for suffix in ("", "_b", "_s"):
        want = torch.log(torch.arange(1.0, 17)).expand(256, 16)
        assert torch.equal(layer.get_parameter(f"A{suffix}_log"), want)
        assert torch.equal(layer.get_parameter(f"D{suffix}"), torch.ones(256))
        assert layer.get_parameter(f"conv1d{suffix}.bias").shape == (256,)
    dt = F.softplus(layer.dt_proj.bias.double())
    assert dt.min() > 0.99e-3
    assert dt.max() < 0.101
    assert abs(float(dt.log().mean().detach()) - (math.log(1e-3) + math.log(0.1)) / 2) < 0.3
    assert float(layer.dt_proj.weight.detach().abs().max()) <= 8**-0.5
    # the further branches keep nn.Linear's own initialisation: biases of both signs within rank^-0.5
    for suffix in ("_b", "_s"):
        bias = layer.get_parameter(f"dt_proj{suffix}.bias")
        assert bias.max() > 0.2
        assert bias.min() < -0.2
        assert bias.abs().max() <= 8**-0.5
    assert layer.in_proj.bias is None
    assert layer.out_proj.bias is None


def test_layer_and_stack():
    torch.manual_seed(0)
    layer, x = MambaLayer(9, d_state=4), torch.randn(2, 6, 9)
    inner = F.layer_norm(F.linear(x, layer.linear.weight, layer.linear.bias), (9,)).clamp(min=0)
    want = F.layer_norm(x + layer.mamba(inner), (9,))
    torch.testing.assert_close(layer(x), want)
    stack = MambaStack(9, 2, d_state=4)
    torch.testing.assert_close(stack(x), stack.layers[1](stack.layers[0](x)))
    stack(x).square().sum().backward()
    assert all(p.grad is not None for p in stack.parameters())


def test_autocast_is_finite_and_close():
    torch.manual_seed(0)
    layer, x = SlicedMamba(16, 5), torch.randn(2, 11, 16)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    found.float().sum().backward()
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.float(), want, rtol=0.1, atol=0.05)
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_float64_and_wrong_shapes():
    layer = Mamba(6).double()
    assert layer(torch.randn(1, 4, 6, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(ValueError, match=r"tokens \(B, L, 6\)"):
        layer(torch.randn(1, 6, 4))
    with pytest.raises(ValueError, match="num_slices"):
        SlicedMamba(6, 0)


def orders(B, L, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(L, generator=g) for _ in range(B)])


def gathered(layer, x, order, **options):
    """The layer on tokens moved into the order, its output moved back: by plain indexing."""
    rows = torch.arange(len(x))[:, None]
    out = torch.zeros_like(x)
    out[rows, order] = layer(x[rows, order], **options)
    return out


@pytest.mark.parametrize("length", [1, 5, 10, 11])
@pytest.mark.parametrize("kind", [Mamba, SlicedMamba, BidirectionalMamba, MambaLayer, MambaStack])
def test_walking_by_an_order_equals_gathering(kind, length):
    torch.manual_seed(0)
    layer = kind(6, d_state=3).double()
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    order = orders(2, length)
    found, want = layer(x, scan_order_BL=order), gathered(layer, x, order)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    leaves = [x, *layer.parameters()]
    mine, theirs = (torch.autograd.grad(o.pow(3).sum(), leaves) for o in (found, want))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_reverse_equals_flipping():
    torch.manual_seed(0)
    layer, x = randomise(Mamba(6)).double(), torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x, reverse=True), layer(x.flip(1)).flip(1))
    order = orders(2, 9)
    torch.testing.assert_close(layer(x, order, True), layer(x, order.flip(1)))


@pytest.mark.parametrize("kind", [Mamba, BidirectionalMamba])
def test_packed_rows(kind):
    torch.manual_seed(0)
    layer, x = randomise(kind(6)).double(), torch.randn(2, 9, 6, dtype=torch.float64)
    seq = torch.tensor([[0] * 4 + [1] * 5] * 2)
    want = torch.cat([layer(part) for part in x.split([4, 5], 1)], 1)
    torch.testing.assert_close(layer(x, seq_idx_BL=seq), want)
    assert (layer(x) - want).abs().max() > 1e-3


@pytest.mark.parametrize("divide", [False, True])
def test_bidirectional_is_the_sum_of_two_mixers(divide):
    torch.manual_seed(0)
    layer, x = randomise(BidirectionalMamba(8, divide, d_state=4)), torch.randn(2, 7, 8)
    want = peer(layer)(x) + peer(layer, "_b")(x.flip(1)).flip(1)
    torch.testing.assert_close(layer(x), want / 2 if divide else want, rtol=1e-5, atol=1e-5)


def test_tokens_are_not_copied():
    """Convolution and scan see the projections' memory as it lies: channel-last views."""
    seen = {}
    import bestiary.kernels.mamba_inner.branch as branch

    conv, scan = branch.causal_conv1d_fn, branch.selective_scan_fn

    def spy_conv(x, *args, **kwargs):
        seen["x"] = x
        return conv(x, *args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    def spy_scan(u, delta, A, B, C, D, z, *args, **kwargs):
        seen.update(u=u, delta=delta, B=B, C=C, z=z)
        return scan(u, delta, A, B, C, D, z, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch, "causal_conv1d_fn", spy_conv)
        patch.setattr(branch, "selective_scan_fn", spy_scan)
        Mamba(8, d_state=4)(torch.randn(2, 7, 8))
    assert all(t.stride(1) == 1 for t in seen.values())
    assert seen["x"].untyped_storage().data_ptr() == seen["z"].untyped_storage().data_ptr()
    assert seen["B"].untyped_storage().data_ptr() == seen["C"].untyped_storage().data_ptr()


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("options", [{}, {"d_conv": 2, "d_state": 5, "expand": 3}], ids=str)
def test_prefill_equals_steps(length, options):
    torch.manual_seed(0)
    layer, x = randomise(Mamba(6, **options)).double(), torch.randn(2, length + 3, 6, dtype=torch.float64)
    want = layer(x)
    states = layer.allocate_inference_cache(2)
    assert states[0].shape == (2, layer.d_inner, layer.d_conv - 1)
    assert states[1].shape == (2, layer.d_inner, layer.d_state)
    with torch.no_grad():
        for t in range(length + 3):
            out, *states = layer.step(x[:, t : t + 1], *states)
            torch.testing.assert_close(out, want[:, t : t + 1])
        # a prompt at once, then steps
        out, *prompt = layer(x[:, :length], return_states=True)
        torch.testing.assert_close(out, want[:, :length])
        more, *_ = layer(x[:, length:], states=tuple(s.clone() for s in prompt), return_states=True)
        torch.testing.assert_close(more, want[:, length:])
        for t in range(length, length + 3):
            out, *prompt = layer.step(x[:, t : t + 1], *prompt)
            torch.testing.assert_close(out, want[:, t : t + 1])
    for a, b in zip(states, prompt, strict=True):
        torch.testing.assert_close(a, b)


def test_decoding_dtypes_and_refusals():
    layer = Mamba(6).bfloat16()
    conv_state, ssm_state = layer.allocate_inference_cache(3)
    assert conv_state.dtype == torch.bfloat16
    assert ssm_state.dtype == torch.float32
    out, *_ = layer.step(torch.randn(3, 1, 6, dtype=torch.bfloat16), conv_state, ssm_state)
    assert out.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="one token"):
        layer.step(torch.zeros(3, 2, 6, dtype=torch.bfloat16), conv_state, ssm_state)
    for other in (SlicedMamba(6), BidirectionalMamba(6)):
        with pytest.raises(NotImplementedError, match="later tokens"):
            other.allocate_inference_cache(1)


def test_the_gate_is_taken_in_float32_under_autocast():
    """The scan gets float32 whatever autocast says, and its gated result is rounded once."""
    torch.manual_seed(0)
    layer, x = Mamba(8), torch.randn(2, 7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        x_BLE, z_BLE = layer._project(x)
        y_BLE = layer._branch(x_BLE)
        found = layer(x)
        want = layer.out_proj((y_BLE * F.silu(z_BLE.float())).bfloat16())
    assert y_BLE.dtype == torch.float32
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("kind", [Mamba, MambaLayer])
def test_compiles_whole(kind):
    torch.manual_seed(0)
    layer, x, order = kind(6, d_state=3), torch.randn(2, 7, 6), orders(2, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want, found = layer(x, scan_order_BL=order), compiled(x, scan_order_BL=order)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    leaves = list(layer.parameters())
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (found, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
