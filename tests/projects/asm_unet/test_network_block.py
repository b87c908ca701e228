"""The adaptive scan block against a slow version written here: loops, plain indexing, float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from bestiary.projects.asm_unet.adaptive_scan import AdaptiveScan, AdaptiveScanMamba
from bestiary.shared.core.protocols import TokenMixer

F64 = torch.float64


def slow_mamba(p, u, suffix=""):
    """One Mamba branch on tokens (L, D): token by token, channel vectors, nothing of ours."""
    E = p["out_proj.weight"].shape[1]
    N, R = p[f"A{suffix}_log"].shape[1], p[f"dt_proj{suffix}.weight"].shape[1]
    kernel, A = p[f"conv1d{suffix}.weight"][:, 0], -torch.exp(p[f"A{suffix}_log"])
    width = kernel.shape[1]
    xz = [p["in_proj.weight"] @ token for token in u]
    h, out = torch.zeros(E, N, dtype=u.dtype), []
    for t in range(len(u)):
        x = p[f"conv1d{suffix}.bias"].clone()
        for k in range(width):
            if t - width + 1 + k >= 0:
                x = x + kernel[:, k] * xz[t - width + 1 + k][:E]
        x = x * torch.sigmoid(x)
        params = p[f"x_proj{suffix}.weight"] @ x
        dt = F.softplus(p[f"dt_proj{suffix}.weight"] @ params[:R] + p[f"dt_proj{suffix}.bias"])
        B, C = params[R : R + N], params[R + N :]
        h = torch.exp(dt[:, None] * A) * h + (dt * x)[:, None] * B
        z = xz[t][E:]
        out.append((h @ C + p[f"D{suffix}"] * x) * z * torch.sigmoid(z))
    return torch.stack(out)


def sub(p, prefix):
    return {k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)}


def norm(p, name, x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(var + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def slow_block(block, tokens, slices=5):
    """Output (B, L, D) and orders (G, B, L) from the block's parameters and the formulas."""
    p = dict(block.named_parameters())
    B, L, D = tokens.shape
    outputs, orders = [], torch.zeros(block.num_groups, B, L, dtype=torch.long)
    for b in range(B):
        x = tokens[b]
        scored = torch.relu(norm(p, "score.norm", x))
        m = sub(p, "score.mamba.")
        padded = torch.cat([scored, scored.new_zeros(-L % slices, D)])
        chunk = len(padded) // slices
        walk = [c * chunk + t for t in range(chunk) for c in range(slices)]
        y_slice = slow_mamba(m, padded[walk], "_s")
        unsliced = [None] * len(padded)
        for step, token in enumerate(walk):
            unsliced[token] = y_slice[step]
        y = slow_mamba(m, scored) + slow_mamba(m, scored.flip(0), "_b").flip(0) + torch.stack(unsliced[:L])
        y = y @ m["out_proj.weight"].T
        individual = torch.sigmoid(y @ p["score.head.weight"][0] + p["score.head.bias"])
        groups = []
        for g in range(block.num_groups):
            e = p["group_scores"][g]
            positions = [t * (len(e) - 1) / (L - 1) if L > 1 else 0.0 for t in range(L)]
            low = [min(math.floor(q), len(e) - 2) for q in positions]
            stretched = torch.stack([e[i] + (q - i) * (e[i + 1] - e[i]) for q, i in zip(positions, low, strict=True)])
            a = torch.sigmoid(stretched) + individual
            order = sorted(range(L), key=lambda t: float(a[t].detach()))
            orders[g, b] = torch.tensor(order)
            u = torch.stack([torch.cat([x[t], a[t : t + 1]]) for t in order])
            stack = sub(p, f"stacks.{g if len(block.stacks) > 1 else 0}.layers.")
            for i in range(len(block.stacks[0].layers)):
                q = sub(stack, f"{i}.")
                inner = torch.relu(norm(q, "norm", u @ q["linear.weight"].T + q["linear.bias"]))
                mixed = slow_mamba(sub(q, "mamba."), inner) @ q["mamba.out_proj.weight"].T
                u = norm(q, "out_norm", u + mixed)
            restored = [None] * L
            for step, token in enumerate(order):
                restored[token] = u[step]
            groups.append(torch.stack(restored))
        mean = sum(groups) / len(groups)
        outputs.append(norm(p, "proj_norm", mean @ p["proj.weight"].T + p["proj.bias"]))
    return torch.stack(outputs), orders


