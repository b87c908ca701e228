"""U-Mamba: sizes of the official code, its blocks by hand, where Mamba stands, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.nn.mamba import Mamba
from bestiary.shared.vision.umamba import ProjectedBlock, RepeatUpsample, UMambaLayer, umamba_bot, umamba_enc

ACDC = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)]
CT = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)]
FIRST_FLAT = [(1, 3, 3)] + [(3, 3, 3)] * 5
FLAT = [(1, 1)] + [(2, 2)] * 5


def spec(axes=3, patch=(4, 8, 8), strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)), kernels=(), channels=1, classes=3):
    names = tuple(map(str, range(classes)))
    images = tuple(map(str, range(channels)))
    return DataSpec("seg", images, axes, channels, classes, names, (1.0,) * axes, patch, strides, kernels)


# Counted with the official networks (commit 530739b) on meta tensors, their mamba_ssm.Mamba replaced by ours, which has
# its parameters (tests/unit/nn). With equal random weights, outputs differed by 2e-5 at most where the largest was 40.
@pytest.mark.parametrize(
    ("net", "data", "total"),
    [
        (umamba_bot, spec(3, (20, 256, 224), ACDC, FIRST_FLAT, classes=4), 41_937_108),
        (umamba_enc, spec(3, (20, 256, 224), ACDC, FIRST_FLAT, classes=4), 43_056_788),
        (umamba_bot, spec(3, (40, 224, 192), CT, FIRST_FLAT, classes=14), 41_945_158),
        (umamba_enc, spec(3, (40, 224, 192), CT, FIRST_FLAT, classes=14), 42_842_798),
        (umamba_bot, spec(2, (256, 224), FLAT, [(3, 3)] * 6, classes=4), 28_760_276),
        (umamba_enc, spec(2, (256, 224), FLAT, [(3, 3)] * 6, classes=4), 27_561_556),
    ],
)
def test_sizes_are_the_official_codes(net, data, total):
    with torch.device("meta"):
        assert sum(p.numel() for p in net(data).parameters()) == total


def test_the_first_block_is_the_formula():
    torch.manual_seed(0)
    block, x = ProjectedBlock(2, 3, (1, 3), (2, 2)), torch.randn(2, 2, 6, 8)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.3 * torch.randn_like(p))
    p = block.state_dict()

    def norm(x, name):
        x = (x - x.mean((2, 3), keepdim=True)) / torch.sqrt(x.var((2, 3), keepdim=True, unbiased=False) + 1e-5)
        return x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    y = norm(F.conv2d(x, p["conv1.conv.weight"], p["conv1.conv.bias"], (2, 2), (0, 1)), "conv1.norm")
    y = torch.where(y > 0, y, 0.01 * y)
    y = norm(F.conv2d(y, p["conv2.conv.weight"], p["conv2.conv.bias"], 1, (0, 1)), "conv2.norm")
    skip = torch.einsum("bchw,oc->bohw", x[:, :, ::2, ::2], p["project.weight"][:, :, 0, 0])
    y = y + skip + p["project.bias"][:, None, None]
    torch.testing.assert_close(block(x), torch.where(y > 0, y, 0.01 * y), rtol=1e-5, atol=1e-5)


def test_repeating_after_the_convolution_is_repeating_before_it():
    torch.manual_seed(0)
    up, x = RepeatUpsample(3, 2, (1, 2, 3)), torch.randn(2, 3, 2, 4, 3)
    repeated = x.repeat_interleave(2, 3).repeat_interleave(3, 4)
    torch.testing.assert_close(up(x), up.conv(repeated))


@pytest.mark.parametrize("size", [(7,), (3, 5), (1, 3, 5)])
def test_voxels_as_tokens(size):
    torch.manual_seed(0)
    layer, x = UMambaLayer(4, d_state=3), torch.randn(2, 4, *size)
    tokens = torch.stack([x.reshape(2, 4, -1)[:, :, t] for t in range(x[0, 0].numel())], dim=1)
    want = layer.mamba(F.layer_norm(tokens, (4,)))
    found = layer(x) if len(size) > 1 else layer(x[:, :, None])[:, :, 0]
    for t in range(tokens.shape[1]):
        torch.testing.assert_close(found.reshape(2, 4, -1)[:, :, t], want[:, t])


def test_channels_as_tokens():
    torch.manual_seed(0)
    layer, x = UMambaLayer(6, channel_tokens=True, d_state=3), torch.randn(2, 5, 2, 3)
    want = layer.mamba(F.layer_norm(x.reshape(2, 5, 6), (6,)))
    torch.testing.assert_close(layer(x).reshape(2, 5, 6), want)
    with pytest.raises(ValueError, match=r"6 voxels .* leaves 8: give it the patch size"):
        layer(torch.randn(2, 5, 2, 4))


def test_fp32_under_autocast():
    layer, x = UMambaLayer(4), torch.randn(1, 4, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, layer(x.bfloat16().float()))


def kinds(net):
    return [lv.mixer and ("channels" if lv.mixer.channel_tokens else "voxels") for lv in net.encoder.levels]


def test_where_mamba_stands():
    strides = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    four = spec(3, (16, 16, 16), strides)
    widths = dict(features=[4, 6, 8, 10])
    assert kinds(umamba_bot(four, **widths)) == [None, None, None, "voxels"]
    assert kinds(umamba_enc(four, **widths)) == ["voxels", "voxels", "voxels", "channels"]  # 2 x 2 x 2 <= 10
    assert kinds(umamba_enc(four, **widths, channel_tokens=False)) == ["voxels"] * 4
    assert kinds(umamba_enc(four, **widths, mamba_levels="alternate")) == [None, "voxels", None, "channels"]
    flat = spec(2, (16, 16), [(1, 1), (2, 2), (2, 2)])
    assert kinds(umamba_enc(flat, features=[4, 6, 8])) == ["voxels", None, "voxels"]
    with pytest.raises(ConfigError, match="all or alternate"):
        umamba_enc(four, mamba_levels="some")


def test_the_coarse_half_of_the_encoder_and_the_fine_half_of_the_decoder_have_one_block():
    strides = [(1, 1)] + [(2, 2)] * 4
    net = umamba_bot(spec(2, (16, 16), strides), features=[2] * 5, convs_per_stage=[3, 2, 4, 5, 6], decoder_convs=3)
    assert len(net.encoder.stem) == 3
    assert [len(level.convs) for level in net.encoder.levels] == [3, 2, 4, 1, 1]
    assert [len(level.convs) for level in net.decoder.levels] == [3, 3, 3, 1]
    null = umamba_bot(spec(2, (16, 16), strides), features=[2] * 5, convs_per_stage=None)
    assert [len(level.convs) for level in null.encoder.levels] == [2, 2, 2, 1, 1]
    with pytest.raises(ConfigError, match="5 of them"):
        umamba_bot(spec(2, (16, 16), strides), features=[2] * 5, convs_per_stage=[1, 2])


@pytest.mark.parametrize("finest", [None, True, False])
@pytest.mark.parametrize("axes", [2, 3])
def test_the_finest_skip(axes, finest):
    net = umamba_bot(spec(axes, (8,) * axes, [1, 2]), features=[2, 4], finest_skip=finest).eval()
    x = torch.randn(1, 1, *(8,) * axes)
    pyramid = net.encoder(x)
    changed = net.decoder([pyramid[0] + 1 + torch.randn_like(pyramid[0]), pyramid[1]])
    seen = not torch.allclose(changed, net.decoder(pyramid))
    assert seen == (axes == 3 if finest is None else finest)


@pytest.mark.parametrize("net", [umamba_bot, umamba_enc])
@pytest.mark.parametrize(
    ("axes", "patch", "strides"),
    [(2, (6, 10), ((1, 1), (2, 2))), (3, (6, 4, 10), ((1, 1, 1), (2, 1, 2))), (3, (3, 6, 4), (1, (1, 2, 2)))],
)
def test_outputs_and_gradients_with_odd_numbers_of_tokens(net, axes, patch, strides):
    torch.manual_seed(0)
    data = spec(axes, patch, strides, channels=2)
    built = net(data, features=[4, 6], d_state=3, convs_per_stage=2).double().train()
    outputs = built(torch.randn(2, 2, *patch, dtype=torch.float64))
    assert [tuple(o.shape) for o in outputs] == [(2, 3, *patch)]
    outputs[0].pow(3).sum().backward()
    missing = [name for name, p in built.named_parameters() if p.grad is None]
    # a bias in front of InstanceNorm has a gradient of zero, so only its presence counts
    zero = [n for n, p in built.named_parameters() if not p.grad.any() and not n.endswith("conv.bias")]
    assert missing == []
    assert zero == []


def test_deep_supervision_and_wrong_images():
    data = spec()
    net = umamba_enc(data, features=[4, 6, 8], d_state=3)
    x = torch.randn(1, 1, 4, 8, 8)
    assert [tuple(o.shape[2:]) for o in net.train()(x)] == [(4, 8, 8), (4, 4, 4)]
    assert net.eval()(x).shape == (1, 3, 4, 8, 8)
    assert umamba_enc(data, features=[4, 6, 8], deep_supervision=False).train()(x).shape == (1, 3, 4, 8, 8)
    with pytest.raises(ValueError, match="divisible by the product of the strides"):
        net(torch.randn(1, 1, 4, 8, 6))
    assert umamba_bot(data, features=[4, 6, 8]).eval()(torch.randn(1, 1, 2, 8, 12)).shape[2:] == (2, 8, 12)
    assert {type(m) for m in net.modules() if isinstance(m, Mamba)} == {Mamba}
    with pytest.raises(ConfigError, match="strides"):
        umamba_bot(spec(strides=()))
