"""Controllers of length, temperature and the overlong mask: hand-worked sequences and bounds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.rl.controllers.base import Controller
from bestiary.shared.rl.controllers.entropy_temperature import EntropyTemperature
from bestiary.shared.rl.controllers.length_curriculum import LengthCurriculum
from bestiary.shared.rl.controllers.overlong_schedule import OverlongSchedule
from bestiary.shared.rl.controllers.stage_switch import StageSwitch
from bestiary.shared.rl.controllers.temperature_schedule import TemperatureSchedule

START = Sampling(64, temperature=1.0, top_p=0.95, seed=7, stop=("x",))


def test_the_base_changes_nothing():
    controller = Controller()
    assert controller.sampling(5, START) is START
    assert controller.admit(0, {}, None, None) is True  # type: ignore[arg-type]
    assert controller.overlong(0) is None
    assert controller.observe(0, {"reward": 1.0}) == {}
    assert controller.state_dict() == {}


# ------------------------------------------------------------------ schedules


def test_length_by_step():
    curriculum = LengthCurriculum([[0, 8], [10, 16], [30, 24]])
    at = {step: curriculum.sampling(step, START).max_new_tokens for step in (0, 9, 10, 29, 30, 10**9)}
    assert at == {0: 8, 9: 8, 10: 16, 29: 16, 30: 24, 10**9: 24}
    assert curriculum.sampling(0, START) == Sampling(8, temperature=1.0, top_p=0.95, seed=7, stop=("x",))


def test_temperature_by_step():
    steps = TemperatureSchedule([[0, 0.6], [10, 1.0]])
    assert [steps.sampling(s, START).temperature for s in (0, 9, 10, 11)] == [0.6, 0.6, 1.0, 1.0]
    line = TemperatureSchedule([[0, 0.6], [10, 1.0], [20, 0.8]], linear=True)
    found = [line.sampling(s, START).temperature for s in (0, 5, 10, 15, 20, 50)]
    assert found == pytest.approx([0.6, 0.8, 1.0, 0.9, 0.8, 0.8])


@pytest.mark.parametrize(
    "schedule", [[], [[1, 8]], [[0, 8], [0, 9]], [[0, 8], [5, 9], [3, 1]], [8, 16], "0:8", [[0.0, 8]], [[0, 8, 9]]]
)
def test_schedules_that_are_none(schedule):
    with pytest.raises(ConfigError, match="steps rise from 0"):
        LengthCurriculum(schedule)


def test_values_that_cannot_be():
    with pytest.raises(ConfigError, match="whole number of tokens"):
        LengthCurriculum([[0, 0]])
    with pytest.raises(ConfigError, match="whole number of tokens"):
        StageSwitch([8, 1.5])
    with pytest.raises(ConfigError, match="a list like"):
        StageSwitch([])
    with pytest.raises(ConfigError, match="window=0"):
        StageSwitch([8], window=0)
    with pytest.raises(ConfigError, match=r"from 0\.01 to 10"):
        TemperatureSchedule([[0, 0.0]])
    with pytest.raises(ConfigError, match="0 < low <= high"):
        EntropyTemperature(low=0.0)
    with pytest.raises(ConfigError, match="either schedule"):
        OverlongSchedule()
    with pytest.raises(ConfigError, match="either schedule"):
        OverlongSchedule([[0, True]], up_to=8)
    with pytest.raises(ConfigError, match="true or false, not 1"):
        OverlongSchedule([[0, 1]])


# ------------------------------------------------------------------ stage switch


def lengths(switch, shares):
    """The length of each step, and of the one after the last."""
    out = []
    for step, share in enumerate(shares):
        out.append(switch.sampling(step, START).max_new_tokens)
        switch.observe(step, {"truncated_share": share})
    return [*out, switch.sampling(len(shares), START).max_new_tokens]


def test_it_goes_on_when_the_mean_has_fallen():
    switch = StageSwitch([8, 16, 24], share=0.1, window=2, min_steps=3)
    # Means of two: .3, .15, .1 -> on after the fourth step; then an empty window and three steps again.
    assert lengths(switch, [0.4, 0.2, 0.1, 0.1, 0.0, 0.0, 0.0]) == [8, 8, 8, 8, 16, 16, 16, 24]
    assert lengths(switch, [0.0] * 9) == [24] * 10  # the last one stays


def test_one_lucky_step_is_no_reason():
    assert lengths(StageSwitch([8, 16], window=3, min_steps=0), [0.5, 0.0, 0.5, 0.0, 0.5]) == [8] * 6


def test_min_steps():
    assert lengths(StageSwitch([8, 16], window=1, min_steps=4), [0.0] * 4) == [8, 8, 8, 8, 16]


@given(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=60), st.integers(1, 5), st.integers(0, 8))
def test_lengths_never_fall_and_stages_last(shares, window, min_steps):
    found = lengths(StageSwitch([8, 16, 24], window=window, min_steps=min_steps), shares)
    assert found == sorted(found)
    for length in (8, 16):
        if found[-1] > length:
            assert found.count(length) >= max(window, min_steps)


def test_what_it_logs():
    switch = StageSwitch([8, 16], window=2, min_steps=0)
    assert switch.observe(0, {}) == {"controller/length_stage": 0.0}
    assert switch.observe(0, {"truncated_share": 0.1}) == {
        "controller/length_stage": 0.0,
        "controller/truncated_mean": 0.1,
    }
    switch.observe(1, {"truncated_share": 0.1})
    assert switch.observe(2, {"truncated_share": 0.9})["controller/length_stage"] == 1.0


# ------------------------------------------------------------------ entropy


def test_one_step_by_hand():
    controller = EntropyTemperature(target=0.3, rate=0.5, low=0.1, high=10)
    assert controller.sampling(0, START).temperature == pytest.approx(1.0)
    logged = controller.observe(0, {"adjusted_entropy": 0.1})  # exp(.5 * .2)
    assert logged == {"controller/next_temperature": pytest.approx(1.1051709)}
    assert controller.sampling(1, START).temperature == pytest.approx(1.1051709)
    controller.observe(1, {"adjusted_entropy": 0.5})
    assert controller.sampling(2, START).temperature == pytest.approx(1.0)


def test_it_finds_the_temperature_of_a_known_policy():
    """Entropy of two tokens whose logits differ by 3, as a function of T; it rises with T."""

    def entropy(t):
        p = 1 / (1 + math.exp(-3 / t))
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    controller = EntropyTemperature(target=0.3, rate=0.2, low=0.3, high=3)
    for step in range(300):
        t = controller.sampling(step, START).temperature
        controller.observe(step, {"adjusted_entropy": entropy(t)})
    assert entropy(controller.sampling(300, START).temperature) == pytest.approx(0.3, abs=1e-3)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30))
def test_bounds_hold_whatever_the_entropy(entropies):
    controller = EntropyTemperature(low=0.6, high=1.2)
    for step, value in enumerate(entropies):
        assert 0.6 - 1e-9 <= controller.sampling(step, START).temperature <= 1.2 + 1e-9
        controller.observe(step, {"adjusted_entropy": value})
    assert 0.6 - 1e-9 <= controller.sampling(99, START).temperature <= 1.2 + 1e-9


def test_an_unknown_entropy_moves_nothing():
    controller = EntropyTemperature()
    controller.sampling(0, START)
    controller.observe(0, {})
    controller.observe(0, {"adjusted_entropy": math.nan})
    assert controller.sampling(1, START).temperature == pytest.approx(1.0)


# ------------------------------------------------------------------ overlong


def test_overlong_by_step():
    schedule = OverlongSchedule([[0, True], [5, False], [9, True]])
    assert [schedule.overlong(s) for s in (0, 4, 5, 8, 9, 100)] == [True, True, False, False, True, True]


def test_overlong_by_length():
    """Behind a stage switch it follows the length: on at 8 and 16, off at 32."""
    switch, overlong = StageSwitch([8, 16, 32], window=1, min_steps=0), OverlongSchedule(up_to=16)
    assert overlong.overlong(0) is None
    said = []
    for step in range(4):
        overlong.sampling(step, switch.sampling(step, START))
        said.append(overlong.overlong(step))
        switch.observe(step, {"truncated_share": 0.0})
    assert said == [True, True, False, False]
