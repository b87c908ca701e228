"""The plain U-Net: its form against one written out by hand, and its checks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.protocols import PyramidEncoder
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.vision.unet import SegUNet, UNetDecoder, UNetPlainEncoder, unet_plain_encoder


def make(axes=2, mixer=None, decoder_mixer=None, convs=(2, 2), **options):
    strides = [(1,) * axes, (2,) * axes, (1,) + (2,) * (axes - 1)]
    kernels = [(1,) + (3,) * (axes - 1), (3,) * axes, (3,) * axes]
    encoder = UNetPlainEncoder(axes, 2, [4, 6, 8], strides, kernels, convs[0], mixer)
    return SegUNet(encoder, UNetDecoder(encoder, 3, convs[1], decoder_mixer, **options), 2)


class Doubler(nn.Module):
    def forward(self, x):
        return 2 * x


class DoublerMixer:
    def __init__(self):
        self.calls = []

    def build(self, dim, spatial_dims, level):
        self.calls.append((dim, spatial_dims, level))
        return Doubler() if dim > 4 else None


def by_hand(net, x, scale_encoder=1, scale_decoder=1):
    """The forward pass of a 2D net of :func:`make`, from its state dict and the formulas alone."""
    p = net.state_dict()

    def unit(x, name, stride):
        kernel = p[f"{name}.conv.weight"].shape[2:]
        pad = [(k - 1) // 2 for k in kernel]
        x = F.conv2d(x, p[f"{name}.conv.weight"], p[f"{name}.conv.bias"], stride, pad)
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
        x = (x - mean) / torch.sqrt(var + 1e-5)
        x = x * p[f"{name}.norm.weight"][:, None, None] + p[f"{name}.norm.bias"][:, None, None]
        return torch.where(x > 0, x, 0.01 * x)

    skips = []
    for i, stride in enumerate([(1, 1), (2, 2), (1, 2)]):
        x = unit(unit(x, f"encoder.levels.{i}.convs.0", stride), f"encoder.levels.{i}.convs.1", 1)
        x = x * (scale_encoder if i else 1)
        skips.append(x)
    logits = []
    for k, stride in enumerate([(1, 2), (2, 2)]):
        up = F.conv_transpose2d(x, p[f"decoder.upsamples.{k}.weight"], p[f"decoder.upsamples.{k}.bias"], stride)
        x = torch.cat([up, skips[1 - k]], dim=1)
        x = unit(unit(x, f"decoder.levels.{k}.convs.0", 1), f"decoder.levels.{k}.convs.1", 1)
        x = x * (scale_decoder if k == 0 else 1)
        head = f"decoder.heads.{1 - k}"
        logits.append(F.conv2d(x, p[f"{head}.weight"], p[f"{head}.bias"]))
    return logits[::-1]


@pytest.mark.parametrize("mixed", [False, True])
def test_forward_is_the_formula(mixed):
    torch.manual_seed(0)
    mixer = DoublerMixer() if mixed else None
    net, x = make(mixer=mixer, decoder_mixer=mixer), torch.randn(2, 2, 8, 12)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    want = by_hand(net, x, *((2, 2) if mixed else (1, 1)))
    found = net.train()(x)
    assert [t.shape[2:] for t in found] == [(8, 12), (4, 6)]
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.eval()(x), want[0], rtol=1e-4, atol=1e-4)
    if mixer:
        assert mixer.calls == [(4, 2, 0), (6, 2, 1), (8, 2, 2), (6, 2, 1), (4, 2, 0)]


def test_without_deep_supervision_there_is_one_head_under_the_same_name():
    net = make(3, deep_supervision=False)
    assert list(net.decoder.heads) == ["0"]
    assert net.train()(torch.randn(1, 2, 4, 8, 8)).shape == (1, 3, 4, 8, 8)
    full = make(3).state_dict()
    net.load_state_dict({k: v for k, v in full.items() if "heads.1" not in k})


def test_initialisation():
    torch.manual_seed(0)
    encoder = UNetPlainEncoder(3, 1, [32, 64], [1, 2], [3, 3])
    decoder = UNetDecoder(encoder, 3)
    assert isinstance(encoder, PyramidEncoder)
    convs = [m for part in (encoder, decoder) for m in part.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]
    assert len(convs) == 4 + 4  # two levels of two; upsample, two, head
    for conv in convs:
        fan_in = conv.weight[0].numel()
        want = (2 / (1 + 0.01**2) / fan_in) ** 0.5
        assert abs(float(conv.weight.detach().std()) / want - 1) < 0.12
        assert not conv.bias.any()


def test_a_seed_means_the_same_weights_as_ever():
    """Measured numbers name a seed, so the order of building counts: a level's mixer comes before its convolutions."""

    drawn = []

    class Drawing:
        def build(self, dim, spatial_dims, level):
            drawn.append(float(torch.rand(1)))

    torch.manual_seed(0)
    first = float(torch.rand(1))
    nn.Conv2d(2, 4, (1, 3))
    second = float(torch.rand(1))
    torch.manual_seed(0)
    make(mixer=Drawing(), convs=(1, 1))
    assert drawn[:2] == [first, second]


