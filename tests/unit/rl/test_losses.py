"""Each rule against a 2×3 example worked by hand, a loop of plain numbers, and finite differences."""

import math

import pytest
import torch

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.rl.losses import (
    RULES,
    Rule,
    advantages,
    correction_weights,
    kl_k3,
    loss_mask,
    make_rule,
    policy_loss,
    spread,
    token_losses,
    token_weights,
)

# Two completions of one prompt, three tokens wide; the second has two. Rewards 1 and 0.
OLD = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -0.7, -9.0]], dtype=torch.float64)
RATIO = torch.tensor([[1.5, 0.5, 1.0], [1.5, 0.5, 7.0]], dtype=torch.float64)
NEW = OLD + RATIO.log()
MASK = torch.tensor([[True, True, True], [True, True, False]])
REWARDS = torch.tensor([[1.0, 0.0]])
A = 1 / math.sqrt(2)  # ±0.5 over the sample deviation sqrt(0.5)
S0, S1 = 0.75 ** (1 / 3), 0.75**0.5  # sequence ratios: exp of the mean log ratio
EXACT = {"eps": 0.0}


def value(rule, new=NEW, old=OLD, **options):
    total, terms = policy_loss(new, old, REWARDS, MASK, rule, **options)
    return float(total) / float(terms)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # sequence mean of −min(ratio·A, clip·A): row 0 has 1.2 + 0.5 + 1, row 1 has −1.5 − 0.8.
        (make_rule("grpo", **EXACT), -(2.7 / 3 - 2.3 / 2) * A / 2),
        (make_rule("dapo", mask_truncated=False, **EXACT), -(1.28 + 0.5 + 1 - 2.3) * A / 5),
        (make_rule("dapo", clip_high=0.2, **EXACT), -(2.7 - 2.3) * A / 5),
        # no std: advantages ±0.5; sums over tokens by the constant 3.
        (make_rule("dr_grpo"), -(2.7 - 2.3) * 0.5 / 3 / 2),
        (make_rule("dr_grpo", length=10), -(2.7 - 2.3) * 0.5 / 10 / 2),
        # leave one out: 1 − 0 and 0 − 1; the sequence is one action.
        (make_rule("rloo"), -(2.7 - 2.3) * 1.0 / 2),
        # sequence ratios 0.909 and 0.866 lie below 1 − 3e-4: the positive one is kept, the negative one is clipped.
        (make_rule("gspo", **EXACT), -(S0 - 0.9997) * A / 2),
        (make_rule("gspo", clip_low=0.5, **EXACT), -(S0 - S1) * A / 2),
        # no clip: 1.5 + 0.5 + 1 − 2
        (make_rule("reinforce", **EXACT), -(3.0 - 2.0) * A / 5),
        # dual clip bounds the 1.5 of the negative row by 1.2
        (make_rule("dapo", clip_high=0.2, dual_clip=1.2, **EXACT), -(2.7 - 2.0) * A / 5),
        # cispo: clipped ratio as a factor of the log-probability
        (
            make_rule("cispo", clip_high=0.2, **EXACT),
            -A
            * (
                1.2 * (-1 + math.log(1.5))
                + 0.5 * (-2 + math.log(0.5))
                + 1.0 * -0.5
                - 1.2 * (-0.3 + math.log(1.5))
                - 0.5 * (-0.7 + math.log(0.5))
            )
            / 5,
        ),
    ],
    ids=lambda v: None if isinstance(v, float) else f"{v.baseline}-{v.scale}-{v.average}-{v.ratio}-{v.surrogate}",
)
def test_hand_worked(rule, expected):
    assert value(rule) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", sorted(RULES))
