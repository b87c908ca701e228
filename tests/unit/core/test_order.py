"""The order of data: sample k is a pure function of (seed, stage, k), whoever asks."""

import numpy as np
import pytest
import torch

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.loader import Blend, RankSteps, StreamDataset, train_loader
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream, derive_seed


class Numbers:
    """Sample k says k and a draw of its own."""

    revision = "1"

    def __init__(self, name="numbers"):
        self.name = name

    def spec(self):
        return DataSpec(task="text")

    def check(self):
        pass

    def train_example(self, k, stream, part=None):
        return {"id": f"{self.name}/{part}/{k}", "text": f"{stream.rng(k).random():.12f} {stream.stage}"}

    def held_out(self, split, part=None):
        return [{"id": f"{self.name}/{part}/{split}", "text": "x"}]


class Collect:
    def __call__(self, examples, mode):
        assert mode == "train"
        return {"ids": [e["id"] for e in examples], "text": [e["text"] for e in examples]}


def load(sampler, workers=0, source=None, seed=0, **options):
    dataset = StreamDataset(source or Numbers(), Stream(seed, "s", sampler.global_batch), **options)
    return list(train_loader(dataset, sampler, Collect(), workers))


def test_rng_depends_on_seed_stage_purpose_and_k_alone():
    stream = Stream(3, "text", 8)
    draws = [stream.rng(k).random() for k in range(20)]
    assert [Stream(3, "text", 64).rng(k).random() for k in reversed(range(20))] == draws[::-1]
    others = [Stream(4, "text"), Stream(3, "chat")]
    assert all(o.rng(k).random() != draws[k] for o in others for k in range(20))
    assert stream.rng(5, "flip").random() != draws[5]
    assert len(set(draws)) == 20
    # Independent uniforms: their mean over many k is a half.
    assert abs(np.mean([stream.rng(k).random() for k in range(4000)]) - 0.5) < 4 * 0.2887 / 4000**0.5


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_each_round_visits_each_item_once(n):
    stream = Stream(0, "s")
    rounds = [[stream.shuffled(k, n) for k in range(r * n, (r + 1) * n)] for r in range(6)]
    assert all(sorted(r) == list(range(n)) for r in rounds)
    assert [stream.shuffled(k, n) for k in range(3 * n)] == [*rounds[0], *rounds[1], *rounds[2]]
    if n == 100:
        assert len({tuple(r) for r in rounds}) == 6
        assert [Stream(1, "s").shuffled(k, n) for k in range(n)] != rounds[0]
        assert [Stream(0, "t").shuffled(k, n) for k in range(n)] != rounds[0]


def test_an_empty_set_has_no_samples():
    with pytest.raises(ValueError, match="empty"):
        Stream(0, "s").shuffled(0, 0)


def test_derived_seeds_fit_torch_and_are_stable():
    seeds = {derive_seed(0, "noise", step, rank) for step in range(100) for rank in range(4)}
    assert len(seeds) == 400
    assert all(0 <= s < 2**63 for s in seeds)
    torch.manual_seed(max(seeds))
    # SeedSequence is specified by NumPy to give the same words everywhere and for ever.
    state = np.random.SeedSequence([1, 2]).generate_state(2, np.uint32)
    assert derive_seed(1, 2) == (int(state[0]) | int(state[1]) << 32) >> 1


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_step_between_them(world):
    one = list(RankSteps(5, 8))
    ranks = [list(RankSteps(5, 8, rank, world)) for rank in range(world)]
    for step in range(5):
        assert [k for r in ranks for k in r[step]] == one[step] == list(range(8 * step, 8 * step + 8))


def test_a_batch_that_cannot_be_divided():
    with pytest.raises(ConfigError, match="batch_size 6 cannot be divided over 4"):
        RankSteps(1, 6, 0, 4)


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_a_start_in_the_middle_is_the_tail(start):
    assert load(RankSteps(5, 4, start=start)) == load(RankSteps(5, 4))[start:]


def test_workers_do_not_change_the_order():
    assert load(RankSteps(9, 4, start=2), workers=2) == load(RankSteps(9, 4, start=2))


def test_a_repeated_batch():
    steps = load(RankSteps(3, 4), repeat=4)
    assert steps[0] == steps[1] == steps[2]


def blend(weights=(3, 1)):
    return Blend([(Numbers("a"), "x", weights[0]), (Numbers("b"), None, weights[1])])


def test_a_blend_keeps_its_proportions():
    stream, n = Stream(0, "s"), 4000
    names = [blend().train_example(k, stream)["id"].split("/")[0] for k in range(n)]
    share = names.count("a") / n
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / n) ** 0.5
    # Drawn one by one, not in blocks: a run of one source is as short as chance makes it.
    assert max(len(run) for run in "".join(names).split("a")) < 10


def test_a_blend_is_pure():
    stream = Stream(0, "s")
    forth = [blend().train_example(k, stream) for k in range(50)]
    back = [blend().train_example(k, stream) for k in reversed(range(50))][::-1]
    assert forth == back
    assert load(RankSteps(6, 4), workers=2, source=blend()) == load(RankSteps(6, 4), source=blend())
    # The same source twice gives different samples, each of its own part.
    twice = Blend([(Numbers(), "x", 1), (Numbers(), "x", 1)])
    assert {twice.train_example(k, stream)["text"].split()[1] for k in range(20)} == {"s/0", "s/1"}
    parts = {e["id"].rsplit("/", 1)[0] for e in forth}
    assert parts == {"a/x", "b/None"}


def test_scaled_weights_are_the_same_blend():
    stream = Stream(0, "s")
    assert [blend((6, 2)).train_example(k, stream) for k in range(50)] == [
        blend((3, 1)).train_example(k, stream) for k in range(50)
    ]


def test_a_blend_needs_positive_weights():
    for entries in ([], [(Numbers(), None, 0)], [(Numbers(), None, -1), (Numbers(), None, 2)]):
        with pytest.raises(ConfigError, match="positive"):
            Blend(entries)


def test_held_out_of_a_blend():
    assert [e["id"] for e in blend().held_out("val")] == ["a/x/val", "b/None/val"]
