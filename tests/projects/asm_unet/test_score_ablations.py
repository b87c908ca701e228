"""The adaptive scan with parts left out: which term sorts, what the order is, and whether the score is a channel."""

import pytest
import torch

from bestiary.projects.asm_unet.adaptive_scan import AdaptiveScanMamba
from bestiary.shared.core.prepare import set_trainable
from bestiary.shared.nn.mixers import random_order

SMALL = {"num_slices": 2, "d_state": 4, "group_length": 16}


def block(**options) -> AdaptiveScanMamba:
    torch.manual_seed(0)
    return AdaptiveScanMamba(6, **{**SMALL, **options}).double()


def tokens() -> torch.Tensor:
    return torch.randn(2, 20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_terms_add_up_to_the_score():
    full = block()
    individual, group = full.score_parts(tokens())
    assert individual is not None
    assert group is not None
    torch.testing.assert_close(full.scores(tokens()), group[:, None] + individual)


def test_individual_only_sorts_each_image_by_itself():
    only = block(score_terms="individual", num_groups=1)
    assert only.group_scores is None
    _, orders = only(tokens(), return_orders=True)
    assert torch.equal(orders[0], only.score_parts(tokens())[0].argsort(dim=1, stable=True))
    assert not torch.equal(orders[0, 0], orders[0, 1])
    with pytest.raises(ValueError, match="num_groups must be 1"):
        block(score_terms="individual")


def test_group_only_walks_every_image_alike():
    only = block(score_terms="group")
    assert only.score is None
    _, orders = only(tokens(), return_orders=True)
    assert torch.equal(orders[:, 0], orders[:, 1])
    assert not torch.equal(orders[0, 0], orders[1, 0])
    only(tokens())[..., 0].sum().backward()
    assert only.group_scores.grad.abs().sum() > 0


def test_score_channel_only_is_the_full_block_walked_in_raster_order():
    full, only = block(), block(order="raster")
    only.load_state_dict(full.state_dict())
    full.transplant = lambda orders: torch.arange(orders.shape[-1]).expand_as(orders)
    torch.testing.assert_close(only(tokens()), full(tokens()))
    only(tokens())[..., 0].sum().backward()
    assert only.score.head.weight.grad.abs().sum() > 0


def test_random_order_is_the_fixed_one():
    _, orders = block(order="random")(tokens(), return_orders=True)
    assert torch.equal(orders[:, 1], random_order(3, 20))


def test_order_only_leaves_the_scores_without_a_gradient():
    only = block(score_channel=False)
    full = block()
    _, orders = only(tokens(), return_orders=True)
    assert torch.equal(orders, full(tokens(), return_orders=True)[1])
    out = only(tokens())
    out.square().sum().backward()
    # Buffers under the parameters' names: whoever sets what is trained cannot thaw them, and nobody waits for them.
    assert only.state_dict().keys() == full.state_dict().keys()
    assert {name for name, _ in only.named_buffers()} == {
        name for name in full.state_dict() if name.startswith(("score.", "group_scores"))
    }
    set_trainable(only, ["*"])
    assert all(p.grad is not None for p in only.parameters())
    # The channel is zero, so the weights that read it do nothing: only the order tells of the score.
    with torch.no_grad():
        only.stacks[0].layers[0].linear.weight[:, -1] += 1.0
    torch.testing.assert_close(only(tokens()), out)


@pytest.mark.parametrize("options", [{}, {"score_terms": "group"}, {"order": "random"}, {"score_channel": False}])
def test_fused_and_gathered_agree(options):
    fused, gathered = block(**options), block(fused=False, **options)
    torch.testing.assert_close(fused(tokens()), gathered(tokens()))


def test_an_option_that_does_not_exist():
    for options in ({"score_terms": "none"}, {"order": "spiral"}):
        with pytest.raises(ValueError, match="is one of"):
            block(**options)