def make(dim=6, seed=0, **options):
    torch.manual_seed(seed)
    block = AdaptiveScanMamba(dim, group_length=12, d_state=3, **options).double()
    with torch.no_grad():
        for p in block.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return block


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("length", [1, 5, 12, 13])
def test_equals_the_slow_version_with_gradients(length, per_group):
    block = make(per_group_stack=per_group)
    x = torch.randn(2, length, 6, dtype=F64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    found, orders = block(x, return_orders=True)
    weight = torch.randn_like(found)
    mine = torch.autograd.grad((found * weight).sum(), [x, *block.parameters()])
    want, want_orders = slow_block(block, y)
    theirs = torch.autograd.grad((want * weight).sum(), [y, *block.parameters()], allow_unused=True)
    assert torch.equal(orders, want_orders)
    torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-9)
    for name, a, b in zip(["x", *dict(block.named_parameters())], mine, theirs, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def test_defaults_are_the_official_ones():
    block = AdaptiveScanMamba(128)
    count = sum(p.numel() for p in block.parameters())
    assert sum(p.numel() for p in block.score.parameters()) == 153_217
    assert block.group_scores.numel() == 6_144
    assert sum(p.numel() for m in (block.proj, block.proj_norm) for p in m.parameters()) == 16_896
    # the official total is 523,525, of which each of two layers holds two unused sets (conv, x_proj, dt_proj, A, D)
    inner, rank = 258, 9
    unused = 2 * 2 * (inner * 5 + inner * (rank + 32) + inner * (rank + 1) + inner * 16 + inner)
    assert count == 523_525 - unused


def test_orders_are_permutations_that_sort_the_scores():
    block = make()
    x = torch.randn(3, 17, 6, dtype=F64)
    _, orders = block(x, return_orders=True)
    assert orders.shape == (3, 3, 17)
    assert orders.dtype == torch.int64
    assert torch.equal(orders.sort(-1).values, torch.arange(17).expand(3, 3, 17))
    scores = block.scores(x)
    assert scores.min() > 0
    assert scores.max() < 2
    assert (scores.gather(-1, orders).diff(dim=-1) >= 0).all()


@pytest.mark.parametrize("spatial", [(3, 5), (2, 3, 4)])
def test_spatial_form_equals_token_form(spatial):
    block = make()
    x = torch.randn(2, 6, *spatial, dtype=F64)
    tokens = x.reshape(2, 6, -1).permute(0, 2, 1)
    found, orders = block(x, return_orders=True)
    want, want_orders = block(tokens, return_orders=True)
    assert torch.equal(orders, want_orders)
    torch.testing.assert_close(found, want.permute(0, 2, 1).reshape(2, 6, *spatial))


@pytest.mark.parametrize("per_group", [False, True])
def test_checkpointing_changes_nothing(per_group):
    block = make(per_group_stack=per_group).train()
    x = torch.randn(2, 7, 6, dtype=F64, requires_grad=True)
    grads = []
    for block.checkpoint in (False, True):
        loss = block(x).pow(3).sum()
        grads.append(torch.autograd.grad(loss, [x, *block.parameters()]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_each_groups_stack_has_its_own_gradient():
    """Finite differences on one weight of each group's stack, with checkpointing on: the official code fails here."""
    block = make(per_group_stack=True, checkpoint=True).train()
    x = torch.randn(1, 7, 6, dtype=F64)
    loss = block(x).pow(3).sum()
    loss.backward()
    for stack in block.stacks:
        weight = stack.layers[0].linear.weight
        found, values = float(weight.grad[1, 2]), []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight[1, 2] += step
                values.append(float(block(x).pow(3).sum()))
                weight[1, 2] -= step
        assert found == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_group_vectors_have_the_gradient_of_finite_differences():
    block = make()
    x = torch.randn(2, 7, 6, dtype=F64)
    block(x).pow(3).sum().backward()
    for g in range(3):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                block.group_scores[g, 4] += step
                values.append(float(block(x).pow(3).sum()))
                block.group_scores[g, 4] -= step
        assert float(block.group_scores.grad[g, 4]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("per_group", [False, True])
def test_no_parameter_is_dead(per_group):
    block = make(per_group_stack=per_group)
    block(torch.randn(2, 13, 6, dtype=F64)).pow(3).sum().backward()
    dead = [name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_residual():
    block, x = make(), torch.randn(2, 6, 3, 4, dtype=F64)
    plain = block(x)
    block.residual = True
    torch.testing.assert_close(block(x), x + plain)


def test_ties_keep_raster_order():
    block = make()
    with torch.no_grad():
        block.group_scores.zero_()
        block.score.head.weight.zero_()
    _, orders = block(torch.randn(2, 40, 6, dtype=F64), return_orders=True)
    assert torch.equal(orders, torch.arange(40).expand(3, 2, 40))


def test_bfloat16_autocast_is_finite_and_keeps_the_scores_in_float32():
    torch.manual_seed(0)
    block = AdaptiveScanMamba(6, group_length=12, d_state=3)
    x = torch.randn(2, 6, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out, orders = block(x, return_orders=True)
        assert block.scores(x.flatten(2).transpose(1, 2)).dtype == torch.float32
    out.float().pow(3).sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
    assert torch.equal(orders.sort(-1).values, torch.arange(35).expand(3, 2, 35))


def test_mixer():
    mixer = AdaptiveScan(min_channels=8, d_state=3, num_groups=2)
    assert isinstance(mixer, TokenMixer)
    assert AdaptiveScan().build(64, 3, 1) is None
    assert mixer.build(8, 3, 0) is None
    block = mixer.build(9, 3, 0)
    assert block is not None
    assert block.num_groups == 2
    with pytest.raises(ValueError, match=r"\(B, 9, Z, H, W\)"):
        block(torch.zeros(1, 9, 4, 4))
    with pytest.raises(ValueError, match=r"tokens \(B, L, 9\)"):
        block(torch.zeros(1, 9, 4))
    with pytest.raises(ValueError, match="positive"):
        AdaptiveScanMamba(6, num_groups=0)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-10)], ids=str)
def test_fused_equals_gathering(per_group, checkpoint, residual, dtype, tolerance):
    block = make(per_group_stack=per_group, checkpoint=checkpoint, residual=residual).to(dtype).train()
    x = torch.randn(2, 6, 3, 5, dtype=dtype, requires_grad=True)
    assert block.fused
    weight, results = torch.randn(2, 6, 3, 5, dtype=dtype), []
    for block.fused in (True, False):
        out, orders = block(x, return_orders=True)
        leaves = [x, *block.parameters()]
        results.append([orders, out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        scale = max(1.0, float(b.detach().abs().max()))
        assert float((a - b).detach().abs().max()) <= tolerance * scale


def test_fused_moves_no_token(monkeypatch):
    """Neither gather nor inverse in the block itself, and the first Linear sees each token once for all groups."""
    import bestiary.projects.asm_unet.adaptive_scan as module

    def refuse(*_, **__):
        raise AssertionError("the fused block gathers nothing")

    monkeypatch.setattr(module, "gather_tokens", refuse)
    monkeypatch.setattr(module, "invert_order", refuse)
    calls, linear = [], F.linear

    def spy(x, weight, bias=None):
        calls.append((tuple(x.shape), tuple(weight.shape)))
        return linear(x, weight, bias)

    block = make()
    x = torch.randn(2, 5, 6, dtype=F64)
    monkeypatch.setattr(module.F, "linear", spy)
    block(x)
    assert ((2, 5, 6), (7, 6)) in calls
    block.fused = False
    with pytest.raises(AssertionError, match="gathers nothing"):
        block(x)


def test_fused_respects_a_wrapped_linear():
    """A Linear that was given an adapter is called, not read."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, x):
            return 2 * self.inner(x)

    block = make()
    block.stacks[0].layers[0].linear = Doubled(block.stacks[0].layers[0].linear)
    x, outputs = torch.randn(2, 5, 6, dtype=F64), []
    for block.fused in (True, False):
        outputs.append(block(x))
    torch.testing.assert_close(*outputs)


def test_options_reach_the_block():
    from bestiary.projects.asm_unet.model import ASMUNet

    for fused in (True, False):
        net = ASMUNet(2, 1, 2, [4, 8], [1, 2], [3, 3], asm_min_channels=4, fused=fused)
        blocks = [m for m in net.modules() if isinstance(m, AdaptiveScanMamba)]
        assert [b.fused for b in blocks] == [fused]
    assert set(make().state_dict()) == set(make(fused=False).state_dict())
