"""Router balance and multi-token losses inside the objective, by hand, and over micro-batches."""

import pytest
import torch
from torch.nn import functional as F

from bestiary.shared.core.protocols import Output, StepContext
from bestiary.shared.losses.causal_lm import CausalLM, next_token_loss

CONTEXT = StepContext("s", 0)


class Fixed(torch.nn.Module):
    """Logits from a table by the token itself; depth d adds d."""

    def __init__(self, balance=None, depths=0):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(7, 7))
        self.balance, self.depths = balance, depths

    def forward(self, batch):
        logits = self.table[batch["input_ids"]]
        # of a micro-batch: here its mean token, so that it differs between micro-batches
        losses = {} if self.balance is None else {"balance": self.balance * batch["input_ids"].double().mean()}
        return Output(logits, [logits * (d + 2) for d in range(self.depths)], aux_losses=losses)


def batch(seq_idx=None):
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 0, 0, 0]])
    labels = ids.clone()
    labels[1, 3:] = -100
    return {"ids": ["a", "b"], "input_ids": ids, "labels": labels, "seq_idx": seq_idx, "media": {}}


def test_the_token_further_ahead_by_hand():
    data = batch()
    logits = Fixed().table[data["input_ids"]]
    total, count = next_token_loss(logits, data["labels"], 3)
    expected = sum(F.cross_entropy(logits[0, t], data["labels"][0, t + 3]) for t in range(3))
    assert count == 3
    torch.testing.assert_close(total, expected)


def test_packed_rows_do_not_look_into_each_other():
    # The 0 comes again: another sequence. A token that begins one may be foretold from the one before it.
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 0], [0] * 6], dtype=torch.int32)
    data = batch(seq_idx)
    logits = Fixed().table[data["input_ids"]]
    total, count = next_token_loss(logits, data["labels"], 2, seq_idx)
    pairs = [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert count == 4
    torch.testing.assert_close(total, sum(F.cross_entropy(logits[r, t], data["labels"][r, t + 2]) for r, t in pairs))


def test_rows_too_short_to_look_ahead():
    logits, labels = torch.randn(1, 2, 7), torch.tensor([[1, 2]])
    for ahead in (2, 3, 5):
        total, count = next_token_loss(logits, labels, ahead, torch.zeros(1, 2, dtype=torch.int32))
        assert (float(total), int(count)) == (0.0, 0)


def test_weights_and_metrics():
    data, model = batch(), Fixed(balance=0.5, depths=2)
    plain = CausalLM().loss(model, data, CONTEXT)
    assert (plain.num_terms, plain.metrics.keys()) == (7, {"cross_entropy"})
    loss = CausalLM(balance_weight=0.1, mtp_weight=0.3).loss(model, data, CONTEXT)
    ahead = [next_token_loss(x, data["labels"], d) for d, x in enumerate(model(data).aux_logits, 2)]
    means = [float(total.detach() / count) for total, count in ahead]
    balance = 0.5 * data["input_ids"].double().mean().item()
    expected = plain.loss_sum.item() + 7 * (0.1 * balance + 0.3 * sum(means) / 2)
    assert loss.loss_sum.item() == pytest.approx(expected, rel=1e-5)
    assert loss.num_terms == 7
    got = {name: float(value) / 7 for name, value in loss.metrics.items()}
    assert got == pytest.approx(
        {"cross_entropy": plain.loss_sum.item() / 7, "balance": balance, "mtp_1": means[0], "mtp_2": means[1]}, rel=1e-5
    )
    nothing = CausalLM(balance_weight=0.1, mtp_weight=0.3).loss(Fixed(), data, CONTEXT)
    torch.testing.assert_close(nothing.loss_sum, plain.loss_sum)
    assert nothing.metrics == {}


def test_cross_entropy_does_not_depend_on_micro_batches_and_the_rest_is_a_weighted_mean():
    data, model = batch(), Fixed(balance=1.0)
    objective = CausalLM(micro_batch=1, balance_weight=1.0)
    parts = [objective.loss(model, part, CONTEXT) for part in objective.micro_batches(data)]
    whole = CausalLM().loss(model, data, CONTEXT)
    terms = [float(p.num_terms) for p in parts]
    assert terms == [5, 2]
    balance = (5 * data["input_ids"][0].double().mean() + 2 * data["input_ids"][1].double().mean()).item()
    assert sum(p.loss_sum.item() for p in parts) == pytest.approx(whole.loss_sum.item() + balance, rel=1e-5)