def test_counts_per_level():
    net = make(convs=([1, 2, 3], (3, 1)))
    assert [len(level.convs) for level in net.encoder.levels] == [1, 2, 3]
    assert [len(level.convs) for level in net.decoder.levels] == [3, 1]
    with pytest.raises(ConfigError, match="3 of them"):
        make(convs=([1, 2], 2))
    with pytest.raises(ConfigError, match="2 of them"):
        make(convs=(1, [1, 2, 3]))


def test_wrong_input():
    net = make()
    with pytest.raises(ValueError, match=r"\(9, 12\) must be divisible by .* \(2, 4\)"):
        net(torch.zeros(1, 2, 9, 12))
    with pytest.raises(ValueError, match=r"image \(B, 2, H, W\)"):
        net(torch.zeros(1, 1, 8, 12))
    with pytest.raises(ValueError, match=r"image \(B, 2, H, W\)"):
        net(torch.zeros(1, 2, 4, 8, 12))


def spec(**changes):
    values = dict(task="seg", spatial_dims=3, in_channels=1, num_classes=2, class_names=("b", "a"), spacing=(1, 1, 1),
                  patch_size=(8, 16, 16), strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)))  # fmt: skip
    return DataSpec(**(values | changes))


def test_from_a_spec():
    encoder = unet_plain_encoder(spec())
    assert encoder.channels == (32, 64, 128)
    assert encoder.strides == spec().strides
    assert encoder.kernel_sizes == ((3, 3, 3),) * 3
    kernels = ((1, 3, 3), (3, 3, 3), (3, 3, 3))
    assert unet_plain_encoder(spec(kernel_sizes=kernels)).kernel_sizes == kernels
    given = unet_plain_encoder(spec(), features=[4, 8], strides=[1, [1, 2, 2]], kernel_sizes=[3, [1, 3, 3]])
    assert given.channels == (4, 8)
    assert given.kernel_sizes == ((3, 3, 3), (1, 3, 3))
    with torch.device("meta"):
        deep = spec(patch_size=(1, 64, 64), strides=((1, 1, 1),) + ((1, 2, 2),) * 5)
        assert unet_plain_encoder(deep).channels == (32, 64, 128, 256, 320, 320)
        flat = spec(spatial_dims=2, spacing=(1, 1), patch_size=(64, 64), strides=((1, 1),) + ((2, 2),) * 5)
        assert unet_plain_encoder(flat).channels == (32, 64, 128, 256, 512, 512)


def test_from_a_spec_errors():
    with pytest.raises(ConfigError, match="strides"):
        unet_plain_encoder(spec(strides=()))
    with pytest.raises(ConfigError, match="features has 2, strides 3"):
        unet_plain_encoder(spec(), features=[4, 8])
    with pytest.raises(ConfigError, match="odd"):
        unet_plain_encoder(spec(), kernel_sizes=[2, 3, 3])
    with pytest.raises(ConfigError, match="3 positive numbers"):
        unet_plain_encoder(spec(), strides=[(1, 1), 2, 2])
