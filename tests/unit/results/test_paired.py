"""The paired bootstrap: known differences, its coverage, and the number of seeds it asks for."""

import math

import numpy as np
import pytest

from bestiary.shared.core.errors import UserError
from bestiary.shared.results.paired import over_seeds, paired_bootstrap


def test_a_constant_difference_is_certain():
    base = np.random.default_rng(0).random((3, 20))
    found = paired_bootstrap(base + 0.02, base, resamples=200)
    assert (found.mean, found.low, found.high) == pytest.approx((0.02, 0.02, 0.02))
    assert (found.better, found.worse, found.seeds) == (20, 0, 3)
    assert found.seed_std == pytest.approx(0, abs=1e-12)
    assert found.seeds_needed == 2
    assert not found.within_noise


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    # 20 seeds: with so many the percentile interval is nearly calibrated.
    rng, held = np.random.default_rng(1), 0
    for _ in range(100):
        seeds, structures = 0.02 * rng.standard_normal((20, 1)), 0.03 * rng.standard_normal((1, 30))
        noise = 0.02 * rng.standard_normal((20, 30))
        found = paired_bootstrap(0.5 + 0.01 + seeds + structures + noise, np.full((20, 30), 0.5), resamples=300)
        held += found.low <= 0.01 <= found.high
    assert 88 <= held <= 99


def test_seeds_are_drawn_too():
    # Structures agree, seeds do not: only drawing seeds widens the interval, to the extremes of their means.
    found = paired_bootstrap([[0.01] * 30, [0.02] * 30, [0.06] * 30], np.zeros((3, 30)), resamples=2000)
    assert (found.low, found.high) == pytest.approx((0.01, 0.06), abs=0.004)
    # Student's t: mean 0.03, s = 0.02646, 4.303 s / sqrt(3) = 0.0657.
    assert (found.seed_low, found.seed_high) == pytest.approx((0.03 - 0.06573, 0.03 + 0.06573), abs=1e-4)
    assert found.within_noise


def test_structures_are_drawn_too():
    rng = np.random.default_rng(0)
    one = np.repeat(rng.normal(0, 0.1, (1, 40)), 3, axis=0)
    found = paired_bootstrap(one, np.zeros((3, 40)))
    half = 1.96 * one[0].std() / np.sqrt(40)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_seeds_needed_is_the_textbook_number():
    # Means over structures 0.00 and 0.02: mean 0.01, s = 0.01414. (2.8016 * 1.414)^2 + 1.96^2 / 2 = 17.6; power at 18
    # seeds by the noncentral t distribution: 0.807, at 17 0.781.
    found = paired_bootstrap([[0.0, 0.0], [0.02, 0.02]], np.zeros((2, 2)), resamples=50)
    assert found.seed_std == pytest.approx(0.02 / math.sqrt(2))
    assert found.seeds_needed == 18


def test_a_mean_over_seeds():
    mean, reach, std = over_seeds([0.01, 0.02, 0.06])
    assert (mean, reach, std) == pytest.approx((0.03, 4.303 * 0.0264575 / math.sqrt(3), 0.0264575), rel=1e-4)
    one = over_seeds([0.01])
    assert (one.mean, one.reach, math.isnan(one.std)) == (0.01, math.inf, True)


def test_structures_without_a_value_are_left_out():
    nan = float("nan")
    found = paired_bootstrap([[0.5, nan, 0.7]], [[0.4, nan, nan]], resamples=50)
    assert found.mean == pytest.approx(0.1)
    assert found.seeds_needed is None
    assert (found.seed_low, found.seed_high) == (-math.inf, math.inf)
    assert paired_bootstrap(np.zeros((3, 4)), np.zeros((3, 4)), resamples=50).seeds_needed is None
    assert math.isnan(found.seed_std)


def test_what_cannot_be_paired():
    for one, other in (([[1.0]], [[1.0, 2.0]]), ([], []), ([[float("nan")]], [[1.0]])):
        with pytest.raises(UserError):
            paired_bootstrap(one, other)
