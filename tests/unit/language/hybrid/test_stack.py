"""The whole stack: padding, packing, prefill against steps, all against one plain forward pass of one row."""

import pytest
import torch
from torch.nn import functional as F

PATTERNS = ["M-M*-ME", "M", "*", "M-M-", "ME*E"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def ids_of(rows, length, seed=1):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    monkeypatch.setenv("BESTIARY_KERNELS", request.param if request.param == "reference" else "auto")
    return request.param


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_token_does_not_depend_on_later_ones(make_lm, run_lm, pattern):
    lm, ids = make_lm(pattern), ids_of(1, 40)
    changed = ids.clone()
    changed[0, 25:] = (changed[0, 25:] + 7) % 256
    one, other = run_lm(lm, ids), run_lm(lm, changed)
    torch.testing.assert_close(one[:, :25], other[:, :25], **CLOSE)
    assert (one[:, 25:] - other[:, 25:]).abs().max() > 0.1


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_then_steps_equal_the_plain_row(make_lm, run_lm, backend, pattern, side):
    """Rows of three lengths, padded, prefilled and continued by single steps and a chunk: each as if it were alone."""
    lm, lengths, width = make_lm(pattern), (5, 11, 1), 14
    ids, more = ids_of(3, 20), ids_of(3, 6, seed=2)
    batch, mask = torch.full((3, width), 255), torch.zeros(3, width, dtype=torch.long)
    for row, n in enumerate(lengths):
        start = {"left": width - n, "right": 0, "both": min(2, width - n)}[side]
        batch[row, start : start + n], mask[row, start : start + n] = ids[row, :n], 1
    cache = lm.new_cache(3)
    padded = [run_lm(lm, batch, mask, cache)]
    for step in (0, 1, 2):
        mask = F.pad(mask, (0, 1), value=1)
        padded.append(run_lm(lm, more[:, step : step + 1], mask, cache))
    mask = F.pad(mask, (0, 3), value=1)
    padded.append(run_lm(lm, more[:, 3:], mask, cache))
    for row, n in enumerate(lengths):
        plain = run_lm(lm, torch.cat([ids[row : row + 1, :n], more[row : row + 1]], 1))[0]
        real = torch.cat(padded, 1)[row][mask[row].bool()]
        torch.testing.assert_close(real, plain, **CLOSE)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_chunk_with_padding_in_a_later_turn(make_lm, run_lm, pattern):
    """A second turn of different lengths, padded at the left, on top of a cache; then single steps that skip a row."""
    lm, first, second = make_lm(pattern), ids_of(2, 9), ids_of(2, 7, seed=3)
    cache = lm.new_cache(2)
    run_lm(lm, first, None, cache)
    batch = second.clone()
    batch[0, :4] = 255
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, 9:13] = 0
    turn = run_lm(lm, batch, mask, cache)
    mask = torch.cat([mask, torch.tensor([[1, 0], [0, 1]])], 1)
    steps = [run_lm(lm, [[5], [255]], mask[:, :17], cache), run_lm(lm, [[255], [6]], mask, cache)]
    row = run_lm(lm, torch.cat([first[:1], second[:1, 4:], torch.tensor([[5]])], 1))[0]
    torch.testing.assert_close(torch.cat([turn[0, 4:], steps[0][0]]), row[9:], **CLOSE)
    row = run_lm(lm, torch.cat([first[1:], second[1:], torch.tensor([[6]])], 1))[0]
    torch.testing.assert_close(torch.cat([turn[1], steps[1][1]]), row[9:], **CLOSE)


