"""Routing by hand, experts against a loop, balance against its definition."""

import pytest
import torch
from torch.nn import functional as F

from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.hybrid.grouped import grouped_linear
from bestiary.shared.language.hybrid.layout import make_layout
from bestiary.shared.language.hybrid.moe import MoE, Router, Routing, sequence_balance


def config(**changes):
    sizes = {
        "hidden_size": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 10,
        "moe_shared_expert_intermediate_size": 6,
    }
    return HybridConfig(pattern="E", **{**sizes, **changes})


def moe(seed=0, **changes):
    torch.manual_seed(seed)
    layer = MoE(config(**changes))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
        layer.gate.e_score_correction_bias.normal_(std=0.5)
    return layer


def by_loop(layer, x):
    """The definition, one token and one expert at a time."""
    gate, out = layer.gate, []
    for token in x:
        score = torch.sigmoid(gate.weight @ token)
        chosen = (score + gate.e_score_correction_bias).argsort(descending=True)[: gate.top_k]
        weight = score[chosen] / score[chosen].sum() * gate.scale
        inner = token if layer.fc1_latent_proj is None else layer.fc1_latent_proj(token)
        total = 0
        for w, e in zip(weight, chosen, strict=True):
            total = total + w * (layer.experts.down_proj[e] @ F.relu(layer.experts.up_proj[e] @ inner) ** 2)
        if layer.fc2_latent_proj is not None:
            total = layer.fc2_latent_proj(total)
        shared = layer.shared_experts
        if shared is not None:
            total = total + shared.down_proj.weight @ F.relu(shared.up_proj.weight @ token) ** 2
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize(
    "changes", [{}, {"moe_latent_size": 4, "routed_scaling_factor": 5.0}, {"num_experts_per_tok": 8}]
)
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_equals_a_loop_over_experts_gradients_too(changes, tokens):
    layer = moe(**changes).double().eval()
    x = torch.randn(1, tokens, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(tokens, 12, dtype=torch.float64)
    results = []
    for run in (lambda: layer(x, make_layout(x, None, None, 0))[0][0], lambda: by_loop(layer, x[0])):
        y = run()
        results.append((y, *torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    single = moe(**changes).eval()
    with torch.no_grad():
        y = single(x.float(), make_layout(x, None, None, 0))[0][0]
    torch.testing.assert_close(y.double(), results[0][0], rtol=1e-4, atol=1e-5)


def test_the_bias_chooses_and_does_not_weigh():
    router = Router(config(num_experts_per_tok=2, routed_scaling_factor=2.5))
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0])
        router.e_score_correction_bias[5] = 1.0
    x = torch.zeros(1, 12)
    x[0, 0] = 1.0
    routing = router(x)
    assert sorted(routing.experts[0].tolist()) == [0, 5]
    s = torch.sigmoid(torch.tensor([3.0, -2.0]))
    expected = 2.5 * s / s.sum()
    got = routing.weights[0][routing.experts[0].argsort()]
    torch.testing.assert_close(got, expected)


def test_groups_by_hand():
    """Four groups of two; the best two groups by the sum of their two scores, then the best three experts of these."""
    router = Router(config(n_group=4, topk_group=2, num_experts_per_tok=3))
    logits = torch.tensor([4.0, -4.0, 1.0, 1.1, 0.9, 1.2, 3.0, -4.0])
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = logits
    x = torch.zeros(1, 12)
    x[0, 0] = 1.0
    # sums of sigmoids: group 0 1.00, group 1 1.48, group 2 1.48, group 3 0.97
    assert sorted(router(x).experts[0].tolist()) == [2, 3, 5]


@pytest.mark.parametrize(("width", "out"), [(4, 8), (6, 4), (4, 5)])
def test_grouped_linear_with_empty_groups(width, out):
    torch.manual_seed(0)
    sizes = [0, 3, 0, 0, 5, 1, 0]
    weight = torch.randn(7, out, width, requires_grad=True)
    x = torch.randn(9, width, requires_grad=True)
    ends = torch.tensor(sizes).cumsum(0).int()
    y = grouped_linear(x, weight, ends)
    expected = torch.cat([rows @ w.T for rows, w in zip(x.split(sizes), weight, strict=True)])
    torch.testing.assert_close(y, expected)
    # a gradient with strides of zero, which torch's own op refuses
    for got, want in zip(
        torch.autograd.grad(y.sum(), [x, weight]), torch.autograd.grad(expected.sum(), [x, weight]), strict=True
    ):
        torch.testing.assert_close(got, want)
    torch.library.opcheck(torch.ops.bestiary_language.grouped_linear.default, (x, weight, ends))


# ------------------------------------------------------------------ balance


def test_sequence_balance_by_its_definition():
    torch.manual_seed(0)
    scores = torch.rand(10, 4)
    experts = torch.stack([torch.randperm(4)[:2] for _ in range(10)])
    sequences = torch.tensor([0, 0, 0, 1, 1, 1, 1, 3, 3, 3])
    real = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1, 0], dtype=torch.bool)
    total = []
    for number in (0, 1, 3):
        rows = [i for i in range(10) if sequences[i] == number and real[i]]
        f = [4 / (2 * len(rows)) * sum(int(e in experts[i]) for i in rows) for e in range(4)]
        p = [sum(scores[i, e] / scores[i].sum() for i in rows) / len(rows) for e in range(4)]
        total.append(sum(a * b for a, b in zip(f, p, strict=True)))
    got = sequence_balance(Routing(experts, torch.ones(10, 2), scores), sequences, real)
    torch.testing.assert_close(got, torch.stack(total).mean())


