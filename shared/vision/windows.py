"""The labels of a whole image from overlapping windows, without ever holding the logits of the whole image.

Logits of 134 classes on 300 x 512 x 512 voxels are 42 GB. Here they exist for the rows of one window at a time: a row
that no later window reaches is brought to the grid wanted, becomes class numbers and is forgotten. Where even that is
too much the image is also cut across, and windows that reach over a cut are computed for both sides.

Shape suffixes: K classes, C channels; S is a spatial shape, whose first axis has the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from bestiary.shared.core.errors import require

Span = tuple[int, int]
"""First voxel of an axis, and the one after the last."""

SMALLEST_TILE = 16
"""Voxels: below that, cutting an image across costs more windows than it saves memory."""


@dataclass(frozen=True)
class Windows:
    """How one network goes over an image.

    Attributes:
        window: (B, C, *patch_size) to logits (B, K, *patch_size); several passes may hide behind it.
        image: (C, *S); smaller than the patch is padded with 0.
        patch_size: of a window.
        overlap: of neighbouring windows, a share of the patch.
        sw_batch: windows that go through ``window`` at once.
    """

    window: Callable[[torch.Tensor], torch.Tensor]
    image: torch.Tensor
    patch_size: Sequence[int]
    overlap: float = 0.5
    sw_batch: int = 1


@torch.no_grad()
def windowed_labels(
    networks: Sequence[Windows],
    num_classes: int,
    shape: Sequence[int],
    *,
    memory_mb: float = 2000,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Class numbers of an image on another grid over the same field of view.

    Windows, their order and their Gaussian weights are those of MONAI's sliding window; what is interpolated linearly
    are the logits of one network, and of several the mean of their probabilities. The result is
    ``resampled_argmax(logits, shape)``, or that of ``mean of logits.softmax(0)``, but for ties within rounding.

    Args:
        networks: one or more; their images may differ in voxels, and not in shape.
        num_classes: K.
        shape: the grid wanted.
        memory_mb: 10^6 bytes that the logits kept between windows may take, of all networks together; what ``window``
            itself needs comes on top.
        device: where windows are computed and logits kept.

    Returns:
        (*shape) uint8, or int16 for more than 256 classes.
    """
    grids = [_Grid(n.image, n.patch_size, n.overlap, torch.device(device)) for n in networks]
    out = np.zeros(tuple(shape), dtype=np.uint8 if num_classes <= 256 else np.int16)
    size, rows = grids[0].size, sum(grid.patch[0] for grid in grids)
    for tile in _tiles(size, shape, num_classes, rows, memory_mb * 1e6):
        planes = [_Lerp(n, m, span) for n, m, span in zip(size[1:], shape[1:], tile, strict=True)]
        sink = _Rows(
            out[(slice(None), *(slice(*span) for span in tile))], _Lerp(size[0], shape[0], (0, shape[0])), planes
        )
        streams = [_finished(grid, planes, n, num_classes) for grid, n in zip(grids, networks, strict=True)]
        # All give the rows of the image in order, so that one row of each is there at a time.
        for row, reads in enumerate(zip(*streams, strict=True)):
            sink.add(row, reads[0] if len(reads) == 1 else partial(_mean, reads))
    return out


def _mean(reads: Sequence[Callable[[], torch.Tensor]]) -> torch.Tensor:
    """The mean of the probabilities of a row of logits."""
    total = reads[0]().softmax(0)
    for read in reads[1:]:
        total += read().softmax(0)
    return total / len(reads)


