"""Pass rates of prompts: by hand, capped, and through JSON."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from bestiary.shared.rl.controllers.base import PassRecord
from bestiary.shared.rl.controllers.pass_rates import PassRates


def test_by_hand():
    rates = PassRates()
    assert rates.get("a") == PassRecord(None, 0, 0)
    rates.update(["a", "b"], [0.25, 1.0], step=3)
    rates.update(["a"], [0.75], step=9)
    assert rates.get("a") == PassRecord(0.75, 2, 9)
    assert rates.get("b") == PassRecord(1.0, 1, 3)


def test_a_prompt_that_comes_twice_in_a_step():
    rates = PassRates()
    rates.update(["a", "b", "a"], [0.0, 0.5, 1.0])
    assert rates.get("a") == PassRecord(0.5, 2, 0)


def test_nothing_scored_is_no_news():
    rates = PassRates()
    rates.update(["a", "b"], [0.5, math.nan])
    rates.update(["a"], [math.nan])
    assert rates.get("a") == PassRecord(0.5, 1, 0)
    assert rates.get("b") == PassRecord()
    assert len(rates) == 1


def test_the_longest_unplayed_is_forgotten_first():
    rates = PassRates(capacity=2)
    rates.update(["a", "b"], [0.1, 0.2])
    rates.update(["a"], [0.3])
    rates.update(["c"], [0.4])
    assert [rates.get(n).rate for n in "abc"] == [0.3, None, 0.4]
    assert len(rates) == 2


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 1) | st.just(math.nan)), max_size=40), st.integers(0, 40)
)
def test_resumed_equals_unbroken(updates, cut):
    """Through JSON, and the order of forgetting with it."""
    unbroken, resumed = PassRates(capacity=3), PassRates(capacity=3)
    for at, (name, rate) in enumerate(updates):
        if at == cut:
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = PassRates(capacity=3)
            resumed.load_state_dict(state)
        for rates in (unbroken, resumed):
            rates.update([name], [rate], at)
    assert resumed.state_dict() == unbroken.state_dict()
    assert list(resumed.state_dict()["records"]) == list(unbroken.state_dict()["records"])
    assert all(0 <= unbroken.get(n).rate <= 1 for n in unbroken.state_dict()["records"])
