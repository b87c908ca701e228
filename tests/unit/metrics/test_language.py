"""Protocols for language models, on models whose score is known."""

import math

import pytest
import torch

from bestiary.shared.core.examples import text_message
from bestiary.shared.core.protocols import EvalProtocol, Output, Rollout
from bestiary.shared.language.byte_tokenizer import ByteTokenizer
from bestiary.shared.language.processor import TextProcessor
from bestiary.shared.metrics.language import BitsPerByte, ExactMatch


class Known(torch.nn.Module):
    """Says each token is the one before plus one, with probability p; every other token shares the rest."""

    def __init__(self, p=None):
        super().__init__()
        self.p, self.backbone = p, type("Backbone", (), {"tokenizer": ByteTokenizer()})()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shapes = []

    def forward(self, batch):
        ids = batch["input_ids"]
        self.shapes.append(tuple(ids.shape))
        if self.p is None:
            return Output(torch.zeros(*ids.shape, 262))
        logits = torch.full((*ids.shape, 262), math.log((1 - self.p) / 261))
        return Output(logits.scatter(2, (ids + 1).clamp(max=261)[..., None], math.log(self.p)))


FIRST = math.log2(261 / 0.75)
"""Bits of a token that Known(0.25) does not expect."""


def texts(*values):
    return [{"id": str(i), "text": t} for i, t in enumerate(values)]


def test_bits_by_hand():
    # "abc": b and c have probability 1/4 each, that is 2 bits; a follows <eos> and shares 3/4 with 260 others.
    protocol = BitsPerByte(window=8)
    assert isinstance(protocol, EvalProtocol)
    score = protocol(Known(0.25), texts("abc"))
    assert score == {"bits_per_byte": pytest.approx((4 + FIRST) / 3, rel=1e-6), "bytes": 3.0}
    labelled = BitsPerByte(window=8, label="code")(Known(0.25), texts("abc"))
    assert labelled == {"bits_per_byte/code": score["bits_per_byte"], "bytes/code": 3.0}


def test_a_uniform_model():
    for window, length in ((8, 64), (64, 64), (64, 6400)):
        score = BitsPerByte(window)(Known(), texts("x" * length))
        assert score["bits_per_byte"] == pytest.approx(math.log2(262), rel=1e-6)


def test_windows_batches_and_padding_do_not_mix():
    values = ["abcdefgh", "a", "uvw", "", "mnopq"]
    expected = sum(2.0 * (len(t) - 1) + FIRST for t in values if t) / sum(map(len, values))
    for batch_size in (1, 2, 16):
        score = BitsPerByte(window=8, batch_size=batch_size)(Known(0.25), texts(*values))
        assert score["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    model = Known(0.25)
    BitsPerByte(window=3, batch_size=2)(model, texts("abcdefgh"))
    assert model.shapes == [(2, 4), (1, 3)]


def test_bytes_are_bytes():
    score = BitsPerByte()(Known(), texts("ü"))
    assert score == {"bits_per_byte": pytest.approx(math.log2(262), rel=1e-6), "bytes": 2.0}


class Answers(torch.nn.Module):
    def __init__(self, *answers):
        super().__init__()
        self.answers, self.asked = list(answers), []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def processor(self):
        return TextProcessor(ByteTokenizer())

    def generate(self, batch, n, sampling):
        assert n == 1
        assert sampling.temperature == 0
        assert sampling.max_new_tokens == 9
        self.asked.append(batch)
        texts = [self.answers[int(i)] for i in batch["ids"]]
        empty = torch.zeros(len(texts), 1)
        return Rollout(empty.long(), empty.bool(), empty, texts, ["stop"] * len(texts))


def test_exact_match_by_hand():
    references = ["yes", "no", "two words", "x", "ü"]
    examples = [{"id": str(i), "messages": [text_message("user", "?")], "answer": a} for i, a in enumerate(references)]
    model = Answers(" yes\n", "No", "two  words", "x", "ü")
    score = ExactMatch(max_new_tokens=9, batch_size=2)(model, examples)
    assert score == {"exact_match": pytest.approx(3 / 5), "prompts": 5.0}
    assert [len(b["ids"]) for b in model.asked] == [2, 2, 1]
    # The answer is not in the prompt.
    assert all(b["input_ids"][0, -1] == 260 for b in model.asked)
