"""However a step is cut, and whatever rows are left out of it, its gradient is that of the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bestiary.shared.core.protocols import Sampling
from bestiary.shared.rl.losses import RULES, advantages, make_rule, policy_loss, token_losses
from bestiary.shared.rl.micro_batches import _area, make_batch, split
from bestiary.shared.rl.protocols import Verdict
from bestiary.shared.rl.rollouts import Group, Trajectory
from bestiary.shared.rl.scoring import completion_logprobs

SAMPLING = Sampling(6, 1.0)
REWARDS = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, float("nan")], [0.5, 1.0, 0.0]])


@pytest.fixture
def step(llama, chats):
    """Four groups of three rows of lengths 1 to 6, with masked tool tokens, and their batch of prompts."""
    model = llama()
    examples = chats("a", "longer", "the longest of all", "bc")
    prompts = model.processor()(examples, "prompt")
    draw = torch.Generator().manual_seed(0)
    groups = []
    for at, example in enumerate(examples):
        rows = []
        for sample in range(3):
            ids = torch.randint(97, 122, (1 + int(torch.randint(0, 6, (), generator=draw)),), generator=draw).tolist()
            own = [i != 2 for i in range(len(ids))]
            row = Trajectory(example, sample, ids, own, [0.0] * len(ids), [], [""], truncated=len(ids) == 6)
            nan = bool(REWARDS[at, sample].isnan())
            row.verdict = Verdict(0.0, "error") if nan else Verdict(float(REWARDS[at, sample]))
            rows.append(row)
        groups.append(Group(at, example, example["id"], [], rows))
    return model, groups, prompts


def gradient(model, parts, rule):
    model.zero_grad()
    terms = sum(part.terms for part in parts)
    for part in parts:
        of = (part.prompts, part.owner, part.completions, part.present)
        logprobs = completion_logprobs(model, *of, SAMPLING)
        losses, _ = token_losses(logprobs, logprobs.detach(), part.advantages, part.mask, rule)
        ((losses * part.weights).sum() / terms).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def by_hand(model, groups, rule):
    """One row at a time through transformers, and the whole loss as one pure function."""
    model.zero_grad()
    rows = [row for group in groups for row in group.rows]
    width = max(len(row.ids) for row in rows)
    logprobs = []
    for row in rows:
        prompt = model.processor()([row.example], "prompt")["input_ids"][0]
        logits = model.backbone.lm(input_ids=torch.cat([prompt, torch.tensor(row.ids)])[None]).logits[0]
        logp = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, torch.tensor(row.ids)[:, None])[:, 0]
        logprobs.append(torch.nn.functional.pad(logp, (0, width - len(logp))))
    logprobs = torch.stack(logprobs)
    mask = torch.tensor([row.own + [False] * (width - len(row.ids)) for row in rows])
    truncated = torch.tensor([row.truncated for row in rows])
    total, terms = policy_loss(logprobs, logprobs.detach(), REWARDS, mask, rule, truncated=truncated, longest=6)
    (total / terms).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("budget", [None, 1, 25, 60])
def test_the_gradient_is_that_of_whole_rows_one_by_one(step, name, budget):
    model, groups, prompts = step
    rule = make_rule(name)
    batch = make_batch(groups, prompts, advantages(REWARDS, rule), rule, 256, 6)
    parts = split(batch, budget)
    found, expected = gradient(model, parts, rule), by_hand(model, groups, rule)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_rows_that_teach_nothing_are_left_out_and_counted(step):
    _, groups, prompts = step
    rule = make_rule("reinforce")
    batch = make_batch(groups, prompts, advantages(REWARDS, rule), rule, 256, 6)
    parts = split(batch, None)
    # Group 1 has equal rewards, group 2 one known value; row 1 of group 3 has advantage, row 0 is the mean.
    rows = sorted(int(r) for part in parts for r in part.rows)
    assert rows == [0, 1, 2, 10, 11]
    own = sum(sum(row.own) for group in groups for row in group.rows if row.verdict.status == "ok")
    assert sum(part.terms for part in parts) == own
    assert sum(len(part.prompts["ids"]) for part in parts) == 2
    assert len(split(batch, None, keep_flat=True)[0].ids) == 11  # all but the failed one


def test_a_step_without_spread_goes_through_the_motions(step):
    model, groups, prompts = step
    rule = make_rule("reinforce")
    batch = make_batch(groups, prompts, torch.zeros(4, 3), rule, 256, 6)
    parts = split(batch, 50)
    assert len(parts) == 1
    assert parts[0].terms > 0
    assert gradient(model, parts, rule).abs().max() == 0


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=2), min_size=1, max_size=6),
    budget=st.integers(1, 200),
)
def test_no_part_exceeds_the_budget_unless_one_row_does(lengths, budget):
    groups = [
        Group(i, {"id": str(i)}, str(i), [], [Trajectory({"id": str(i)}, s, [1] * n, [True] * n) for s, n in pair])
        for i, pair in enumerate([list(enumerate(p)) for p in lengths])
    ]
    for group in groups:
        for row in group.rows:
            row.logprobs, row.verdict = [0.0] * len(row.ids), Verdict(1.0)
    mask = torch.ones(len(groups), 4, dtype=torch.long)
    prompts = {"ids": [g.name for g in groups], "input_ids": mask, "attention_mask": mask, "labels": mask}
    prompts |= {"position_ids": mask, "seq_idx": None, "media": {}}
    batch = make_batch(groups, prompts, torch.ones(len(groups), 2), make_rule(), 0, 30)
    parts = split(batch, budget)
    owners, sizes = batch.owner.tolist(), batch.present.sum(1).tolist()
    seen = sorted(int(r) for part in parts for r in part.rows)
    assert seen == list(range(len(owners)))
    for part in parts:
        rows = part.rows.tolist()
        assert len(rows) == 1 or _area(rows, owners, sizes, [4] * len(groups)) <= budget
        assert [part.ids[part_row].split("#")[0] for part_row in range(len(rows))] == [str(owners[r]) for r in rows]
        assert [part.prompts["ids"][o] for o in part.owner.tolist()] == [str(owners[r]) for r in rows]
