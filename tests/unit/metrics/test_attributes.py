"""Accuracy of attribute heads, against cases counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.protocols import EvalProtocol
from bestiary.shared.data.lazy import LazyExamples
from bestiary.shared.language.media_processor import MediaProcessor, Modality
from bestiary.shared.language.tokenizers import load_tokenizer
from bestiary.shared.metrics.attributes import AttributeAccuracy

SIZE = 3


class Ears(nn.Module):
    """A clip is a list of classes, one a token; a token is its class as a one-hot row."""

    out_dim = SIZE

    def __init__(self):
        super().__init__()
        self.windows: list[int] = []

    def forward(self, features, lengths):
        self.windows.append(len(features))
        frames = features.transpose(1, 2)
        return frames[torch.arange(frames.shape[1]) < lengths[:, None]], lengths


class Model(nn.Module):
    """A head says the class of most of a row's tokens, or (``shifted``) the next one."""

    def __init__(self, *shifted: bool):
        super().__init__()
        self.encoder = Ears()
        heads = {}
        for name, by in zip(("instrument", "metre"), shifted, strict=False):
            heads[name] = nn.Linear(SIZE, SIZE, bias=False)
            heads[name].weight.data = torch.eye(SIZE).roll(int(by), 0)
        if heads:
            self.attribute_heads = nn.ModuleDict(heads)

    def processor(self):
        tokenizer = load_tokenizer("byte")
        token = tokenizer.name_media("audio", "<sound>")
        return MediaProcessor(tokenizer, None, {"audio": Modality(features, token)})


def features(raw):
    values = torch.tensor(raw[0])
    count = torch.tensor([len(values)])
    rows = nn.functional.one_hot(values, SIZE).float()
    return {"features": rows.T[None], "lengths": count, "counts": count}, len(values)


def example(*clips, **classes) -> dict:
    content = [{"type": "audio", "value": clip, "rate": 1} for clip in clips]
    return {
        "id": "a",
        "messages": [{"role": "user", "content": [*content, {"type": "text", "value": "?"}]}],
        "meta": {"classes": classes},
    }


EXAMPLES = [
    example([0, 0, 1], instrument=0, metre=1),  # said: 0 and 1; both right
    example([2], instrument=1, metre=0),  # 2 and 0: metre alone
    example([1, 1], [2, 2, 2], instrument=2),  # two clips, most tokens are of 2: right
    example([1], instrument=-1, metre=2),  # 1 and 2: metre right, the instrument not known
    example([0]),  # nothing is known of it
    example(instrument=0, metre=1),  # nothing to hear
    example([1], instrument=0, metre=0),  # 1 and 2: both wrong
]


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_by_hand(size):
    model = Model(False, True)
    metric = AttributeAccuracy(size)
    assert isinstance(metric, EvalProtocol)
    got = metric(model, EXAMPLES)
    assert got == pytest.approx({"accuracy/instrument": 2 / 4, "accuracy/metre": 3 / 4, "accuracy/mean": 5 / 8})
    assert sum(model.encoder.windows) == 7
    assert max(model.encoder.windows) <= size + 1


def test_a_lazy_sequence_is_read_once():
    class Lazy(LazyExamples):
        read: list[int] = []

        def __len__(self):
            return len(EXAMPLES)

        def example(self, at):
            self.read.append(at)
            return EXAMPLES[at]

    assert AttributeAccuracy(2)(Model(False, True), Lazy())["accuracy/mean"] == pytest.approx(5 / 8)
    assert Lazy.read == list(range(len(EXAMPLES)))


def test_an_attribute_that_no_clip_says_is_left_out_of_the_mean():
    got = AttributeAccuracy()(Model(False, True), [example([0], instrument=0), example([0], instrument=2, metre=-1)])
    assert got == {"accuracy/instrument": 0.5, "accuracy/mean": 0.5}


@pytest.mark.parametrize(
    "examples", [[], [example([0])], [example([0], instrument=-1)], [example(instrument=1)], [example([0], mood=1)]]
)
def test_nothing_to_count(examples):
    with pytest.raises(ConfigError, match="no held-out clip says an attribute"):
        AttributeAccuracy()(Model(False, True), examples)


def test_a_model_without_heads_has_nothing_to_score():
    assert AttributeAccuracy()(Model(), EXAMPLES) == {}
