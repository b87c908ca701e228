"""The fingerprint of a data set: voxel sizes, sizes after cropping and foreground intensities of its cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bestiary.shared.data import preprocess as pre
from bestiary.shared.data.planning.cases import CaseRecord
from bestiary.shared.data.planning.intensities import ct_scheme, statistics

MASKED_BELOW = 0.75
"""Where cropping leaves less than this of the median case, nnU-Net takes z-scores over what is not zero alone."""
FLAT = 999
"""2D images stand for one slice so many times as thick as a pixel is wide, as in nnU-Net."""


@dataclass(frozen=True)
class Fingerprint:
    """What the planner sees of a data set.

    Attributes:
        axes: codes of the file's axes that everything below is given in; those of the first case.
        spacings: mm of each case, (z, y, x), FLAT times the pixel along the first axis for 2D data.
        shapes: voxels of each case after cropping.
        kept: share that cropping leaves of the median case.
        foreground: statistics of each channel; empty where no case has foreground.
    """

    axes: str
    spacings: tuple[tuple[float, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    kept: float
    foreground: tuple[dict[str, float], ...]


def fingerprint(records: Mapping[str, CaseRecord], dims: int) -> Fingerprint:
    """Join the records of all training cases (one or more)."""
    cases = [records[case] for case in sorted(records)]
    axes = cases[0].axes
    spacings = [_turned(case.spacing, case.axes, axes) for case in cases]
    shapes = [_turned(case.shape, case.axes, axes) for case in cases]
    if dims == 2:
        spacings = [(FLAT * max(spacing), *spacing) for spacing in spacings]
        shapes = [(1, *shape) for shape in shapes]
    filled = [case.foreground for case in cases if case.foreground]
    foreground = tuple(statistics(channel) for channel in zip(*filled, strict=True))
    kept = float(np.median([case.kept for case in cases]))
    return Fingerprint(axes, tuple(spacings), tuple(shapes), kept, foreground)  # type: ignore[arg-type]


def _turned(values: Sequence[float], have: str, want: str) -> tuple[float, ...]:
    """Numbers of the array axes (z, y, x) of a volume that lies as ``have``, for one that lies as ``want``."""
    planes = [next(i for i, pair in enumerate(("LR", "PA", "IS")) if code in pair) for code in have[::-1]]
    wanted = [next(i for i, pair in enumerate(("LR", "PA", "IS")) if code in pair) for code in want[::-1]]
    if sorted(planes) != sorted(wanted):  # 2D images of different planes stay as they lie
        return tuple(values)
    return tuple(values[planes.index(plane)] for plane in wanted)


def normalizations(channel_names: Sequence[str], found: Fingerprint) -> tuple[pre.Normalization, ...]:
    """What nnU-Net does to each channel, by its name in dataset.json.

    ``CT`` is clipped and scaled by the foreground's statistics, ``noNorm`` left, ``rescale_to_0_1`` and ``rgb_to_0_1``
    are what they say, and all others are z-scored: over the non-zero part where cropping takes much away, else over
    the whole.

    Raises:
        IndexError: for CT where no case has foreground.
    """
    masked = found.kept < MASKED_BELOW
    out: list[pre.Normalization] = []
    for number, name in enumerate(channel_names):
        kind = name.casefold()
        if kind == "ct":
            out.append(ct_scheme(found.foreground[number]))
        elif kind in pre.NAMED_CHANNELS:
            out.append(pre.NAMED_CHANNELS[kind])
        else:
            out.append(pre.ZSCORE if masked else pre.ZSCORE_WHOLE)
    return tuple(out)
