"""The raster mixer: its form, its threshold, and what it takes."""

import pytest
import torch
import torch.nn.functional as F

from bestiary.shared.core.protocols import TokenMixer
from bestiary.shared.nn.mixers import Raster, RasterMamba


def test_form():
    torch.manual_seed(0)
    block = RasterMamba(8, d_state=4, depth=2).eval()
    image = torch.randn(2, 8, 3, 4)
    tokens = torch.stack([image[:, :, y, x] for y in range(3) for x in range(4)], dim=1)
    u = tokens
    for layer in block.stack.layers:
        u = layer.out_norm(u + layer.mamba(F.relu(layer.norm(layer.linear(u)))))
    want = block.proj_norm(block.proj(u))
    found = block(image)
    assert found.shape == image.shape
    for i, (y, x) in enumerate((y, x) for y in range(3) for x in range(4)):
        torch.testing.assert_close(found[:, :, y, x], want[:, i])
    torch.testing.assert_close(block(tokens), want)
    block.residual = True
    torch.testing.assert_close(block(tokens), tokens + want)


def test_threshold_is_strict():
    mixer = Raster(min_channels=8, d_state=4)
    assert isinstance(mixer, TokenMixer)
    assert mixer.build(8, 2, 0) is None
    assert mixer.build(9, 2, 0) is not None


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    block, x = RasterMamba(6, 3, d_state=4).double().train(), torch.randn(2, 6, 2, 2, 3, dtype=torch.float64)
    grads = []
    for block.checkpoint in (False, True):
        block.zero_grad()
        block(x).square().sum().backward()
        grads.append([p.grad.clone() for p in block.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_wrong_shapes():
    block = RasterMamba(6, 3)
    for shape in ((2, 6, 4, 4), (2, 5, 2, 2, 2), (2, 4, 5), (2, 6)):
        with pytest.raises(ValueError, match=r"expected"):
            block(torch.zeros(shape))
