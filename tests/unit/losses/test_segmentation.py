import math

import pytest
import torch
from torch import nn

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import IGNORE_INDEX
from bestiary.shared.core.protocols import Objective, Output, StepContext
from bestiary.shared.losses.segmentation import Segmentation, level_weights, nearest_label

CTX = StepContext(stage="train", step=0)


def random_case(samples=3, classes=4, shape=(6, 4, 5), seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, *shape, generator=rng, dtype=torch.float64)
    label = torch.randint(classes, (samples, 1, *shape), generator=rng)
    return logits, label


def test_it_is_an_objective():
    assert isinstance(Segmentation(), Objective)


def test_hand_worked_case():
    # Two voxels, two classes, probability 3/4 for class 0 in both; truth is class 0 and class 1.
    logits = torch.tensor([[[math.log(3.0), math.log(3.0)], [0.0, 0.0]]], dtype=torch.float64)[..., None]
    label = torch.tensor([[[0, 1]]])[..., None]
    loss = Segmentation(smooth=0.0).compare(Output(logits), label)
    ce = (-math.log(0.75) - math.log(0.25)) / 2
    dice = 2 * 0.25 / (0.5 + 1)
    assert float(loss.loss_sum) == pytest.approx(ce + 1 - dice, abs=1e-12)
    assert float(loss.metrics["ce"]) == pytest.approx(ce, abs=1e-12)
    both = Segmentation(smooth=0.0, include_background=True, ce_weight=0).compare(Output(logits), label)
    background = 2 * 0.75 / (1.5 + 1)
    assert float(both.loss_sum) == pytest.approx(1 - (dice + background) / 2, abs=1e-12)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("shape", [(6, 4, 5), (8, 7)])
def test_it_agrees_with_monai(batch_dice, shape):
    from monai.losses import DiceCELoss

    logits, label = random_case(shape=shape)
    ours = Segmentation(batch_dice=batch_dice).compare(Output(logits), label)
    theirs = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=batch_dice)(logits, label)
    assert float(ours.loss_sum) / ours.num_terms == pytest.approx(float(theirs), abs=1e-7)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_ignored_voxels_might_as_well_not_be_there(batch_dice):
    logits, label = random_case(shape=(6, 4, 8))
    logits.requires_grad_()
    masked = label.clone()
    masked[..., 3:5] = IGNORE_INDEX
    rest = [*range(3), *range(5, 8)]
    loss = Segmentation(batch_dice=batch_dice)
    found = loss.compare(Output(logits), masked)
    want = loss.compare(Output(logits[..., rest]), label[..., rest])
    assert float(found.loss_sum.detach()) == pytest.approx(float(want.loss_sum.detach()), abs=1e-12)
    (gradient,) = torch.autograd.grad(found.loss_sum, logits)
    assert (gradient[..., 3:5] == 0).all()
    assert (gradient[..., rest] != 0).all()
    # A sample of which nothing is known has a loss of Dice alone, and no gradient.
    nothing = torch.full_like(label, IGNORE_INDEX)
    (gradient,) = torch.autograd.grad(Segmentation().compare(Output(logits), nothing).loss_sum, logits)
    assert (gradient == 0).all()


class Net(nn.Module):
    """A network with three resolutions."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv3d(1, 6, 3, padding=1)
        self.heads = nn.ModuleList(nn.Conv3d(6, 3, 1) for _ in range(3))

    def forward(self, batch):
        x = self.body(batch["image"])
        out = []
        for head in self.heads:
            out.append(head(x))
            x = nn.functional.avg_pool3d(x, 2)
        return Output(out[0], out[1:])


def test_accumulated_equals_the_big_batch():
    torch.manual_seed(0)
    net = Net().double()
    batch = {
        "ids": list("abcde"),
        "image": torch.randn(5, 1, 8, 8, 8, dtype=torch.float64),
        "label": torch.randint(3, (5, 1, 8, 8, 8)),
    }

    def gradients(objective):
        net.zero_grad()
        total = 0.0
        for piece in objective.micro_batches(batch):
            loss = objective.loss(net, piece, CTX)
            loss.loss_sum.backward()
            total += float(loss.num_terms)
        return [p.grad / total for p in net.parameters()]

    whole = gradients(Segmentation())
    for micro in (1, 2, 5, 8):
        for a, b in zip(whole, gradients(Segmentation(micro_batch=micro)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_the_lowest_head_has_a_gradient_of_zero():
    torch.manual_seed(0)
    net = Net()
    batch = {"ids": ["a"], "image": torch.randn(1, 1, 8, 8, 8), "label": torch.randint(3, (1, 1, 8, 8, 8))}
    Segmentation().loss(net, batch, CTX).loss_sum.backward()
    assert net.heads[0].weight.grad.abs().sum() > 0
    assert net.heads[1].weight.grad.abs().sum() > 0
    assert net.heads[2].weight.grad is not None
    assert net.heads[2].weight.grad.abs().sum() == 0


def test_level_weights_are_nnunets():
    assert level_weights(5) == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15, 0])
    assert level_weights(1) == [1.0]
    assert level_weights(2, [3, 1]) == [0.75, 0.25]
    with pytest.raises(ConfigError):
        level_weights(3, [1, 1])


def test_levels_are_weighted_sums():
    logits, label = random_case(shape=(8, 8, 8))
    half, _ = random_case(shape=(4, 4, 4), seed=1)
    together = Segmentation(deep_supervision_weights=[3, 1]).compare(Output(logits, [half]), label).loss_sum
    alone = Segmentation().compare(Output(logits), label).loss_sum
    low = Segmentation().compare(Output(half), label).loss_sum
    assert float(together) == pytest.approx(float(0.75 * alone + 0.25 * low), rel=1e-12)


def test_labels_are_never_blended():
    label = torch.tensor([0, 0, 5, 5, 0, 3, 3, 3]).reshape(1, 1, 8, 1)
    small = nearest_label(label, (4, 1))
    assert small.shape == (1, 1, 4, 1)
    assert set(small.flatten().tolist()) <= {0, 3, 5}
    assert small.dtype == torch.int64


def test_half_precision_logits_do_not_overflow():
    logits = torch.full((1, 2, 64, 64, 64), 100.0, dtype=torch.float16)
    loss = Segmentation().compare(Output(logits, [logits]), torch.zeros(1, 1, 64, 64, 64, dtype=torch.int64))
    assert loss.loss_sum.dtype == torch.float32
    assert torch.isfinite(loss.loss_sum)


@pytest.mark.parametrize("options", [{"micro_batch": 0}, {"dice_weight": 0, "ce_weight": 0}, {"ce_weight": -1}])
def test_wrong_options_are_said(options):
    with pytest.raises(ConfigError):
        Segmentation(**options)
