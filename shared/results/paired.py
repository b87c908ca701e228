"""Two rows compared structure by structure and seed by seed: the difference, how sure it is, and what it would take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bestiary.shared.core.errors import UserError

RESAMPLES = 10_000
_Z = 1.959964 + 0.841621
"""Two-sided 5 % and 80 % power, for the number of seeds."""
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""The 97.5 % point of Student's t with 1 to 10 degrees of freedom."""


class OverSeeds(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: of the seeds' values.
        reach: half of Student's 95 % interval about it; infinite with one seed.
        std: sample standard deviation; NaN with one seed.
    """

    mean: float
    reach: float
    std: float


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """The mean of one value a seed, and how far it can be trusted."""
    n, array = len(values), np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if n < 2:
        return OverSeeds(mean, math.inf, math.nan)
    std = float(array.std(ddof=1))
    return OverSeeds(mean, _t(n - 1) * std / math.sqrt(n), std)


@dataclass(frozen=True)
class Difference:
    """One row minus another.

    Attributes:
        mean: over seeds and structures.
        low: lower end of the 95 % interval of the bootstrap.
        high: upper end.
        seed_low: lower end of the 95 % interval of Student's t over the seeds' means; minus infinity with one seed.
        seed_high: upper end.
        seed_std: sample standard deviation over seeds of the mean over structures; NaN with one seed.
        better: structures whose mean over seeds is larger.
        worse: structures whose mean over seeds is smaller.
        seeds: how many seeds stand behind it.
        seeds_needed: seeds at which a difference of this size would be told from none in four of five repetitions, by
            the spread over seeds alone; None with one seed, or where there is no difference.
    """

    mean: float
    low: float
    high: float
    seed_low: float
    seed_high: float
    seed_std: float
    better: int
    worse: int
    seeds: int
    seeds_needed: int | None

    @property
    def within_noise(self) -> bool:
        """Whether one of the two intervals holds 0: the bootstrap's alone is too narrow with few seeds."""
        return self.low <= 0 <= self.high or self.seed_low <= 0 <= self.seed_high


def paired_bootstrap(
    one: Sequence[Sequence[float]], other: Sequence[Sequence[float]], resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Compare two rows that were run with the same seeds and scored on the same structures.

    Differences are taken within a seed and a structure. The interval is the percentile bootstrap over both: seeds are
    drawn with replacement, and structures too, the same ones for every seed. With few seeds it is too narrow (three can
    be drawn in ten ways), so Student's t over the seeds' means stands beside it. Structures that a seed does not define
    (NaN) are left out for that seed.

    Args:
        one: (seeds, structures).
        other: the same.
        resamples: how often to draw.
        seed: of the drawing.

    Raises:
        UserError: if the shapes differ or nothing can be compared.
    """
    a, b = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 2 or not a.size:
        raise UserError(f"rows of {a.shape} and {b.shape} (seeds, structures) cannot be paired")
    difference = a - b
    difference = difference[:, ~np.isnan(difference).all(axis=0)]
    if not difference.size or np.isnan(difference).all(axis=1).any():
        raise UserError("a seed has no structure that both rows define")
    seeds, structures = difference.shape
    per_seed = np.nanmean(difference, axis=1)
    per_structure = np.nanmean(difference, axis=0)
    rng = np.random.default_rng(seed)
    # How often each seed and each structure is drawn; a mean over a sample is then a weighted one.
    seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    structure_counts = rng.multinomial(structures, np.full(structures, 1 / structures), size=resamples)
    defined = ~np.isnan(difference)
    total = ((seed_counts @ np.where(defined, difference, 0)) * structure_counts).sum(1)
    with np.errstate(invalid="ignore"):
        drawn = total / ((seed_counts @ defined) * structure_counts).sum(1)
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    mean, reach, spread = over_seeds(per_seed)
    return Difference(
        mean=mean,
        low=float(low),
        high=float(high),
        seed_low=mean - reach,
        seed_high=mean + reach,
        seed_std=spread,
        better=int((per_structure > 0).sum()),
        worse=int((per_structure < 0).sum()),
        seeds=seeds,
        seeds_needed=_seeds_needed(mean, spread),
    )


def _t(freedom: int) -> float:
    return _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.5 / freedom


def _seeds_needed(mean: float, spread: float) -> int | None:
    """Seeds for 80 % power at 5 %: the normal approximation, and Guenther's addition for the t test; at least 2."""
    if math.isnan(spread) or mean == 0:
        return None
    return max(2, math.ceil((_Z * spread / abs(mean)) ** 2 + 1.959964**2 / 2))
