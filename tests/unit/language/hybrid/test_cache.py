"""The cache: copies, rows, going back, files, and stochastic rounding."""

import pytest
import torch

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.protocols import Cache, LanguageBackbone
from bestiary.shared.language.hybrid.cache import round_stochastically

PATTERN = "M-M*-ME"
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def ids_of(rows, length, seed=1):
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def filled(make_lm, run_lm):
    lm, ids = make_lm(PATTERN), ids_of(3, 12)
    cache = lm.new_cache(3)
    run_lm(lm, ids, None, cache)
    return lm, ids, cache


def tensors(cache):
    return [t for layer in cache.layers if layer for t in layer.tensors().values()]


def test_it_fits_the_protocols(filled):
    lm, _, cache = filled
    assert isinstance(lm, LanguageBackbone)
    assert isinstance(cache, Cache)


def test_a_clone_shares_nothing(filled, run_lm):
    lm, ids, cache = filled
    before = [t.clone() for t in tensors(cache)]
    copy = cache.clone()
    for step in range(3):
        run_lm(lm, ids_of(3, 1, step), None, copy)
    assert (cache.length, copy.length) == (12, 15)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(cache), strict=True))
    # the original goes on from where it was
    row = torch.cat([ids, ids_of(3, 1, 0)], 1)
    torch.testing.assert_close(run_lm(lm, ids_of(3, 1, 0), None, cache), run_lm(lm, row)[:, -1:], **CLOSE)


@pytest.mark.parametrize("rows", [[2], [2, 0], [1, 1, 0, 2, 1], []])
def test_selected_rows_go_on_as_before(filled, run_lm, rows):
    lm, ids, cache = filled
    new = ids_of(3, 2, 5)
    cache.select(torch.tensor(rows, dtype=torch.long))
    assert all(len(t) == len(rows) for t in tensors(cache))
    if rows:
        got = torch.cat([run_lm(lm, new[rows, t : t + 1], None, cache) for t in (0, 1)], 1)
        expected = run_lm(lm, torch.cat([ids, new], 1))[rows, 12:]
        torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize(("chunk", "back"), [(1, 1), (2, 1), (2, 2), (6, 1), (6, 2), (6, 6)])
def test_going_back_over_a_recorded_chunk(filled, run_lm, chunk, back):
    lm, ids, cache = filled
    cache.record = True
    new, other = ids_of(3, chunk, 6), ids_of(3, 3, 7)
    run_lm(lm, new, None, cache)
    cache.truncate(12 + chunk - back)
    assert cache.length == 12 + chunk - back
    got = [run_lm(lm, other[:, :1], None, cache), run_lm(lm, other[:, 1:], None, cache)]
    row = torch.cat([ids, new[:, : chunk - back], other], 1)
    torch.testing.assert_close(torch.cat(got, 1), run_lm(lm, row)[:, -3:], **CLOSE)


def test_rows_may_keep_different_numbers_of_tokens(filled, run_lm):
    """The forgotten tokens stay as columns of padding; a left-padded past and a padded chunk on top."""
    lm, ids, _ = filled
    past = torch.ones(3, 12, dtype=torch.long)
    past[0, :5] = 0
    cache = lm.new_cache(3)
    run_lm(lm, ids, past, cache)
    cache.record = True
    new, chunk = ids_of(3, 4, 8), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    run_lm(lm, new, torch.cat([past, chunk], 1), cache)
    counts = torch.tensor([3, 0, 4])
    cache.keep(counts)
    kept = chunk * (torch.arange(4) < counts[:, None])
    last = ids_of(3, 1, 9)
    mask = torch.cat([past, kept, torch.ones(3, 1, dtype=torch.long)], 1)
    got = run_lm(lm, last, mask, cache)
    for row in range(3):
        real = torch.cat([ids[row], new[row], last[row]])[mask[row].bool()]
        torch.testing.assert_close(got[row, 0], run_lm(lm, real[None])[0, -1], **CLOSE)


def test_it_cannot_go_back_over_what_was_not_recorded(filled, run_lm, make_lm):
    lm, _, cache = filled
    with pytest.raises(ValueError, match=r"cache.record was True"):
        cache.truncate(11)
    cache.record = True
    run_lm(lm, ids_of(3, 2), None, cache)
    with pytest.raises(ValueError, match="cannot go back to 11 tokens"):
        cache.truncate(11)
    with pytest.raises(ValueError, match="cannot truncate 14 tokens to 15"):
        cache.truncate(15)
    assert cache.length == 14
    cache.truncate(14)
    cache.record = False
    run_lm(lm, ids_of(3, 1), None, cache)  # a step that was not recorded, behind a pass that was
    with pytest.raises(ValueError, match="cannot go back to 14 tokens"):
        cache.truncate(14)
    attention = make_lm("*-")
    free = attention.new_cache(3)
    run_lm(attention, ids_of(3, 9), None, free)
    free.truncate(4)  # keys and values can always be cut
    torch.testing.assert_close(
        run_lm(attention, ids_of(3, 9)[:, 4:], None, free), run_lm(attention, ids_of(3, 9))[:, 4:], **CLOSE
    )


