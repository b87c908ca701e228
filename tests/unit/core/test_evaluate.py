"""evaluate(): it scores, and leaves no trace."""

import pytest
import torch
from torch import nn

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.evaluate import evaluate, evaluate_all


class Source:
    def __init__(self, val=3, test=2):
        self.sizes = {"val": val, "test": test}

    def held_out(self, split, part=None):
        return [f"{part}/{split}/{i}" for i in range(self.sizes[split] if part != "empty" else 0)]


class Count:
    name, version = "count", "1"

    def __init__(self, key="count"):
        self.key, self.seen = key, []

    def __call__(self, model, examples):
        assert not model.training
        assert not torch.is_grad_enabled()
        torch.rand(100)
        self.seen += examples
        return {self.key: float(len(examples))}


class Fails(Count):
    def __call__(self, model, examples):
        torch.rand(3)
        raise RuntimeError("inside")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("protocol", [Count(), Fails()])
def test_mode_and_noise_are_restored(training, protocol):
    model = nn.Sequential(nn.Dropout(0.5)).train(training)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    try:
        evaluate(model, Source(), protocol)
    except RuntimeError:
        assert isinstance(protocol, Fails)
    assert model.training is training
    assert model[0].training is training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.rand(4), expected)


def test_split_part_and_limit():
    protocol = Count()
    assert evaluate(nn.Identity(), Source(), protocol, "val", "chat", limit=2) == {"count": 2.0}
    assert protocol.seen == ["chat/val/0", "chat/val/1"]
    with pytest.raises(BadDataError, match="the test part of this data set is empty"):
        evaluate(nn.Identity(), Source(test=0), Count())


def test_all_are_prefixed_by_the_split():
    evaluations = {"a": (Count("x"), "text"), "b": (Count("y"), None), "c": (Count("z"), "empty")}
    assert evaluate_all(nn.Identity(), Source(), evaluations, "val") == {"val/x": 3.0, "val/y": 3.0}
    with pytest.raises(ConfigError, match="'b' reports 'x' a second time"):
        evaluate_all(nn.Identity(), Source(), {"a": (Count("x"), None), "b": (Count("x"), None)}, "val")
