"""A controller whose state went through JSON goes on as the one that was never stopped; all are plain to configure."""

import json

import numpy as np
import pytest

from bestiary.shared.core.build import build
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.rl.controllers.base import PassRecord

PACKAGE = "bestiary.shared.rl.controllers"
NODES = {
    "length_curriculum.LengthCurriculum": {"schedule": [[0, 8], [12, 16]]},
    "temperature_schedule.TemperatureSchedule": {"schedule": [[0, 0.6], [12, 1.0]], "linear": True},
    "stage_switch.StageSwitch": {"lengths": [8, 16, 32], "window": 3, "min_steps": 4},
    "entropy_temperature.EntropyTemperature": {"rate": 0.3},
    "difficulty_filter.DifficultyFilter": {"readmit_hard": 0.5, "readmit_easy": 0.3},
    "gaussian_curriculum.GaussianCurriculum": {"steps": 30},
    "overlong_schedule.OverlongSchedule": {"up_to": 64},
    "dynamic_sampling.DynamicSampling": {"max_rounds": 2},
}


def make(name):
    return build({"_target_": f"{PACKAGE}.{name}", **NODES[name]})


def play(controller, steps):
    """All it says in some steps of a made-up run."""
    said = []
    for step in steps:
        rng = np.random.default_rng([5, step])
        sampling = controller.sampling(step, Sampling(64, temperature=1.0))
        rates = [None, 0.0, 0.25, 1.0] * 3
        admitted = [controller.admit(step, {"id": "a"}, PassRecord(r, 1, 0), rng) for r in rates]
        metrics = {"truncated_share": float(rng.random() * 0.2), "adjusted_entropy": float(rng.random())}
        said.append((sampling, admitted, controller.overlong(step), controller.observe(step, metrics)))
    return said


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("cut", [0, 1, 7, 20])
def test_resumed_equals_unbroken(name, cut):
    unbroken = play(make(name), range(30))
    first, second = make(name), make(name)
    play(first, range(cut))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert play(second, range(cut, 30)) == unbroken[cut:]


def test_the_run_exercises_them():
    """Otherwise the test above says nothing."""
    for name in ("stage_switch.StageSwitch", "entropy_temperature.EntropyTemperature"):
        assert len({s for s, *_ in play(make(name), range(30))}) > 2
    assert len({tuple(a) for _, a, *_ in play(make("difficulty_filter.DifficultyFilter"), range(30))}) > 2
