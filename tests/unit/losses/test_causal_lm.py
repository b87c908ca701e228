"""Next-token cross-entropy by hand."""

import math

import pytest
import torch

from bestiary.shared.core.protocols import Objective, Output, StepContext
from bestiary.shared.losses.causal_lm import CausalLM

CTX = StepContext("train", 0)


class Given(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, batch):
        return Output(self.logits)


def batch(labels, ids=None):
    rows, width = len(labels), len(labels[0])
    return {
        "ids": [str(r) for r in range(rows)],
        "input_ids": torch.zeros(rows, width, dtype=torch.long),
        "attention_mask": torch.ones(rows, width, dtype=torch.long),
        "position_ids": torch.arange(width).expand(rows, -1),
        "labels": torch.tensor(labels),
        "seq_idx": None,
        "media": {},
    }


def test_by_hand():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, dtype=torch.float64)
    labels = [[1, 2, -100, 3], [-100, -100, 4, -100]]
    loss = CausalLM().loss(Given(logits), batch(labels), CTX)
    expected, terms = 0.0, 0
    for r, row in enumerate(labels):
        for t in range(3):
            target = row[t + 1]  # the token after position t
            if target != -100:
                expected += math.log(sum(math.exp(v) for v in logits[r, t].tolist())) - logits[r, t, target].item()
                terms += 1
    assert loss.loss_sum.item() == pytest.approx(expected, rel=1e-12)
    assert int(loss.num_terms) == terms == 3


def test_a_uniform_model_pays_the_logarithm_of_the_vocabulary():
    loss = CausalLM().loss(Given(torch.zeros(1, 6, 8)), batch([[0, 1, 2, 3, 4, 5]]), CTX)
    assert loss.loss_sum.item() == pytest.approx(5 * math.log(8))


def test_the_first_token_and_what_follows_the_last_are_not_predicted():
    model = Given(torch.randn(1, 4, 5))
    CausalLM().loss(model, batch([[3, 1, 2, 0]]), CTX).loss_sum.backward()
    assert (model.logits.grad[0, 3] == 0).all()
    assert (model.logits.grad[0, :3] != 0).all()
    only_first = CausalLM().loss(model, batch([[3, -100, -100, -100]]), CTX)
    assert (only_first.loss_sum.item(), int(only_first.num_terms)) == (0.0, 0)


def test_half_precision_is_summed_in_single():
    logits = torch.zeros(1, 2049, 4, dtype=torch.bfloat16)
    loss = CausalLM().loss(Given(logits), batch([[0] * 2049]), CTX)
    assert loss.loss_sum.dtype == torch.float32
    assert loss.loss_sum.item() == pytest.approx(2048 * math.log(4), rel=1e-5)


@pytest.mark.parametrize(("size", "sizes"), [(None, [5]), (1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_micro_batches_are_all_rows_once(size, sizes):
    whole = batch([[i, i] for i in range(5)])
    objective = CausalLM(size)
    assert isinstance(objective, Objective)
    parts = objective.micro_batches(whole)
    assert [len(p["ids"]) for p in parts] == sizes
    assert [name for p in parts for name in p["ids"]] == whole["ids"]
    assert torch.equal(torch.cat([p["labels"] for p in parts]), whole["labels"])
