"""Swin UNETR is MONAI's net, at the plan's width and with images of any size."""

import pytest
import torch

from bestiary.shared.core.specs import DataSpec
from bestiary.shared.vision.swin_unetr import SwinUNETR, swin_unetr

nets = pytest.importorskip("monai.networks.nets")
pytest.importorskip("einops")


def spec(axes=3):
    return DataSpec("seg", ("T1",), axes, 1, 4, ("a", "b", "c", "d"), (1.0,) * axes, (32,) * axes)


def test_it_is_monais():
    torch.manual_seed(0)
    ours = swin_unetr(spec(2), feature_size=12).eval()
    theirs = nets.SwinUNETR(in_channels=1, out_channels=4, feature_size=12, spatial_dims=2).eval()
    theirs.load_state_dict(ours.net.state_dict())
    x = torch.randn(1, 1, 64, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_widths_follow_the_plan():
    with torch.device("meta"):
        sizes = [
            swin_unetr(spec(), plan_features=plan).net.encoder1.layer.conv1.out_channels
            for plan in (None, [32], [8, 16], [16, 32], [2, 4])
        ]
        total = sum(p.numel() for p in swin_unetr(spec()).parameters())
    assert sizes == [48, 48, 12, 24, 12]
    with torch.device("cpu"):
        assert total == sum(p.numel() for p in nets.SwinUNETR(1, 4, feature_size=48).parameters())


@pytest.mark.parametrize("size", [(32, 32), (33, 20), (64, 32)])
def test_any_size_and_all_gradients(size):
    torch.manual_seed(0)
    net = SwinUNETR(2, 1, 3, feature_size=12, depths=(1, 1, 1, 1)).train()
    out = net(torch.randn(2, 1, *size))
    assert out.shape == (2, 3, *size)
    out.pow(3).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_a_cube_of_one_window():
    net = SwinUNETR(3, 1, 2, feature_size=12, depths=(1, 1, 1, 1)).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 1, 32, 32, 32)).shape == (1, 2, 32, 32, 32)


def test_what_is_refused():
    with pytest.raises(ValueError, match="divisible by 12"):
        swin_unetr(spec(), feature_size=20)
    with pytest.raises(ValueError, match=r"an image \(B, 1, H, W\)"):
        swin_unetr(spec(2), feature_size=12)(torch.zeros(1, 3, 32, 32))