def test_on_policy_the_gradient_is_reinforce_and_the_value_of_a_balanced_group_is_zero(name):
    """With ratio 1 every rule's gradient on a token is −advantage × weight, and no clip acts."""
    rule = make_rule(name)
    new = OLD.clone().requires_grad_()
    total, terms = policy_loss(new, new.detach(), REWARDS, MASK, rule)
    (total / terms).backward()
    gain = {"dr_grpo": 0.5, "rloo": 1.0}.get(name, A)
    weights, count = token_weights(MASK, rule, 3)
    sign = torch.tensor([[1.0], [-1.0]])
    torch.testing.assert_close(new.grad, (-sign * gain * weights / count).double(), rtol=1e-4, atol=0)
    if rule.average == "sequence":
        assert float(total.detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"average": "sequence"},
        {"average": "constant", "scale": "none"},
        {"ratio": "sequence", "average": "sequence", "clip_low": 0.3},
        {"clip_high": 0.28, "dual_clip": 1.4},
        {"kl": 0.1},
        {"correction": "token", "correction_cap": 1.1},
        {"correction": "sequence", "correction_kind": "mask", "correction_cap": 3.0},
        {"baseline": "leave_one_out", "scale": "batch"},
    ],
    ids=str,
)
def test_gradients_are_those_of_finite_differences(changes):
    draw = torch.Generator().manual_seed(3)
    rule = make_rule("grpo", **changes)
    rewards = torch.rand(2, 3, generator=draw, dtype=torch.float64)
    mask = torch.rand(6, 4, generator=draw) < 0.8
    old, sampler, reference = (torch.randn(6, 4, generator=draw, dtype=torch.float64) * 0.3 - 1 for _ in range(3))
    # Away from the kinks of the clip.
    new = (old + 0.6 * torch.randn(6, 4, generator=draw, dtype=torch.float64)).requires_grad_()

    def loss(logprobs):
        total, terms = policy_loss(
            logprobs, old, rewards, mask, rule, sampler_logprobs=sampler, reference_logprobs=reference
        )
        return total / terms

    if rule.ratio == "sequence":  # its value is defined with a stopped gradient: compare with the plain formula
        gain = advantages(rewards, rule).flatten()

        def plain(logprobs):
            mean = ((logprobs - old) * mask).sum(1) / mask.sum(1)
            s = mean.exp()
            return -torch.minimum(s * gain, s.clamp(1 - rule.clip_low, 1 + rule.clip_high) * gain).mean()

        loss(new).backward()
        expected = torch.autograd.grad(plain(new), new)[0]
        torch.testing.assert_close(new.grad, expected, rtol=1e-5, atol=1e-8)
        return
    loss(new).backward()
    step = 1e-6
    for row in range(6):
        for token in range(4):
            change = torch.zeros_like(new)
            change[row, token] = step
            slope = float(loss(new.detach() + change) - loss(new.detach() - change)) / (2 * step)
            assert float(new.grad[row, token]) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    z = (torch.tensor([1.0, 2.0, 6.0]).double() - 3) / math.sqrt(7)  # ((−2)² + (−1)² + 3²) / 2 = 7
    torch.testing.assert_close(advantages(rewards, make_rule("grpo", eps=0.0))[0], z)
    torch.testing.assert_close(advantages(rewards, make_rule("rloo"))[0], torch.tensor([-3.0, -1.5, 4.5]).double())
    torch.testing.assert_close(advantages(rewards, make_rule("dr_grpo"))[0], torch.tensor([-2.0, -1.0, 3.0]).double())
    whole = advantages(rewards, make_rule("grpo", scale="batch", eps=0.0))
    assert float(whole[0, 2]) == pytest.approx(3 / float(rewards.double().std()))
    for name in RULES:
        assert advantages(rewards, make_rule(name))[1].tolist() == [0, 0, 0]
    none = advantages(rewards, make_rule("rloo", baseline="none"))
    assert none.tolist() == rewards.tolist()


def test_equal_rewards_that_no_float_holds_give_exactly_nothing():
    """0.1 + 0.1 + 0.1 is not 0.3: the mean is off by a rounding, which the tiny deviation would blow up."""
    for value in (0.1, 1 / 3, 1e-8, -7.3):
        assert advantages(torch.full((1, 7), value, dtype=torch.float64), make_rule("grpo")).tolist() == [[0.0] * 7]


def test_a_failed_harness_leaves_its_row_out():
    nan = math.nan
    rewards = torch.tensor([[1.0, nan, 0.0], [nan, nan, 1.0], [nan, nan, nan]])
    gains = advantages(rewards, make_rule("grpo", eps=0.0))
    torch.testing.assert_close(gains[0], torch.tensor([A, 0.0, -A]).double())
    assert gains[1:].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert advantages(rewards, make_rule("rloo"))[0].tolist() == [1, 0, -1]
    assert spread(rewards).tolist() == [1, 0, 0]
    mask = loss_mask(torch.ones(9, 2, dtype=torch.bool), rewards, make_rule("grpo"))
    assert mask[:, 0].tolist() == [True, False, True, False, False, True, False, False, False]