class _Grid:
    """The padded image and its windows."""

    def __init__(self, image: torch.Tensor, patch_size: Sequence[int], overlap: float, device: torch.device) -> None:
        utils: Any = require("monai.data.utils", "medical")
        self.device = device
        self.size, self.patch = tuple(image.shape[1:]), tuple(patch_size)
        missing = [max(p - n, 0) for p, n in zip(self.patch, self.size, strict=True)]
        self.before = [m // 2 for m in missing]
        pads = [n for m in reversed(missing) for n in (m // 2, m - m // 2)]
        self.image = F.pad(image.float(), pads) if any(pads) else image.float()
        full = tuple(self.image.shape[1:])
        steps = [p if p == n else max(int(p * (1 - overlap)), 1) for p, n in zip(self.patch, full, strict=True)]
        self.windows: list[tuple[slice, ...]] = utils.dense_patch_slices(full, self.patch, steps)
        weights = utils.compute_importance_map(self.patch, mode="gaussian", sigma_scale=0.125, device=device)
        self.weights = weights.clamp(min=max(float(weights.min()), 1e-3))


def _tiles(
    size: Sequence[int], shape: Sequence[int], classes: int, rows: int, budget: float
) -> Iterator[tuple[Span, ...]]:
    """Parts of the result across the rows, each small enough: what is cut is the longest edge, until it fits."""
    cuts = [1] * (len(shape) - 1)

    def edges() -> list[int]:
        return [math.ceil(n / c) for n, c in zip(shape[1:], cuts, strict=True)]

    def needed() -> float:
        source = [min(math.ceil(e * n / m) + 2, n) for e, n, m in zip(edges(), size[1:], shape[1:], strict=True)]
        return 4.0 * classes * (rows * math.prod(source) + 4 * math.prod(edges()))

    while needed() > budget and max(edges()) > SMALLEST_TILE:
        cuts[int(np.argmax(edges()))] += 1
    spans = [[(a, min(a + e, n)) for a in range(0, n, e)] for e, n in zip(edges(), shape[1:], strict=True)]
    return product(*spans)


def _finished(
    grid: _Grid, planes: Sequence[_Lerp], network: Windows, classes: int
) -> Iterator[Callable[[], torch.Tensor]]:
    """The rows of the image in order, each as soon as it is final.

    Each comes as what reads its logits (K, *source of the tile), which holds until the next one is asked for.
    """
    # Where the source of the tile lies in the padded image.
    box = [(p.first + b, p.last + b) for p, b in zip(planes, grid.before[1:], strict=True)]
    depth, kept = grid.patch[0], [b - a for a, b in box]
    # Row r of the padded image is kept at r % depth: the rows that the windows of one start reach, and no more.
    logits = torch.zeros(classes, depth, *kept, device=grid.device)
    weight = torch.zeros(depth, *kept, device=grid.device)

    def finish(first: int, last: int) -> Iterator[Callable[[], torch.Tensor]]:
        for row in range(first, last):
            at = row % depth
            if 0 <= row - grid.before[0] < grid.size[0]:
                yield lambda at=at: logits[:, at] / weight[at]
            logits[:, at], weight[at] = 0, 0

    top = 0
    for start, group in groupby(grid.windows, key=lambda w: w[0].start):
        yield from finish(top, start)
        top = start
        wanted = [w for w in group if all(s.start < b and s.stop > a for s, (a, b) in zip(w[1:], box, strict=True))]
        for first in range(0, len(wanted), network.sw_batch):
            some = wanted[first : first + network.sw_batch]
            answers = network.window(torch.stack([grid.image[(slice(None), *w)] for w in some]).to(grid.device))
            for place, answer in zip(some, answers, strict=True):
                inner, target = _overlap(place[1:], box)
                ours, value = grid.weights[(slice(None), *inner)], answer[(slice(None), slice(None), *inner)]
                value = value.float() * ours
                turn = start % depth
                for here, there in ((slice(turn, depth), slice(0, depth - turn)), (slice(0, turn), slice(-turn, None))):
                    if here.stop > here.start:
                        logits[(slice(None), here, *target)] += value[:, there]
                        weight[(here, *target)] += ours[there]
    yield from finish(top, top + depth)


def _overlap(place: Sequence[slice], box: Sequence[Span]) -> tuple[list[slice], list[slice]]:
    """The part of a window inside a box: as slices of the window, and of the box."""
    inner, target = [], []
    for part, (a, b) in zip(place, box, strict=True):
        low, high = max(part.start, a), min(part.stop, b)
        inner.append(slice(low - part.start, high - part.start))
        target.append(slice(low - a, high - a))
    return inner, target


class _Lerp:
    """Linear interpolation along an axis of n voxels to m over the same field; ``span`` of the m is wanted.

    Attributes:
        first, last: the part of the n that is read.
        low, high: (span) the two voxels that each wanted one lies between. share: of ``high``.
        same: nothing to do.
    """

    def __init__(self, n: int, m: int, span: Span) -> None:
        self.same = n == m
        place = np.clip((np.arange(*span) + 0.5) * (n / m) - 0.5, 0, n - 1)
        self.low = np.floor(place).astype(np.int64)
        self.high = np.minimum(self.low + (0 if self.same else 1), n - 1)
        self.share = place - self.low
        self.first, self.last = int(self.low[0]), int(self.high[-1]) + 1

    def __call__(self, array: torch.Tensor, axis: int) -> torch.Tensor:
        """Interpolate an axis that holds ``first`` to ``last``."""
        if self.same:
            return array
        low, high = (torch.from_numpy(v - self.first).to(array.device) for v in (self.low, self.high))
        share = torch.from_numpy(self.share).to(array).view(-1, *[1] * (array.ndim - 1 - axis))
        return torch.lerp(array.index_select(axis, low), array.index_select(axis, high), share)


class _Rows:
    """Takes rows of logits in ascending order and writes class numbers."""

    def __init__(self, out: np.ndarray, rows: _Lerp, planes: Sequence[_Lerp]) -> None:
        self.out, self.rows, self.planes = out, rows, planes
        self.wanted = {*rows.low.tolist(), *rows.high.tolist()}
        self.kept: dict[int, torch.Tensor] = {}
        self.done = 0

    def add(self, row: int, read: Callable[[], torch.Tensor]) -> None:
        """Row ``row`` of the source is final; ``read()`` gives its logits (K, *source of the tile)."""
        if row not in self.wanted:
            return
        value = read()
        for axis, lerp in enumerate(self.planes, start=1):
            value = lerp(value, axis)
        self.kept = {row - 1: self.kept[row - 1], row: value} if row - 1 in self.kept else {row: value}
        while self.done < len(self.out) and self.rows.high[self.done] <= row:
            low, share = self.kept[int(self.rows.low[self.done])], float(self.rows.share[self.done])
            mixed = torch.lerp(low, value, share) if share else low
            self.out[self.done] = mixed.argmax(0).cpu().numpy()
            self.done += 1
