"""A blend whose weights change at given steps of a stage."""

import numpy as np
import pytest

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.loader import Blend, RankSteps, StreamDataset, check_phases, phase_starts, train_loader
from bestiary.shared.core.recipe import Stage
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream

STREAM = Stream(0, "pretrain", 8)


class Named:
    """Every sample says whose it is."""

    revision = "1"

    def __init__(self, name):
        self.name = name

    def spec(self):
        return DataSpec(task="text")

    def check(self):
        pass

    def train_example(self, k, stream, part=None):
        return {"id": f"{self.name}/{k}", "text": f"{stream.stage} {stream.rng(k).random()}"}

    def held_out(self, split, part=None):
        return []


def blend(a, b, starts=()):
    return Blend([(Named("a"), None, a), (Named("b"), None, b)], starts)


def names(source, ks):
    return [source.train_example(k, STREAM)["id"][0] for k in ks]


def test_the_phase_follows_the_step():
    """Steps 0-5, 6-7 and 8-9 of ten steps of eight samples."""
    source = blend([1, 0, 1], [0, 1, 3], phase_starts([0.6, 0.8], 10))
    assert source.starts == [6, 8]
    assert [source.phase(k, STREAM) for k in range(80)] == [0] * 48 + [1] * 16 + [2] * 16
    assert set(names(source, range(48))) == {"a"}
    assert set(names(source, range(48, 64))) == {"b"}
    share = names(source, range(64, 4064)).count("b") / 4000  # the last phase goes on
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5


def test_all_ranks_of_a_step_are_in_one_phase():
    source = blend([1, 0], [0, 1], [3])
    for step, phase in ((2, 0), (3, 1)):
        for rank in range(4):
            ks = list(RankSteps(10, 8, rank, 4))[step]
            assert {source.phase(k, STREAM) for k in ks} == {phase}


class Collect:
    def __call__(self, examples, mode):
        return [(e["id"], e["text"]) for e in examples]


def test_a_resumed_run_draws_what_the_unbroken_one_draws():
    def load(start, workers=0):
        data = StreamDataset(blend([3, 1, 0], [1, 1, 1], [4, 7]), STREAM)
        return list(train_loader(data, RankSteps(10, 8, start=start), Collect(), workers))

    whole = load(0)
    assert load(5) == whole[5:]
    assert load(7, workers=2) == whole[7:]


def test_a_number_holds_in_every_phase():
    assert names(blend(3, 1, [2, 5]), range(200)) == names(blend([3, 3, 3], [1, 1, 1], [2, 5]), range(200))
    assert names(blend(3, 1, [2, 5]), range(200)) == names(blend(3, 1), range(200))


def test_starts_are_shares_of_the_steps():
    assert phase_starts([0.6, 0.8], 2_384_186) == [round(0.6 * 2_384_186), round(0.8 * 2_384_186)]
    assert phase_starts([], 10) == []
    for steps in range(1, 40):
        starts = phase_starts([0.25, 0.5], steps)
        assert np.all(np.abs(np.array(starts) - np.array([0.25, 0.5]) * steps) <= 0.5)


def stage(**values):
    node = {"objective": {}, "optim": {}, "steps": 10, "batch_size": 2, **values}
    return Stage.read("pretrain", node)


@pytest.mark.parametrize(
    ("blend", "phases", "words"),
    [
        ({"a": {"weight": [1, 2]}}, [0.6, 0.8], "entry a has 2 weights and there are 3 phases"),
        ({"a": {"weight": [1, 2]}}, None, "entry a has 2 weights and there are 1 phases"),
        ({"a": {"weight": [1, 0]}, "b": {"weight": [1, 0]}}, [0.5], "in each phase"),
        ({"a": {"weight": [1, 1]}, "b": {"weight": [0, 0]}}, [0.5], "positive weights"),
        ({"a": {"weight": [1, -1]}, "b": None}, [0.5], "entry a needs positive weights"),
        ({"a": {"weight": "3"}}, None, "entry a needs positive weights"),
        ({"a": {"weight": None}}, None, "entry a needs positive weights"),
        ({"a": {"weight": [1, 2]}}, [0.0], r"a rising list of shares between 0 and 1, like \[0.6, 0.8\], not \[0.0\]"),
        ({"a": {}}, [0.8, 0.6], "a rising list"),
        ({"a": {}}, [0.5, 1.0], "a rising list"),
        ({"a": {}}, [60, 80], "a rising list"),
        ({"a": {}}, ["0.5"], "a rising list"),
        ({"a": {}}, 0.5, "a rising list"),
        (None, [0.5], "phases needs a blend"),
    ],
)
def test_what_does_not_fit_is_said_before_the_run(blend, phases, words):
    with pytest.raises(ConfigError, match=r"recipe\.stages\.pretrain.*" + words):
        stage(blend=blend, phases=phases)


def test_what_fits():
    check_phases("x", None, None)
    assert stage(blend={"a": {"weight": [1, 0]}, "b": {"weight": 2}, "c": {}}, phases=[0.5]).phases == [0.5]
    assert stage().phases is None


def test_an_entry_that_is_null_is_left_out():
    assert stage(blend={"a": {"weight": 2}, "b": None}).blend == {"a": {"weight": 2}}