def test_what_stands_in_padding_does_not_matter(make_lm):
    lm = make_lm("M-M*-ME")
    embeds = lm.embed(ids_of(2, 12)).detach()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3], mask[1, 9:] = 0, 0
    loud = embeds + 1e4 * (1 - mask)[..., None]
    with torch.no_grad():
        for cache in (None, lm.new_cache(2)):
            other = None if cache is None else lm.new_cache(2)
            one, two = lm(embeds, mask, cache=cache)[0], lm(loud, mask, cache=other)[0]
            torch.testing.assert_close(one[mask.bool()], two[mask.bool()], **CLOSE)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_rows_equal_separate_ones_gradients_too(make_lm, backend, pattern):
    lm = make_lm(pattern)
    lengths = (7, 1, 12, 3)
    parts = [ids_of(1, n, seed=n) for n in lengths]
    weights = [torch.randn(n, 262, generator=torch.Generator().manual_seed(n)) for n in lengths]

    separate = [lm(lm.embed(p))[0][0] for p in parts]
    sum((s * w).sum() for s, w in zip(separate, weights, strict=True)).backward()
    expected = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()

    row = torch.cat([*parts, torch.full((1, 2), 255)], 1)
    # The 3 comes twice: another sequence each time.
    numbers = torch.tensor([[3] * 7 + [9] + [3] * 12 + [4] * 3 + [0] * 2], dtype=torch.int32)
    mask = torch.tensor([[1] * 23 + [0] * 2])
    packed = lm(lm.embed(row), mask, seq_idx=numbers)[0][0, :23].split(lengths)
    for one, other in zip(packed, separate, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    sum((s * w).sum() for s, w in zip(packed, weights, strict=True)).backward()
    for name, parameter in lm.named_parameters():
        if parameter.grad is not None:
            scale = expected[name].abs().max().item() + 1e-3
            torch.testing.assert_close(parameter.grad / scale, expected[name] / scale, rtol=1e-4, atol=2e-5, msg=name)


def test_packing_and_a_cache_exclude_each_other(make_lm, run_lm):
    lm = make_lm("M*")
    with pytest.raises(ValueError, match="exclude each other"):
        run_lm(lm, [[4, 5]], None, lm.new_cache(1), seq_idx=torch.zeros(1, 2, dtype=torch.int32))


def test_no_rows_at_all(make_lm):
    lm = make_lm("M-M*-ME")
    with torch.no_grad():
        assert lm(lm.embed(torch.zeros(0, 5, dtype=torch.long)), cache=lm.new_cache(0))[0].shape == (0, 5, 262)


@pytest.mark.parametrize("bias", [-20.0, -12.0, -3.0, 0.0, 5.0, 20.0])
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.001, 0.5)])
def test_prefill_and_steps_agree_for_every_step_size(make_lm, run_lm, bias, limit):
    lm = make_lm("M-M*-", time_step_limit=limit)
    with torch.no_grad():
        for layer in lm.layers:
            if layer.kind == "M":
                layer.mixer.dt_bias.fill_(bias)
    ids = ids_of(2, 24)
    whole, stepped = lm.new_cache(2), lm.new_cache(2)
    at_once = run_lm(lm, ids, None, whole)
    by_steps = torch.cat([run_lm(lm, ids[:, t : t + 1], None, stepped) for t in range(24)], 1)
    torch.testing.assert_close(at_once, by_steps, rtol=1e-5, atol=1e-5 * at_once.abs().max().item())
    for one, other in zip(whole.layers, stepped.layers, strict=True):
        if one is not None:
            for name, tensor in one.tensors().items():
                scale = tensor.abs().max().item() + 1e-6
                torch.testing.assert_close(tensor / scale, other.tensors()[name] / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sizes", [(40,), (1, 39), (17, 1, 22), (16, 16, 8), (3,) * 13 + (1,)])
def test_chunked_prefill(make_lm, run_lm, pattern, sizes):
    lm, ids = make_lm(pattern), ids_of(2, 40)
    cache = lm.new_cache(2)
    parts = [run_lm(lm, part, None, cache) for part in ids.split(sizes, 1)]
    assert cache.length == 40
    torch.testing.assert_close(torch.cat(parts, 1), run_lm(lm, ids), **CLOSE)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_row_alone_equals_a_row_among_many(make_lm, run_lm, pattern):
    lm, ids = make_lm(pattern), ids_of(6, 19)
    together = run_lm(lm, ids)
    for row in range(6):
        torch.testing.assert_close(together[row], run_lm(lm, ids[row : row + 1])[0], **CLOSE)


def test_logits_to_keep(make_lm, run_lm):
    lm, ids = make_lm("M*"), ids_of(2, 9)
    everything = run_lm(lm, ids)
    torch.testing.assert_close(run_lm(lm, ids, logits_to_keep=2), everything[:, -2:], **CLOSE)
    torch.testing.assert_close(run_lm(lm, ids, logits_to_keep=torch.tensor([0, 4])), everything[:, [0, 4]], **CLOSE)


def test_long_masked_attention_goes_block_by_block(make_lm, run_lm, monkeypatch):
    """Queries in blocks of a few, against all at once."""
    lm, ids = make_lm("*"), ids_of(2, 70)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :30] = 0
    at_once = run_lm(lm, ids, mask)
    monkeypatch.setattr("bestiary.shared.language.hybrid.attention.MASKED_QUERIES", 16)
    torch.testing.assert_close(run_lm(lm, ids, mask)[mask.bool()], at_once[mask.bool()], **CLOSE)