def test_truncated_rows_leave_the_loss_and_its_average_but_not_the_statistics():
    rule = make_rule("dapo", clip_low=None, clip_high=None, **EXACT)
    total, terms = policy_loss(OLD, OLD, REWARDS, MASK, rule, truncated=torch.tensor([False, True]))
    assert float(terms) == 3
    assert float(total) == pytest.approx(-3 * A)
    kept, all_terms = policy_loss(OLD, OLD, REWARDS, MASK, make_rule("reinforce", **EXACT))
    assert float(all_terms) == 5
    assert float(kept) == pytest.approx(-A)


def test_importance_corrections_by_hand():
    old = torch.tensor([[0.0, 0.0, 0.0]])
    sampler = torch.log(torch.tensor([[0.5, 2.0, 0.25]]))  # weights 2, 0.5, 4; their product 4
    mask = torch.tensor([[True, True, True]])

    def weights(**changes):
        return correction_weights(old, sampler, mask, make_rule("grpo", **changes))[0].tolist()

    assert weights(correction="token", correction_cap=3.0) == pytest.approx([2, 0.5, 3])
    assert weights(correction="token", correction_kind="mask", correction_cap=3.0) == pytest.approx([2, 0.5, 0])
    both = {"correction_cap": 3.0, "correction_floor": 0.6}
    assert weights(correction="token", correction_kind="mask", **both) == pytest.approx([2, 0, 0])
    assert weights(correction="sequence", correction_cap=3.0) == pytest.approx([3, 3, 3])
    assert weights(correction="sequence", correction_cap=5.0) == pytest.approx([4, 4, 4])
    assert weights(correction="sequence", correction_kind="mask", correction_cap=3.0) == [0, 0, 0]
    # Padding has no part in a sequence's product.
    short = torch.tensor([[True, True, False]])
    found = correction_weights(old, sampler, short, make_rule("grpo", correction="sequence", correction_cap=9.0))
    assert found[0, 0] == pytest.approx(1.0)


def test_k3_is_positive_and_unbiased():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    estimate = kl_k3(p.log(), q.log())
    assert (estimate >= 0).all()
    assert float((p * estimate).sum()) == pytest.approx(float((p * (p / q).log()).sum()))
    assert kl_k3(p.log(), p.log()).tolist() == pytest.approx([0, 0, 0])


def test_what_lies_off_the_mask_changes_nothing():
    """Padding may hold anything: infinities of tokens that could not be drawn, too."""
    bad = NEW.clone()
    bad[1, 2] = -math.inf
    bad.requires_grad_()
    for name in RULES:
        total, terms = policy_loss(bad, OLD, REWARDS, MASK, make_rule(name))
        clean, _ = policy_loss(NEW, OLD, REWARDS, MASK, make_rule(name))
        assert float(total.detach()) == pytest.approx(float(clean))
        grad = torch.autograd.grad(total / terms, bad)[0]
        assert torch.isfinite(grad).all()


def test_clipped_tokens_are_counted_and_carry_no_gradient():
    new = NEW.clone().requires_grad_()
    losses, stats = token_losses(new, OLD, torch.tensor([A, -A]), MASK, make_rule("dapo", clip_high=0.2))
    losses.sum().backward()
    assert float(stats["clipped"]) == 2  # 1.5 of the good row, 0.5 of the bad one
    assert new.grad[0, 0] == 0
    assert new.grad[1, 1] == 0
    assert (new.grad[0, 1:] != 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "grop"}, "did you mean 'grpo'"),
        ({"clip_hi": 0.2}, "did you mean 'clip_high'"),
        ({"average": "mean"}, "average must be one of token, sequence, constant"),
        ({"clip_low": 2.0}, "clip_low must be between"),
        ({"length": 0}, "length must be at least 1"),
        ({"dual_clip": 0.5}, "dual_clip must be at least 1"),
        ({"correction_cap": 0.5}, "correction_cap at least 1"),
    ],
)
def test_mistakes_get_a_short_answer(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_rule(**changes)


def test_needed_logprobs_are_asked_for():
    with pytest.raises(ValueError, match="sampler"):
        policy_loss(NEW, OLD, REWARDS, MASK, Rule(correction="token"))
    with pytest.raises(ValueError, match="reference"):
        policy_loss(NEW, OLD, REWARDS, MASK, Rule(kl=0.1))
