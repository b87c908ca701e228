"""Attribute heads: the loss is torch's cross-entropy on mean tokens by hand, and a mask of time covers what it may."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.protocols import Objective, StepContext
from bestiary.shared.losses.attributes import Attributes, add_attribute_heads, attribute_logits, covered

CONTEXT = StepContext("encoder", 0)
CLASSES = {"instrument": 3, "metre": 2}
WIDTH = 4


class Ears(nn.Module):
    """Its tokens are a linear map of the frames: as many as there are."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH)
        self.out_dim = WIDTH

    def token_counts(self, frames):
        return frames

    def forward(self, features, lengths):
        frames = features.transpose(1, 2)
        return self.map(frames[torch.arange(frames.shape[1]) < lengths[:, None]]), lengths


def model_with_heads(classes=CLASSES) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.encoder = Ears()
    return add_attribute_heads(model, classes).double()


def batch_of(lengths, owners, targets, rows) -> dict:
    """Windows of so many frames, zeros behind them, that belong to those rows."""
    generator = torch.Generator().manual_seed(1)
    features = torch.zeros(len(lengths), WIDTH, max(lengths), dtype=torch.float64)
    for at, length in enumerate(lengths):
        features[at, :, :length] = torch.randn(WIDTH, length, generator=generator, dtype=torch.float64)
    counts = torch.tensor(lengths)
    media = {"features": features, "lengths": counts, "counts": counts, "owner": torch.tensor(owners)}
    values = {f"class/{name}": torch.tensor(wanted) for name, wanted in targets.items()}
    ids = [str(row) for row in range(rows)]
    return {"ids": ids, "input_ids": torch.zeros(rows, 1).long(), "media": {"audio": media}, **values}


def by_hand(model, batch) -> torch.Tensor:
    """Row by row: all tokens of its windows, their mean, each head whose class is known."""
    total = torch.zeros((), dtype=torch.float64)
    media = batch["media"]["audio"]
    for row in range(len(batch["ids"])):
        frames = [media["features"][w, :, : media["lengths"][w]].T for w in (media["owner"] == row).nonzero()[:, 0]]
        mean = model.encoder.map(torch.cat(frames)).mean(0) if frames else torch.zeros(WIDTH, dtype=torch.float64)
        for name in CLASSES:
            if (target := batch[f"class/{name}"][row]) >= 0:
                total = total + F.cross_entropy(model.attribute_heads[name](mean), target)
    return total


WHOLE = {
    "lengths": [5, 2, 7, 1, 3],
    # Row 0 has two windows or clips, row 2 none, row 3 two again.
    "owners": [0, 0, 1, 3, 3],
    "targets": {"instrument": [2, 0, -1, 1], "metre": [1, -1, -1, 0]},
    "rows": 4,
}


def test_the_loss_and_its_gradient_are_those_by_hand():
    model, batch = model_with_heads(), batch_of(**WHOLE)
    objective = Attributes(model, CLASSES)
    assert isinstance(objective, Objective)
    loss = objective.loss(model, batch, CONTEXT)
    wanted = by_hand(model, batch)
    assert loss.loss_sum.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert loss.num_terms == 4
    ours = torch.autograd.grad(loss.loss_sum, list(model.parameters()))
    theirs = torch.autograd.grad(wanted, list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_accuracy_counts_right_heads():
    model = model_with_heads()
    batch = batch_of(**WHOLE)
    logits = attribute_logits(model, batch["media"]["audio"], 4)
    for name in CLASSES:
        batch[f"class/{name}"] = logits[name].argmax(-1)
        batch[f"class/{name}"][1] = (batch[f"class/{name}"][1] + 1) % CLASSES[name]
    metrics = Attributes(model, CLASSES).loss(model, batch, CONTEXT).metrics
    assert {name: float(value) for name, value in metrics.items()} == {"accuracy/instrument": 3, "accuracy/metre": 3}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, None])
def test_micro_batches_add_up(size):
    model, batch = model_with_heads(), batch_of(**WHOLE)
    objective = Attributes(model, CLASSES, micro_batch=size)
    whole = Attributes(model, CLASSES).loss(model, batch, CONTEXT)
    parts = objective.micro_batches(batch)
    assert [len(part["ids"]) for part in parts][:-1] == [size] * (len(parts) - 1)
    losses = [objective.loss(model, part, CONTEXT) for part in parts]
    assert sum(loss.loss_sum.item() for loss in losses) == pytest.approx(whole.loss_sum.item(), rel=1e-6)
    assert sum(float(loss.num_terms) for loss in losses) == whole.num_terms
    for name, value in whole.metrics.items():
        assert sum(int(loss.metrics[name]) for loss in losses) == int(value)


