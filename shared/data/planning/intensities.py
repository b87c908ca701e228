"""Foreground intensities of a data set, case by case, so that the work can stop and go on.

nnU-Net draws 10^8 foreground voxels with replacement, as many from each case, and takes their statistics. Here every
foreground voxel is read and every case weighs the same: what those draws converge to, without their noise. A case is
kept as its distinct values with their shares (exact for CT, whose values are whole numbers), or as quantiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DISTINCT = 50_000
"""Distinct values up to which a case is kept exactly."""
QUANTILES = 50_000
"""Points that stand for a case with more distinct values; moments and extremes stay exact."""


@dataclass(frozen=True)
class Intensities:
    """Foreground of one channel of a case: moments, extremes, and ``values`` (rising) with ``shares`` that sum to 1."""

    mean: float
    square: float
    low: float
    high: float
    values: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, voxels: np.ndarray) -> Intensities:
        """From the foreground voxels (n,), n > 0."""
        values, counts = np.unique(voxels, return_counts=True)
        shares = counts / len(voxels)
        exact = values.astype(np.float64)
        mean, square = float(exact @ shares), float(exact**2 @ shares)
        low, high = float(values[0]), float(values[-1])
        if len(values) > DISTINCT:
            at = (np.arange(QUANTILES) + 0.5) / QUANTILES
            exact = exact[np.minimum(np.searchsorted(np.cumsum(shares), at), len(exact) - 1)]
            shares = np.full(QUANTILES, 1 / QUANTILES)
        return cls(mean, square, low, high, exact, shares)

    def to_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Two arrays that a file can hold; :meth:`from_arrays` is the inverse."""
        return np.array([self.mean, self.square, self.low, self.high]), np.stack([self.values, self.shares])

    @classmethod
    def from_arrays(cls, numbers: np.ndarray, table: np.ndarray) -> Intensities:
        """See :meth:`to_arrays`."""
        mean, square, low, high = (float(n) for n in numbers)
        return cls(mean, square, low, high, table[0], table[1])


def statistics(cases: Sequence[Intensities]) -> dict[str, float]:
    """``mean, std, median, min, max, percentile_00_5, percentile_99_5`` over cases of equal weight (one or more)."""
    mean = float(np.mean([case.mean for case in cases]))
    square = float(np.mean([case.square for case in cases]))
    values = np.concatenate([case.values for case in cases])
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(np.concatenate([case.shares for case in cases])[order]) / len(cases)
    places = np.minimum(np.searchsorted(reached, [0.005, 0.5, 0.995]), len(order) - 1)
    lower, median, upper = (float(values[order[i]]) for i in places)
    return {
        "mean": mean,
        "std": max(square - mean**2, 0.0) ** 0.5,
        "median": median,
        "min": min(case.low for case in cases),
        "max": max(case.high for case in cases),
        "percentile_00_5": lower,
        "percentile_99_5": upper,
    }


def ct_scheme(found: dict[str, float]) -> dict[str, float | str]:
    """The normalisation of a CT channel from its statistics."""
    names = {"lower": "percentile_00_5", "upper": "percentile_99_5", "mean": "mean", "std": "std"}
    return {"scheme": "ct", **{key: float(found[name]) for key, name in names.items()}}