def test_recomputing_gives_the_same_gradients(make_lm):
    ids = ids_of(2, 20)
    grads = []
    for recompute in (False, True):
        lm = make_lm("M-M*-ME", backbone={"recompute": recompute}).train()
        lm(lm.embed(ids))[0].square().mean().backward()
        grads.append({n: p.grad for n, p in lm.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["M", "*", "-", "E"])
@pytest.mark.parametrize("training", [False, True])
def test_each_layer_compiles_whole(make_lm, kind, training):
    lm = make_lm(kind).train(training)
    x = lm.embed(ids_of(2, 20)).detach().requires_grad_()
    lm.layers[0].requires_grad_(True)

    def run(layer):
        from bestiary.shared.language.hybrid.layout import Layout

        y = layer(x, Layout(2, 20, 0, x.device))[0]
        grads = torch.autograd.grad(y.square().sum(), [x, *[p for n, p in lm.layers[0].named_parameters()]])
        return y, *grads

    torch._dynamo.reset()
    compiled = torch.compile(lm.layers[0], fullgraph=True, backend="aot_eager")
    for one, other in zip(run(compiled), run(lm.layers[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_compiled_stack_is_the_stack(make_lm):
    """Through inductor, as ``compile: true`` runs it: training and decoding."""
    ids = ids_of(2, 20)
    results = []
    for compiled in (False, True):
        lm = make_lm("M-*E", backbone={"compile": compiled}).train()
        logits = lm(lm.embed(ids))[0]
        logits.square().mean().backward()
        with torch.no_grad():
            lm.eval()
            cache = lm.new_cache(2)
            steps = [lm(lm.embed(part), cache=cache)[0] for part in ids.split([18, 1, 1], 1)]
        results.append([logits.detach(), torch.cat(steps, 1), *[p.grad for p in lm.parameters()]])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * one.abs().max().item())


def test_bfloat16_is_near_float32(make_lm, run_lm):
    ids = ids_of(2, 30)
    exact = run_lm(make_lm("M-M*-ME"), ids)
    lm = make_lm("M-M*-ME").to(torch.bfloat16)
    cache = lm.new_cache(2)
    half = run_lm(lm, ids, None, cache)
    assert half.dtype == torch.bfloat16
    assert cache.layers[0].ssm.dtype == torch.float32
    assert (half.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_autocast_trains(make_lm):
    lm = make_lm("M-M*-ME").train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = lm(lm.embed(ids_of(2, 20)))[0]
    F.cross_entropy(logits.float().flatten(0, 1), ids_of(2, 20).flatten()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in lm.parameters())


def test_wrong_shapes_are_named(make_lm, run_lm):
    lm = make_lm("M*")
    with pytest.raises(ValueError, match=r"\(1, 3\), got \(1, 2\)"):
        run_lm(lm, [[1, 2, 3]], [[1, 1]])
    with pytest.raises(ValueError, match=r"seq_idx must be \(B, T\)"):
        run_lm(lm, [[1, 2, 3]], seq_idx=torch.zeros(1, 2))


def test_added_tokens_grow_embedding_and_head(make_lm, run_lm):
    for tied in (False, True):
        lm = make_lm("M*", tie_word_embeddings=tied)
        before = run_lm(lm, [[1, 2, 3]])
        assert lm.add_tokens(["<image>", "<pad>"]) == [262, 256]
        after = run_lm(lm, [[1, 2, 262]])
        assert after.shape == (1, 3, 263)
        torch.testing.assert_close(after[:, :2, :262], before[:, :2], **CLOSE)
        assert (lm.lm_head.weight is lm.embeddings.weight) == tied
        assert lm.config.vocab_size == 263
