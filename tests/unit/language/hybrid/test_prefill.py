"""Prompts of different lengths read in groups: the same as in one go, and with less padding."""

import itertools
import random

import pytest
import torch

from bestiary.shared.core.examples import text_message
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.language import prefill as module
from bestiary.shared.language.generate import generate
from bestiary.shared.language.hf_causal_lm import HFCausalLM
from bestiary.shared.language.prefill import like_lengths, prefill, select_rows
from bestiary.shared.language.processor import TextProcessor

CLOSE = {"rtol": 1e-5, "atol": 2e-5}
LENGTHS = [5, 40, 38, 6, 17, 40]


def cost(groups, lengths, each):
    return sum(each + len(rows) * max(lengths[row] for row in rows) for rows in groups)


def test_groups_by_hand():
    assert like_lengths([10], 5) == [[0]]
    assert like_lengths([10, 10, 10], 0) == [[0, 1, 2]]
    # Apart they read 10 + 100 tokens and one pass more; together 200.
    assert like_lengths([10, 100], 50) == [[1], [0]]
    assert like_lengths([10, 100], 90) in ([[1], [0]], [[0, 1]])
    assert like_lengths([10, 100], 91) == [[0, 1]]
    assert like_lengths([3, 100, 4, 99], 20) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_groups_cost_less(seed):
    """Against all ways to cut the rows, sorted by length, into runs."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 7))]
    each = rng.choice([0, 3, 20, 70])
    groups = like_lengths(lengths, each)
    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    least = min(
        cost([order[a:b] for a, b in itertools.pairwise((0, *cuts, len(order)))], lengths, each)
        for number in range(len(order))
        for cuts in itertools.combinations(range(1, len(order)), number)
    )
    assert cost(groups, lengths, each) == least


def batch_of(lm):
    generator = torch.Generator().manual_seed(4)
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, max(LENGTHS) - length :] = 1
    ids = torch.randint(0, 256, mask.shape, generator=generator)
    return lm.embed(ids), mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.fixture(params=["transformers", "hybrid", "hybrid with experts"])
def lm(request, make_lm, small_sizes):
    if request.param == "transformers":
        torch.manual_seed(0)
        return HFCausalLM("qwen2", small_sizes).eval()
    return make_lm("M-M*-" if request.param == "hybrid" else "ME*E")


def counted(lm, monkeypatch):
    """Rows and tokens of the passes."""
    passes = []
    forward = lm.forward
    monkeypatch.setattr(lm, "forward", lambda x, *a, **k: passes.append(tuple(x.shape[:2])) or forward(x, *a, **k))
    return passes


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 7])
def test_in_groups_as_in_one_go(lm, chunk, monkeypatch):
    """Logits, and those of the three tokens after: the joined cache is that of one go."""
    embeds, mask, position = batch_of(lm)
    after = lm.embed(torch.randint(0, 256, (3, len(LENGTHS), 1), generator=torch.Generator().manual_seed(5)))
    outcomes, read = [], []
    for price in (10_000, 0):
        monkeypatch.setitem(module.PASS_TOKENS, "cpu", price)
        with monkeypatch.context() as patch:
            passes = counted(lm, patch)
            logits, cache = prefill(lm, embeds, mask, position, chunk)
            read.append(sum(rows * tokens for rows, tokens in passes))
        assert cache.length == mask.shape[1]
        found, seen, at = [logits], mask, position[:, -1:]
        for token in after:
            seen, at = torch.cat([seen, torch.ones_like(at)], 1), at + 1
            logits, _, cache = lm(token, seen, at, None, cache, 1)
            found.append(logits)
        outcomes.append(torch.cat(found, 1))
    torch.testing.assert_close(outcomes[1], outcomes[0], **CLOSE)
    assert read[0] == 6 * 40
    assert read[1] == sum(LENGTHS)


@torch.no_grad()
def test_each_prompt_is_completed_as_alone(lm, monkeypatch):
    monkeypatch.setitem(module.PASS_TOKENS, "cpu", 1)
    texts = ["a", "What is heard in the second half of this?", "four words are here", "b"]
    made = [{"id": f"p{at}", "messages": [text_message("user", text)]} for at, text in enumerate(texts)]
    processor, sampling = TextProcessor(lm.tokenizer), Sampling(6, temperature=1.0, seed=3)
    together = generate(lm, processor(made, "prompt"), 2, sampling)
    for at, example in enumerate(made):
        alone = generate(lm, processor([example], "prompt"), 2, sampling)
        width = alone.completion_ids.shape[1]
        assert together.completion_ids[2 * at : 2 * at + 2, :width].tolist() == alone.completion_ids.tolist()


@torch.no_grad()
def test_a_cache_with_a_window_is_read_in_one_go(small_sizes, monkeypatch):
    monkeypatch.setitem(module.PASS_TOKENS, "cpu", 1)
    torch.manual_seed(0)
    lm = HFCausalLM("mistral", {**small_sizes, "sliding_window": 8}).eval()
    assert not lm.new_cache(1).joinable
    passes = counted(lm, monkeypatch)
    prefill(lm, *batch_of(lm))
    assert passes == [(6, 40)]


def test_a_cache_of_plain_tensors():
    """What a small backbone carries without a class of its own: nested lists of tensors, a row each."""
    cache = [torch.arange(6).reshape(3, 2), None, (torch.arange(3), {"a": torch.arange(3)}), 7]
    out = select_rows(cache, torch.tensor([2, 0, 2]))
    assert out[0].tolist() == [[4, 5], [0, 1], [4, 5]]
    assert out[1] is None
    assert out[2][0].tolist() == out[2][1]["a"].tolist() == [2, 0, 2]
    assert out[3] == 7