def test_padding_and_neighbours_change_no_logits():
    """A row's logits are those of the row alone."""
    model, batch = model_with_heads(), batch_of(**WHOLE)
    together = attribute_logits(model, batch["media"]["audio"], 4)
    media = batch["media"]["audio"]
    alone = {key: value[3:] for key, value in media.items()}
    alone |= {"owner": torch.zeros(2).long(), "features": media["features"][3:, :, :3]}
    for name, values in attribute_logits(model, alone, 1).items():
        torch.testing.assert_close(values[0], together[name][3])


def test_a_row_without_a_clip_teaches_the_encoder_nothing():
    model = model_with_heads()
    batch = batch_of([3], [0], {"instrument": [-1, 2], "metre": [-1, 1]}, 2)
    Attributes(model, CLASSES).loss(model, batch, CONTEXT).loss_sum.backward()
    assert not model.encoder.map.weight.grad.any()


def test_heads_and_classes_that_are_missing():
    bare = nn.Module()
    bare.encoder = Ears()
    with pytest.raises(ConfigError, match="prepare the stage with add_attribute_heads"):
        Attributes(bare, CLASSES)
    with pytest.raises(ConfigError, match="need a model with an encoder of audio"):
        add_attribute_heads(nn.Linear(1, 1), CLASSES)
    model = model_with_heads()
    for classes in ({}, {"metre": 1}):
        with pytest.raises(ConfigError, match="two classes or more"):
            Attributes(model, classes)
    batch = batch_of(**WHOLE)
    del batch["class/metre"]
    with pytest.raises(BadDataError, match="does not say the attribute 'metre'"):
        Attributes(model, CLASSES).loss(model, batch, CONTEXT)
    with pytest.raises(ConfigError, match="micro_batch must be 1 or more"):
        Attributes(model, CLASSES, micro_batch=0).micro_batches(batch)


def test_heads_once_put_on_stay():
    model = model_with_heads()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    add_attribute_heads(model, CLASSES)
    assert {n: tuple(head.weight.shape) for n, head in model.attribute_heads.items()} == {
        "instrument": (3, WIDTH),
        "metre": (2, WIDTH),
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_mask_covers_one_run_of_at_most_its_frames():
    torch.manual_seed(3)
    features = torch.randn(200, WIDTH, 40)
    lengths = torch.randint(12, 41, (200,))
    got = covered(features, lengths, 8)
    changed = (got != features).any(1)
    assert changed.any(1).sum() > 150
    widths = changed.sum(1)
    assert set(widths.tolist()) == set(range(9))
    for row in range(200):
        places = changed[row].nonzero()[:, 0]
        if len(places):
            assert places.tolist() == list(range(int(places[0]), int(places[-1]) + 1))
            assert places[-1] < lengths[row]
            # all bins of a covered frame are one value, within the range of the window
            assert got[row][:, places].unique().numel() == 1
    assert torch.equal(got[~changed[:, None].expand_as(got)], features[~changed[:, None].expand_as(got)])


def test_no_mask_is_no_change_and_the_mask_is_part_of_the_loss():
    model, batch = model_with_heads(), batch_of([9, 9], [0, 1], {"instrument": [0, 1], "metre": [0, 1]}, 2)
    plain = Attributes(model, CLASSES).loss(model, batch, CONTEXT).loss_sum
    before = batch["media"]["audio"]["features"].clone()
    torch.manual_seed(0)
    masked = {Attributes(model, CLASSES, time_mask=6).loss(model, batch, CONTEXT).loss_sum.item() for _ in range(8)}
    assert len(masked | {plain.item()}) > 4
    assert torch.equal(batch["media"]["audio"]["features"], before)
    assert torch.equal(covered(before, torch.tensor([9, 9]), 0), before)


def test_a_window_shorter_than_the_mask_is_covered_to_its_end_alone():
    torch.manual_seed(3)
    features = torch.randn(100, WIDTH, 40)
    changed = (covered(features, torch.full((100,), 3), 20) != features).any(1)
    assert changed[:, :3].any()
    assert not changed[:, 3:].any()
