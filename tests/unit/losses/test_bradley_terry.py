"""Bradley-Terry: its value and gradient by hand, and its pairs through micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.protocols import Objective, Output, StepContext
from bestiary.shared.losses.bradley_terry import BradleyTerry

CONTEXT = StepContext("reward_model", 0)


class Rewards(nn.Module):
    """Gives row i of the table that a batch's first tokens name."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, batch):
        return Output(self.values[batch["input_ids"][:, 0]][:, None])


def batch_of(rows):
    return {
        "ids": [str(i) for i in range(rows)],
        "input_ids": torch.arange(rows)[:, None],
        "seq_idx": None,
        "media": {},
    }


def test_by_hand():
    """Margins 2 and −1: −log σ(2) − log σ(−1); the gradient of a margin d is −σ(−d)."""
    model, objective = Rewards([3.0, 1.0, 0.0, 1.0]), BradleyTerry()
    assert isinstance(objective, Objective)
    loss = objective.loss(model, batch_of(4), CONTEXT)
    sigmoid = [1 / (1 + math.exp(-d)) for d in (2, -1)]
    assert loss.loss_sum.item() == pytest.approx(-sum(math.log(s) for s in sigmoid), rel=1e-12)
    assert float(loss.num_terms) == 2
    assert {name: float(value) for name, value in loss.metrics.items()} == {"pair_accuracy": 1, "margin": 1}
    loss.loss_sum.backward()
    first, second = sigmoid[0] - 1, sigmoid[1] - 1
    assert model.values.grad is not None
    assert model.values.grad.tolist() == pytest.approx([first, -first, second, -second], rel=1e-12)


def test_a_huge_margin_is_finite():
    loss = BradleyTerry().loss(Rewards([-1e4, 1e4]), batch_of(2), CONTEXT)
    assert loss.loss_sum.item() == 2e4


@pytest.mark.parametrize("size", [1, 2, 3, 5, None])
def test_micro_batches_keep_pairs_together_and_add_up(size):
    values = torch.randn(10, generator=torch.Generator().manual_seed(0)).tolist()
    whole, cut = Rewards(values), Rewards(values)
    BradleyTerry().loss(whole, batch_of(10), CONTEXT).loss_sum.backward()
    parts = BradleyTerry(size).micro_batches(batch_of(10))
    assert [name for part in parts for name in part["ids"]] == [str(i) for i in range(10)]
    assert all(len(part["ids"]) % 2 == 0 for part in parts)
    for part in parts:
        BradleyTerry(size).loss(cut, part, CONTEXT).loss_sum.backward()
    torch.testing.assert_close(cut.values.grad, whole.values.grad, rtol=1e-12, atol=0)


def test_a_model_of_another_kind_is_refused():
    class Logits(nn.Module):
        def forward(self, batch):
            return Output(torch.zeros(4, 3, 7))

    with pytest.raises(ConfigError, match="use model=reward_model"):
        BradleyTerry().loss(Logits(), batch_of(4), CONTEXT)
    with pytest.raises(ConfigError, match="row of pairs"):
        BradleyTerry().loss(Rewards([0.0, 1.0, 2.0]), batch_of(3), CONTEXT)
