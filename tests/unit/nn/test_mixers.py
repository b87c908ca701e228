"""The mixers beside the adaptive scan: their form, their orders, and what they take."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from bestiary.kernels import cross_orders
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.protocols import TokenMixer
from bestiary.shared.nn.mixers import Attention, AttentionBlock, FixedOrder, FixedOrderMamba, random_order


def test_form():
    torch.manual_seed(0)
    block = FixedOrderMamba(8, d_state=4, depth=2).eval()
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
    mixer = FixedOrder(min_channels=8, d_state=4)
    assert isinstance(mixer, TokenMixer)
    assert mixer.build(8, 2, 0) is None
    assert mixer.build(9, 2, 0) is not None


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    block, x = FixedOrderMamba(6, 3, d_state=4).double().train(), torch.randn(2, 6, 2, 2, 3, dtype=torch.float64)
    grads = []
    for block.checkpoint in (False, True):
        block.zero_grad()
        block(x).square().sum().backward()
        grads.append([p.grad.clone() for p in block.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_wrong_shapes():
    block = FixedOrderMamba(6, 3)
    for shape in ((2, 6, 4, 4), (2, 5, 2, 2, 2), (2, 4, 5), (2, 6)):
        with pytest.raises(ValueError, match=r"expected"):
            block(torch.zeros(shape))


@pytest.mark.parametrize(("order", "count"), [("random", 2), ("cross", 6)])
def test_several_orders_are_walked_alike_and_averaged(order, count):
    torch.manual_seed(0)
    block = FixedOrderMamba(6, 3, order, num_orders=2, d_state=4).double().eval()
    x = torch.randn(2, 6, 2, 3, 4, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)
    orders = random_order(2, 24) if order == "random" else cross_orders((2, 3, 4))
    assert len(orders) == count
    walked = []
    for one in orders:
        back = torch.empty_like(one)
        back[one] = torch.arange(24)
        walked.append(block.stack(tokens[:, one])[:, back])
    want = block.proj_norm(block.proj(torch.stack(walked).mean(0)))
    torch.testing.assert_close(block(x), want.transpose(1, 2).reshape(x.shape))


def test_random_orders_are_permutations_that_stay():
    orders = random_order(3, 50)
    assert all(torch.equal(one.sort().values, torch.arange(50)) for one in orders)
    assert not torch.equal(orders[0], orders[1])
    random_order.cache_clear()
    assert torch.equal(random_order(3, 50), orders)
    assert torch.equal(random_order(1, 50)[0], orders[0])


@pytest.mark.parametrize(("branches", "sees"), [("one", False), ("two", True), ("sliced", True)])
def test_which_tokens_a_layer_sees(branches, sees):
    torch.manual_seed(0)
    block = FixedOrderMamba(6, branches=branches, d_state=4, depth=1).double().eval()
    x = torch.randn(1, 11, 6, dtype=torch.float64, requires_grad=True)
    block(x)[0, 3, 0].backward()
    assert x.grad is not None
    assert bool(x.grad[0, 9].abs().sum() > 0) == sees
    assert x.grad[0, 1].abs().sum() > 0


def test_attention_has_no_order():
    torch.manual_seed(0)
    block = AttentionBlock(8, num_heads=2).double().eval()
    x, order = torch.randn(2, 12, 8, dtype=torch.float64), torch.randperm(12)
    torch.testing.assert_close(block(x)[:, order], block(x[:, order]))
    image = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(block(image).flatten(2).transpose(1, 2), block(image.flatten(2).transpose(1, 2)))
    assert Attention(8, num_heads=3).build(8, 2, 0) is None


def test_options_that_do_not_exist():
    for options in ({"order": "spiral"}, {"branches": "three"}, {"num_orders": 0}):
        with pytest.raises(ConfigError):
            FixedOrderMamba(6, **options)
    with pytest.raises(ConfigError, match="heads"):
        AttentionBlock(6, num_heads=4)
    with pytest.raises(ValueError, match="rows and columns"):
        FixedOrderMamba(6, order="cross")(torch.zeros(1, 5, 6))


def test_a_mixer_takes_the_options_of_its_block_and_no_others():
    names = list(inspect.signature(FixedOrder).parameters)
    assert names == ["min_channels", *list(inspect.signature(FixedOrderMamba).parameters)[2:]]
    with pytest.raises(TypeError, match="num_heads"):
        FixedOrder(num_heads=2)
    built = Attention(4, num_heads=2, residual=True).build(8, 2, 0)
    assert isinstance(built, AttentionBlock)
    assert built.residual