def test_saved_and_loaded(filled, run_lm, make_lm, tmp_path):
    lm, _, cache = filled
    cache.save(tmp_path / "cache.safetensors")
    again = lm.load_cache(tmp_path / "cache.safetensors")
    assert (again.length, again.record, again.seed) == (12, False, 0)
    assert all(torch.equal(a, b) for a, b in zip(tensors(cache), tensors(again), strict=True))
    new = ids_of(3, 1, 4)
    assert torch.equal(run_lm(lm, new, None, again), run_lm(lm, new, None, cache))
    half = make_lm(PATTERN, backbone={"state_dtype": "float16"})
    for other in (
        half,
        make_lm(PATTERN).to(torch.bfloat16),
        make_lm("M-M*-M"),
        make_lm(PATTERN, ssm_state_size=16),
        make_lm(PATTERN, head_dim=16),
    ):
        with pytest.raises(BadDataError, match="model"):
            other.load_cache(tmp_path / "cache.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadDataError, match="cannot be read as a cache"):
        lm.load_cache(tmp_path / "no.safetensors")


def test_sizes(filled):
    _, _, cache = filled
    # by hand: three Mamba layers of (3, 8, 4, 8) and (3, 3, 64), one attention layer of 2 x (3, 2, 12, 8), float32
    assert cache.bytes() == {"states": 3 * 4 * (3 * 256 + 3 * 192), "key_values": 2 * 4 * 3 * 2 * 12 * 8}


def test_keys_grow_without_a_copy_each_step(filled, run_lm):
    lm, _, cache = filled
    addresses = set()
    for step in range(40):
        run_lm(lm, ids_of(3, 1, step), None, cache)
        addresses.add(cache.layers[3].key.data_ptr())
    assert len(addresses) <= 4


# ------------------------------------------------------------------ float16 states


def test_rounding_is_right_on_average_and_to_a_neighbour():
    x = torch.cat([torch.tensor([1.0003, -1.0003, 0.1, 3e-6, -2.5e-8, 1e-9, 1000.3, 0.0, 2.0, 65504.0])])
    draws = torch.stack([round_stochastically(x, torch.Generator().manual_seed(seed)).double() for seed in range(4000)])
    half = x.half()
    above = torch.nextafter(half, torch.tensor(torch.inf, dtype=torch.float16))
    below = torch.nextafter(half, torch.tensor(-torch.inf, dtype=torch.float16))
    for column in range(len(x)):
        allowed = {v[column].item() for v in (half.double(), above.double(), below.double())}
        assert set(draws[:, column].tolist()) <= allowed
    step = (above.double() - below.double()).clamp(max=64) / 2
    error = (draws.mean(0) - x.double()).abs()
    assert (error <= 4 * step * 0.5 / 4000**0.5 + 1e-12).all(), error
    assert (draws[:, 7] == 0).all()
    assert (draws[:, 8] == 2).all()  # what float16 can hold stays as it is
    assert round_stochastically(torch.tensor([1e9, -1e9]), None).tolist() == [65504, -65504]


def test_half_states_are_near_and_kept_in_half(make_lm, run_lm):
    ids = ids_of(2, 60)
    exact, half = make_lm("M-M*-"), make_lm("M-M*-", backbone={"state_dtype": "float16"})
    cache = half.new_cache(2)
    got = [run_lm(half, ids[:, :20], None, cache)]
    got += [run_lm(half, ids[:, t : t + 1], None, cache) for t in range(20, 60)]
    assert {layer.ssm.dtype for layer in cache.layers if hasattr(layer, "ssm")} == {torch.float16}
    expected = run_lm(exact, ids)
    error = (torch.cat(got, 1) - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.02
    again = half.new_cache(2)
    repeat = [run_lm(half, ids[:, :20], None, again)]
    repeat += [run_lm(half, ids[:, t : t + 1], None, again) for t in range(20, 60)]
    assert torch.equal(torch.cat(got, 1), torch.cat(repeat, 1))


def test_going_back_rounds_stochastically_too(make_lm, run_lm):
    lm = make_lm("M", backbone={"state_dtype": "float16"})
    states = []
    for seed in range(8):
        cache = lm.new_cache(1)
        cache.record, cache.seed = True, seed
        run_lm(lm, ids_of(1, 9), None, cache)
        cache.truncate(7)
        states.append(cache.layers[0].ssm.clone())
    assert len({s.numpy().tobytes() for s in states}) == 8


def test_small_updates_survive_stochastic_rounding_alone():
    """1 + many updates of 1e-4: nearest rounding never moves, the stochastic mean does."""
    nearest = torch.ones(256, dtype=torch.float16)
    state = nearest.clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        nearest = (nearest.float() + 1e-4).half()
        state = round_stochastically(state.float() + 1e-4, generator)
    assert (nearest == 1).all()
    assert state.float().mean().item() == pytest.approx(1.05, abs=0.003)


def test_unknown_state_dtype(make_lm):
    with pytest.raises(ConfigError, match="float32 or float16"):
        make_lm("M", backbone={"state_dtype": "int8"})
