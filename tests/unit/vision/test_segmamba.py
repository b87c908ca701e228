"""SegMamba and the padding it shares with Swin UNETR: official sizes, blocks by hand, any image size."""

import pytest
import torch
import torch.nn.functional as F

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.vision.padding import PaddedNet, padded_size, plan_width
from bestiary.shared.vision.segmamba import GatedSpatialConv, SegMamba, TriOrientedMamba, segmamba

pytest.importorskip("monai")
TINY = dict(features=(4, 6, 8, 10), hidden_size=12, depths=(1, 1, 1, 1), d_state=3)


def spec(axes=3, classes=3):
    return DataSpec("seg", ("T1",), axes, 1, classes, tuple(map(str, range(classes))), (1.0,) * axes, (32,) * axes)


def test_size_is_the_official_codes():
    # Counted with the official network (commit 1039e37) on meta tensors, its mamba_ssm.Mamba of type v3 replaced by our
    # SlicedMamba. With equal random weights and divisible tokens the outputs were equal to the last bit.
    with torch.device("meta"):
        assert sum(p.numel() for p in SegMamba(3, 4, 4).parameters()) == 67_416_196


def test_widths_follow_the_plan():
    assert [plan_width(w) for w in (None, [32, 64], [8, 16], [16])] == [48, 48, 12, 24]
    with torch.device("meta"):
        full, small = segmamba(spec()), segmamba(spec(), plan_features=[8, 16, 32, 48])
        given = segmamba(spec(), features=[2, 4, 6, 8], hidden_size=9, plan_features=[8])
    assert [lv.gsc.point[0].out_channels for lv in full.levels] == [48, 96, 192, 384]
    assert full.skips[-1].layer.conv1.out_channels == 768
    assert [lv.gsc.point[0].out_channels for lv in small.levels] == [12, 24, 48, 96]
    assert given.skips[-1].layer.conv1.out_channels == 9
    assert [lv.layers[0].mamba.num_slices for lv in full.levels] == [64, 32, 16, 8]


def test_the_gated_convolution_is_the_formula():
    torch.manual_seed(0)
    block, x = GatedSpatialConv(2, 3), torch.randn(2, 3, 4, 5)
    p = block.state_dict()

    def unit(x, name):
        weight = p[f"{name}.weight"]
        x = F.conv2d(x, weight, p[f"{name}.bias"], 1, weight.shape[-1] // 2)
        x = (x - x.mean((2, 3), keepdim=True)) / torch.sqrt(x.var((2, 3), keepdim=True, unbiased=False) + 1e-5)
        return x.clamp_min(0)

    want = x + unit(unit(unit(x, "cubes.0"), "cubes.3") + unit(x, "point.0"), "joined.0")
    torch.testing.assert_close(block(x), want, rtol=1e-5, atol=1e-5)
    assert not any("norm" in name for name in p)


def test_the_mamba_layer_is_a_residual_over_voxels():
    torch.manual_seed(0)
    layer, x = TriOrientedMamba(4, 5, d_state=3), torch.randn(2, 4, 1, 3, 7)  # 21 tokens, 5 slices
    tokens = x.flatten(2).transpose(1, 2)
    want = tokens + layer.mamba(F.layer_norm(tokens, (4,)))
    torch.testing.assert_close(layer(x).flatten(2).transpose(1, 2), want)


@pytest.mark.parametrize(
    ("size", "stride", "want"),
    [
        ((32, 32), 16, (32, 32)),
        ((33, 1), 16, (48, 16)),
        ((16, 16), 16, (16, 32)),
        ((9, 2, 30), 32, (32, 32, 64)),
        ((32, 64, 32), 32, (32, 64, 32)),
        ((40, 33, 5), 8, (40, 40, 8)),
    ],
)
def test_padded_size(size, stride, want):
    assert padded_size(size, stride) == want


class Tell(PaddedNet):
    def logits(self, x):
        self.seen = x
        return torch.cat([x, x + 1], dim=1)


def test_padding_stands_behind_and_is_cropped():
    net, x = Tell(3, 1, 8), 5 + torch.rand(2, 1, 3, 9, 8)
    out = net(x)
    assert net.seen.shape == (2, 1, 8, 16, 8)
    assert torch.equal(net.seen[:, :, :3, :9], x)
    assert net.seen.count_nonzero() == x.numel()
    assert torch.equal(out, torch.cat([x, x + 1], dim=1))
    fits = torch.rand(1, 1, 8, 8, 16)
    net(fits)
    assert net.seen is fits
    for wrong in ((1, 1, 8, 8), (1, 2, 8, 8, 8), (1, 1, 0, 8, 8)):
        with pytest.raises(ValueError, match=r"an image \(B, 1, Z, H, W\)"):
            net(torch.zeros(wrong))


@pytest.mark.parametrize(("axes", "size"), [(2, (32, 48)), (2, (20, 33)), (3, (32, 16, 16)), (3, (17, 16, 9))])
def test_outputs(axes, size):
    torch.manual_seed(0)
    net, x = SegMamba(axes, 1, 3, **TINY).train(), torch.randn(2, 1, *size)
    out = net(x)
    assert out.shape == (2, 3, *size)
    padded = net(
        F.pad(x, [n for a, b in zip(size[::-1], padded_size(size, 16)[::-1], strict=True) for n in (0, b - a)])
    )
    torch.testing.assert_close(out, padded[(..., *(slice(n) for n in size))])
    torch.testing.assert_close(net.eval()(x), out)


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    net = SegMamba(2, 1, 3, **TINY).double()
    net(torch.randn(2, 1, 32, 48, dtype=torch.float64)).pow(3).sum().backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None]
    # a bias that an InstanceNorm takes out again has a gradient of zero, so only its presence counts
    zero = [n for n, p in net.named_parameters() if not p.grad.any() and not n.endswith(".bias")]
    assert missing == []
    assert zero == []


def test_bfloat16_autocast_is_finite():
    torch.manual_seed(0)
    net = SegMamba(2, 1, 3, **TINY)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(torch.randn(2, 1, 32, 32))
    out.float().pow(2).sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_lists_have_four_entries():
    for wrong in (dict(features=(4, 6, 8)), dict(depths=(1, 1)), dict(num_slices=(1,) * 5)):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be .* 4 of them"):
            SegMamba(3, 1, 3, **(TINY | wrong))
    with pytest.raises(ConfigError, match="2 or 3"):
        SegMamba(1, 1, 3)