def test_even_loads_give_one():
    experts = torch.tensor([[0, 1], [2, 3]])
    got = sequence_balance(Routing(experts, torch.ones(2, 2), torch.full((2, 4), 0.3)), torch.zeros(2).long(), None)
    assert got.item() == pytest.approx(1.0)


def test_packed_sequences_are_balanced_apart():
    layer = moe().train()
    x = torch.randn(1, 9, 12)
    seq_idx = torch.tensor([[0] * 4 + [1] * 5])
    _, packed = layer(x, make_layout(x, None, seq_idx, None))
    apart = [layer(part, make_layout(part, None, None, 0))[1] for part in x.split([4, 5], 1)]
    torch.testing.assert_close(packed, (apart[0] + apart[1]) / 2)


def test_padding_is_neither_counted_nor_balanced():
    layer = moe().train()
    x = torch.randn(2, 6, 12)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    _, balance = layer(x, make_layout(x, mask, None, 0))
    assert layer.gate.load.sum() == 10 * 3
    layer.gate.load.zero_()
    parts = [layer(part, make_layout(part, None, None, 0))[1] for part in (x[:1, :4], x[1:])]
    torch.testing.assert_close(balance, (parts[0] + parts[1]) / 2)


def test_the_bias_moves_towards_balance(make_lm):
    """All tokens prefer one expert; aux-loss-free balancing spreads them, without touching a weight."""
    lm = make_lm("E", n_routed_experts=4, num_experts_per_tok=1, router_bias_rate=0.02).train()
    router = lm.routers()[0]
    ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    router.e_score_correction_bias.copy_(torch.tensor([2.0, 0.0, 0.0, 0.0]))
    weight = router.weight.detach().clone()
    violations = []
    for _ in range(250):
        lm(lm.embed(ids))
        violations.append(lm.after_step(True)["max_violation"])
    assert violations[0] == pytest.approx(4.0)
    assert violations[-1] < 1.6
    assert torch.equal(router.weight, weight)
    assert router.load.sum() == 0


def test_a_skipped_step_moves_nothing(make_lm):
    lm = make_lm("E").train()
    bias = lm.routers()[0].e_score_correction_bias.clone()
    lm(lm.embed(torch.zeros(1, 8, dtype=torch.long)))
    assert lm.after_step(False) == {}
    assert torch.equal(lm.routers()[0].e_score_correction_bias, bias)
    assert lm.routers()[0].load.sum() == 0
    assert lm.after_step(True) == {}  # nothing was counted
    assert torch.equal(lm.routers()[0].e_score_correction_bias, bias)


def test_a_layer_that_is_not_trained_keeps_its_bias(make_lm):
    lm = make_lm("E-").train()
    lm.requires_grad_(False)
    lm.layers[1].requires_grad_(True)
    bias = lm.routers()[0].e_score_correction_bias.clone()
    lm(lm.embed(torch.zeros(1, 8, dtype=torch.long)))
    assert lm.after_step(True) == {}
    assert torch.equal(lm.routers()[0].e_score_correction_bias, bias)


def test_routers_stay_in_float32(make_lm):
    lm = make_lm("E").to(torch.bfloat16).train()
    router = lm.routers()[0]
    assert (router.weight.dtype, router.e_score_correction_bias.dtype) == (torch.bfloat16, torch.float32)
    for _ in range(4):
        lm(lm.embed(torch.randint(0, 256, (4, 256))))
    assert router.load.sum() == 4 * 4 * 256 * 2  # bfloat16 cannot count so far
    before = router.e_score_correction_bias.clone()
    lm.after_step(True)
    moved = (router.e_score_correction_bias - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-3, atol=1e-6)


def test_evaluation_counts_nothing(make_lm):
    lm = make_lm("E")
    lm(lm.embed(torch.zeros(1, 8, dtype=torch.long)))
    assert lm.aux_losses == {}
    assert lm.routers()[0].load.sum() == 0
