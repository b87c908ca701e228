"""Multi-token prediction: what a head may see, its loss by hand, and drafts that change no token."""

import copy

import pytest
import torch
from torch.nn import functional as F

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.language.hybrid.speculative import speculative_greedy

MTP = {"num_nextn_predict_layers": 1, "mtp_depths": 2}


def ids_of(rows, length, seed=1):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def training(lm):
    """In training, with its heads."""
    lm.look_ahead(True)
    return lm.train()


def test_a_head_sees_the_token_it_is_given_and_none_after(make_lm):
    lm = training(make_lm("M*-", **MTP))
    ids = ids_of(1, 12)
    lm(lm.embed(ids))
    before = [x.detach() for x in lm.aux_logits]
    assert [x.shape for x in before] == [(1, 12, 262)] * 2
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 9) % 256
    lm(lm.embed(changed))
    for depth, (one, other) in enumerate(zip(before, lm.aux_logits, strict=True), 1):
        first = 7 - depth  # position t of depth d has read up to token t + d
        torch.testing.assert_close(one[:, :first], other[:, :first], rtol=1e-5, atol=1e-5)
        assert (one[:, first] - other[:, first]).abs().max() > 1e-2


def test_depths_share_the_module(make_lm):
    lm = training(make_lm("M-", **MTP))
    lm(lm.embed(ids_of(1, 9)))
    one = sum(p.numel() for p in lm.mtp.parameters())
    assert one == sum(p.numel() for p in make_lm("M-", num_nextn_predict_layers=1).mtp.parameters())
    F.cross_entropy(lm.aux_logits[1][0], ids_of(1, 9)[0]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in lm.mtp.named_parameters() if "bias" not in n)


def test_only_training_that_wants_them_runs_the_heads(make_lm):
    lm = training(make_lm("M-", **MTP))
    lm.eval()(lm.embed(ids_of(1, 9)))
    assert lm.aux_logits == []
    lm.train().look_ahead(False)
    lm(lm.embed(ids_of(1, 9)))
    assert lm.aux_logits == []
    assert not any(p.requires_grad for p in lm.mtp.parameters())  # so that DDP waits for no gradient of theirs


def test_an_objective_without_their_loss_leaves_them_out(make_lm):
    from bestiary.shared.core.examples import text_message
    from bestiary.shared.core.protocols import StepContext
    from bestiary.shared.language.causal_lm import CausalLM as Model
    from bestiary.shared.losses.causal_lm import CausalLM

    model = Model(make_lm("M-", **MTP)).train()
    examples = [{"id": "a", "messages": [text_message("user", "hi")], "answer": "you there"}]
    batch = model.processor()(examples, "train")
    for weight in (0.3, None):
        objective = CausalLM(mtp_weight=weight, model=model)
        loss = objective.loss(model, batch, StepContext("s", 0))
        assert ("mtp_2" in loss.metrics) == (weight is not None)
        copy.deepcopy(model)  # nothing of the step's graph is kept


def test_rows_shorter_than_the_depths(make_lm):
    lm = training(make_lm("M-", num_nextn_predict_layers=1, mtp_depths=4))
    lm(lm.embed(ids_of(1, 2)))
    assert [x.shape[1] for x in lm.aux_logits] == [2] * 4


def test_packed_rows_equal_separate_ones(make_lm):
    lm = training(make_lm("M*-", **MTP))
    parts = [ids_of(1, n, n) for n in (6, 9)]
    separate = []
    for part in parts:
        lm(lm.embed(part))
        separate.append([x.detach() for x in lm.aux_logits])
    lm(lm.embed(torch.cat(parts, 1)), seq_idx=torch.tensor([[0] * 6 + [1] * 9], dtype=torch.int32))
    for depth in (0, 1):
        first, second = lm.aux_logits[depth].split([6, 9], 1)
        # The last positions of the first part look into the second: they have no loss.
        torch.testing.assert_close(first[:, : 5 - depth], separate[0][depth][:, : 5 - depth], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(second, separate[1][depth], rtol=1e-5, atol=2e-5)


def greedy(lm, run_lm, ids, length):
    cache = lm.new_cache(1)
    logits, out = run_lm(lm, [ids], None, cache), []
    for _ in range(length):
        out.append(int(logits[0, -1].argmax()))
        logits = run_lm(lm, [out[-1:]], None, cache)
    return out


@pytest.fixture(scope="module")
def learned(make_lm):
    """A model and head that have learned to count round a circle of 40 bytes, with gaps: partly predictable."""
    lm = training(make_lm("M-*-", **MTP, seed=3, initializer_range=0.1))
    optimizer = torch.optim.Adam(lm.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        start = torch.randint(0, 40, (16, 1), generator=generator)
        step = torch.randint(1, 4, (16, 1), generator=generator)
        ids = (start + step * torch.arange(24)) % 40
        logits = lm(lm.embed(ids))[0]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for depth, ahead in enumerate(lm.aux_logits, 2):
            loss = loss + 0.5 * F.cross_entropy(ahead[:, :-depth].flatten(0, 1), ids[:, depth:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lm.eval()


@pytest.mark.parametrize("draft", [1, 3, 6])
def test_drafting_changes_no_token(learned, make_lm, run_lm, draft):
    accepted = []
    for seed in range(4):
        start, step = 5 * seed, 1 + seed % 3
        prompts = [[(start + step * i) % 40 for i in range(7)], ids_of(1, 5, seed)[0].tolist()]
        for ids in prompts:
            result = speculative_greedy(learned, ids, 30, draft)
            assert result.ids == greedy(learned, run_lm, ids, 30)
            accepted.append(result.mean_accepted)
    assert max(accepted) > min(1.9, 1 + draft * 0.5)  # drafts were taken, so going back and going on were both tested
    assert min(accepted) < 1 + draft
    fresh = make_lm("M-M*-ME", **MTP)  # here every draft is wrong
    ids = ids_of(1, 9)[0].tolist()
    assert speculative_greedy(fresh, ids, 20, draft).ids == greedy(fresh, run_lm, ids, 20)


def test_it_stops_where_plain_decoding_would(learned, run_lm):
    ids = [(3 * i) % 40 for i in range(7)]
    plain = greedy(learned, run_lm, ids, 12)
    stop = plain[5]
    result = speculative_greedy(learned, ids, 12, 4, stop_ids=[stop])
    assert result.ids == plain[: plain.index(stop) + 1]
    assert sum(result.accepted) == len(result.ids) - 1  # the prompt's pass gave the first
    one = speculative_greedy(learned, ids, 1, 4)
    assert (one.ids, one.accepted, one.mean_accepted) == (plain[:1], [], 1.0)


def test_what_it_needs_is_said(make_lm, learned):
    with pytest.raises(ConfigError, match="num_nextn_predict_layers is 0"):
        speculative_greedy(make_lm("M-"), [1], 4)
    with pytest.raises(ConfigError, match="transformers_clamp"):
        speculative_greedy(make_lm("M-", **MTP, transformers_clamp=True), [1], 4)
    with pytest.raises(ConfigError, match="draft >= 1"):
        speculative_greedy(learned, [1], 4, draft=0)
