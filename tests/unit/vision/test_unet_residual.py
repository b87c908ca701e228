"""The residual encoder: a block worked out by hand, the package that it follows, sizes, and its place in a net."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.protocols import PyramidEncoder
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.vision.unet import SegUNet, UNetDecoder
from bestiary.shared.vision.unet_residual import ResidualBlock, UNetResidualEncoder, unet_residual_encoder

ACDC = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)]
ACDC_KERNELS = [(1, 3, 3)] + [(3, 3, 3)] * 5


def spec(axes=3, strides=ACDC, kernels=ACDC_KERNELS, patch=(20, 256, 224), classes=4):
    return DataSpec(
        "seg", ("MR",), axes, 1, classes, tuple("abcdefghi"[:classes]), (1.0,) * axes, patch, strides, kernels
    )


def by_hand(p, x, stride):
    def norm(x, name):
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
        x = (x - mean) / torch.sqrt(var + 1e-5)
        return x * p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]

    y = norm(F.conv2d(x, p["conv1.conv.weight"], p["conv1.conv.bias"], stride, (0, 1)), "conv1.norm")
    y = torch.where(y > 0, y, 0.01 * y)
    y = norm(F.conv2d(y, p["conv2.conv.weight"], p["conv2.conv.bias"], 1, (0, 1)), "conv2.norm")
    skip = x.unflatten(3, (-1, stride[1])).mean(-1)  # stride (1, s): the mean over s neighbours of the last axis
    if "project.conv.weight" in p:
        skip = norm(torch.einsum("bchw,oc->bohw", skip, p["project.conv.weight"][:, :, 0, 0]), "project.norm")
    y = y + skip
    return torch.where(y > 0, y, 0.01 * y)


@pytest.mark.parametrize(("wide", "stride"), [(3, (1, 1)), (3, (1, 2)), (5, (1, 1)), (5, (1, 2))])
def test_a_block_is_the_formula(wide, stride):
    torch.manual_seed(0)
    block, x = ResidualBlock(3, wide, (1, 3), stride), torch.randn(2, 3, 5, 6)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.3 * torch.randn_like(p))
    assert hasattr(block.project, "conv") == (wide != 3)
    torch.testing.assert_close(block(x), by_hand(block.state_dict(), x, stride), rtol=1e-5, atol=1e-5)


def test_every_block_begins_as_its_skip():
    torch.manual_seed(0)
    encoder, x = UNetResidualEncoder(2, 1, [4, 4], [1, 2], [3, 3], [3, 1]), torch.randn(1, 1, 8, 8)
    stem = encoder.stem(x)
    first, second = encoder(x)
    torch.testing.assert_close(first, torch.where(stem > 0, stem, stem * 0.01**3))  # three LeakyReLUs
    pooled = F.avg_pool2d(first, 2)
    torch.testing.assert_close(second, torch.where(pooled > 0, pooled, 0.01 * pooled))


# Counted with ResidualEncoderUNet of dynamic-network-architectures 0.3.1 as nnU-Net v2.6.2's ResEnc planners set it up
# (bias, affine InstanceNorm, blocks 1, 3, 4, 6, 6, 6, one decoder convolution per level), on meta tensors.
@pytest.mark.parametrize(
    ("plan", "total"),
    [
        (dict(), 101_531_604),
        (dict(axes=2, strides=[(1, 1)] + [(2, 2)] * 6, kernels=[(3, 3)] * 7, patch=(512, 512), classes=4), 105_919_832),
    ],
)
def test_sizes_are_those_of_the_real_package(plan, total):
    data = spec(**plan)
    with torch.device("meta"):
        encoder = unet_residual_encoder(data)
        net = SegUNet(encoder, UNetDecoder(encoder, data.num_classes, encoder.decoder_convs), 1)
    assert [len(level.convs) for level in encoder.levels] == [1, 3, 4, 6, 6, 6, 6][: len(data.strides)]
    assert sum(p.numel() for p in net.parameters()) == total


def renamed(net):
    """State dict under the names of dynamic-network-architectures."""
    n, out = len(net.encoder.levels), {}
    pools = [any(s != 1 for s in stride) for stride in net.encoder.strides]
    for name, value in net.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["encoder", "stem"]:
            parts[2:2] = ["convs", "0"]
        elif parts[:2] == ["encoder", "levels"]:
            level, block = int(parts[2]), int(parts[4])
            parts = ["encoder", "stages", parts[2], "blocks", *parts[4:]]
            if parts[5] == "project":
                parts[5:6] = ["skip", "1" if pools[level] and block == 0 else "0"]
        elif parts[1] == "upsamples":
            parts[1] = "transpconvs"
        elif parts[1] == "heads":
            parts[1:3] = ["seg_layers", str(n - 2 - int(parts[2]))]
        else:
            parts[1] = "stages"
        out[".".join(parts)] = value
    return out


@pytest.mark.parametrize("axes", [2, 3])
def test_equal_weights_give_the_outputs_of_the_real_package(axes):
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    torch.manual_seed(0)
    strides = [(1,) * axes, (1,) + (2,) * (axes - 1), (2,) * axes, (2,) * axes]
    kernels = [(1,) + (3,) * (axes - 1)] + [(3,) * axes] * 3
    blocks = [1, 3, 4, 2]
    theirs = unet.ResidualEncoderUNet(
        2, 4, [4, 8, 12, 12], {2: nn.Conv2d, 3: nn.Conv3d}[axes], kernels, strides, blocks, 3, [1, 1, 1],
        conv_bias=True, norm_op={2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[axes],
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )  # fmt: skip
    encoder = UNetResidualEncoder(axes, 2, [4, 8, 12, 12], strides, kernels, blocks)
    ours = SegUNet(encoder, UNetDecoder(encoder, 3, encoder.decoder_convs), 2)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(0.2 * torch.randn_like(p))
    state = {k: v for k, v in theirs.state_dict().items() if "all_modules" not in k and "decoder.encoder" not in k}
    mine = renamed(ours)
    assert set(mine) == set(state)
    theirs.load_state_dict(mine, strict=False)  # the rest are aliases
    x = torch.randn(2, 2, *(16, 32, 16)[:axes])
    for a, b in zip(ours.train()(x), theirs(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Mixer:
    def build(self, dim, spatial_dims, level):
        return nn.Conv2d(dim, dim, 1) if level == 1 else None


def test_mixers_stand_at_the_end_of_levels_and_feed_the_next():
    torch.manual_seed(0)
    encoder, x = UNetResidualEncoder(2, 1, [4, 6, 8], [1, 2, 2], [3, 3, 3], 1, Mixer()), torch.randn(1, 1, 16, 8)
    assert isinstance(encoder, PyramidEncoder)
    assert encoder.num_mixers == 1
    before = encoder(x)
    with torch.no_grad():
        encoder.levels[1].mixer.weight.neg_()
    after = encoder(x)
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1], -before[1])
    assert not torch.allclose(after[2], before[2])


def test_what_the_spec_leaves_open():
    small = spec(strides=[(1, 1, 1), (2, 2, 2)], kernels=(), patch=(8, 8, 8))
    assert unet_residual_encoder(small).channels == (32, 64)
    assert [len(v.convs) for v in unet_residual_encoder(small, features=[2, 4], convs_per_stage=2).levels] == [2, 2]
    with pytest.raises(ConfigError, match="2 of them"):
        unet_residual_encoder(small, convs_per_stage=[1, 2, 3])
    with pytest.raises(ConfigError, match="strides"):
        unet_residual_encoder(spec(strides=()))
