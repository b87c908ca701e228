"""Controllers of which prompts are played: rules by hand, and frequencies against the formula."""

import math

import numpy as np
import pytest

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.rl.controllers.base import PassRecord, known_rate
from bestiary.shared.rl.controllers.difficulty_filter import DifficultyFilter
from bestiary.shared.rl.controllers.dynamic_sampling import DynamicSampling
from bestiary.shared.rl.controllers.gaussian_curriculum import GaussianCurriculum

N = 20_000


def share(controller, rate, step=0, example=None):
    """How often a prompt of this pass rate is let in."""
    rng = np.random.default_rng(0)
    record = PassRecord(rate, 1, 0) if rate is not None else PassRecord()
    return sum(controller.admit(step, example or {"id": "a"}, record, rng) for _ in range(N)) / N


def close(p):
    """p within five standard deviations of N draws."""
    return pytest.approx(p, abs=5 * math.sqrt(max(p * (1 - p), 1e-9) / N))


def test_which_rate_is_known():
    profiled = {"id": "a", "meta": {"pass_rate": 0.25}}
    assert known_rate(profiled, PassRecord()) == 0.25
    assert known_rate(profiled, PassRecord(0.0, 1, 0)) == 0.0  # what was seen beats what was said
    assert known_rate({"id": "a"}, PassRecord()) is None
    for nonsense in ("0.5", None, True, math.nan, [1]):
        assert known_rate({"id": "a", "meta": {"pass_rate": nonsense}}, PassRecord()) is None


# ------------------------------------------------------------------ difficulty filter


def test_the_filter_of_cascade():
    for rate in (None, 1 / 16, 0.5, 15 / 16):
        assert share(DifficultyFilter(), rate) == 1.0
    assert share(DifficultyFilter(), 0.0) == close(0.10)
    assert share(DifficultyFilter(), 1.0) == close(0.01)
    assert share(DifficultyFilter(readmit_hard=0, readmit_easy=0), 0.0) == 0.0
    assert share(DifficultyFilter(readmit_hard=0, readmit_easy=0), 1.0) == 0.0


def test_the_band_of_acereason():
    """Solved at most 6 of 16 times is kept, those never solved among them."""
    band = DifficultyFilter(min_rate=0.0, max_rate=0.375, readmit_easy=0.0)
    assert [share(band, n / 16) for n in (0, 1, 6, 7, 16)] == [1.0, 1.0, 1.0, 0.0, 0.0]
    narrow = DifficultyFilter(min_rate=0.25, readmit_hard=0, readmit_easy=0)
    assert [share(narrow, r) for r in (0.0, 0.2, 0.25, 0.9, 1.0)] == [0.0, 0.0, 1.0, 1.0, 0.0]


def test_a_profiled_prompt_is_judged_unseen():
    easy = {"id": "a", "meta": {"pass_rate": 1.0}}
    assert share(DifficultyFilter(readmit_easy=0.0), None, example=easy) == 0.0


def test_an_epoch_by_hand():
    """Four prompts, of which one is solved always and one never: the next epoch has the other two."""
    rates = {"a": 0.0, "b": 0.5, "c": 1.0, "d": None}
    controller = DifficultyFilter(readmit_hard=0.0, readmit_easy=0.0)
    rng = np.random.default_rng(0)
    kept = [n for n, r in rates.items() if controller.admit(9, {"id": n}, PassRecord(r, 1, 0), rng)]
    assert kept == ["b", "d"]
    logged = controller.observe(9, {})
    assert logged == {
        "controller/hard_prompts": 1.0,
        "controller/easy_prompts": 1.0,
        "controller/readmitted_prompts": 0.0,
    }
    assert set(controller.observe(10, {}).values()) == {0.0}


def test_a_filter_that_cannot_be():
    with pytest.raises(ConfigError, match="keeps nothing"):
        DifficultyFilter(min_rate=0.5, max_rate=0.25)
    with pytest.raises(ConfigError, match="readmit_hard is a number from 0 to 1"):
        DifficultyFilter(readmit_hard=10)


# ------------------------------------------------------------------ Gaussian


def test_the_target_falls_linearly():
    curriculum = GaussianCurriculum(100, start=0.8, end=0.2)
    found = [curriculum.target(s) for s in (0, 25, 50, 100, 500)]
    assert found == pytest.approx([0.8, 0.65, 0.5, 0.2, 0.2])
    assert curriculum.observe(50, {}) == {"controller/target_rate": pytest.approx(0.5)}


def test_the_share_is_the_gaussian():
    curriculum = GaussianCurriculum(100, start=0.8, end=0.2, width=0.2, floor=0.02)
    assert share(curriculum, 0.8) == 1.0
    assert share(curriculum, 0.6) == close(0.60653)  # one standard deviation
    assert share(curriculum, 1.0) == close(0.60653)
    assert share(curriculum, 0.4) == close(0.13534)  # two
    assert share(curriculum, 0.0) == close(0.02)  # the floor
    assert share(curriculum, 0.6, step=100) == close(0.13534)
    assert share(curriculum, None) == 1.0
    assert share(curriculum, None, example={"id": "a", "meta": {"pass_rate": 0.4}}) == close(0.13534)


def test_prompts_get_harder():
    """Of a set with all pass rates, the mean of what is played falls as training goes."""
    curriculum = GaussianCurriculum(100, floor=0.0)
    rng = np.random.default_rng(1)
    rates = rng.random(4000)
    means = []
    for step in (0, 50, 100):
        played = [r for r in rates if curriculum.admit(step, {"id": "a"}, PassRecord(r, 1, 0), rng)]
        means.append(float(np.mean(played)))
    assert means[0] > means[1] + 0.1 > means[2] + 0.2


def test_a_curriculum_that_cannot_be():
    with pytest.raises(ConfigError, match="width=0 above 0"):
        GaussianCurriculum(10, width=0)
    with pytest.raises(ConfigError, match="start is a number from 0 to 1"):
        GaussianCurriculum(10, start=6)


# ------------------------------------------------------------------ dynamic sampling


def test_dynamic_sampling_is_a_number():
    assert DynamicSampling(3).rounds == 3
    for wrong in (0, 1.5, True):
        with pytest.raises(ConfigError, match="max_rounds"):
            DynamicSampling(wrong)
