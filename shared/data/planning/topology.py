"""Which levels a U-Net gets for a patch, and how many numbers its feature maps hold.

Source: nnU-Net (arXiv:1809.10486, Methods and the supplement), and its code, version 2 (``get_pool_and_conv_props`` and
``compute_conv_feature_map_size``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import numpy as np

MIN_EDGE = 4
"""A feature map keeps at least so many voxels along every axis that is pooled."""


@dataclass(frozen=True)
class Topology:
    """The levels of a network for one patch, fine to coarse.

    Attributes:
        patch_size: the patch, rounded up so that every level divides it.
        strides: of each level, the first all ones.
        kernel_sizes: of each level.
        divisor: what each axis must be divisible by.
    """

    patch_size: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    divisor: tuple[int, ...]


def topology(spacing: Sequence[float] | np.ndarray, patch_size: Sequence[float]) -> Topology:
    """Halve the axes until the maps are small, those first whose voxels are small.

    At each level those axes are halved that still have 2 * MIN_EDGE voxels and whose voxel size is within a factor of
    2 of the smallest of these; one axis alone is halved while it has 3 * MIN_EDGE. A kernel is 1 along an axis until
    that axis' voxel size is within a factor of 2 of the smallest, then 3; the coarsest level has 3 everywhere.

    Args:
        spacing: mm of each axis.
        patch_size: voxels of each axis, whole or not.
    """
    dims = range(len(spacing))
    size, step = [float(n) for n in patch_size], [float(s) for s in spacing]
    pools, kernel = [0 for _ in dims], [1 for _ in dims]
    strides, kernels = [tuple(1 for _ in dims)], []
    while True:
        large = [axis for axis in dims if size[axis] >= 2 * MIN_EDGE]
        if not large:
            break
        finest = min(step[axis] for axis in large)
        halved = [axis for axis in large if step[axis] / finest < 2]
        if len(halved) == 1 and size[halved[0]] < 3 * MIN_EDGE:
            break
        kernel = [3 if k == 3 or s / min(step) < 2 else 1 for k, s in zip(kernel, step, strict=True)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in halved else 1 for axis in dims))
        for axis in halved:
            pools[axis] += 1
            step[axis] *= 2
            size[axis] = ceil(size[axis] / 2)
    kernels.append(tuple(3 for _ in dims))
    divisor = tuple(2**n for n in pools)
    patch = tuple(ceil(n / d) * d for n, d in zip(patch_size, divisor, strict=True))
    return Topology(patch, tuple(strides), tuple(kernels), divisor)


def feature_map_size(
    patch_size: Sequence[int],
    strides: Sequence[Sequence[int]],
    features: Sequence[int],
    convs: Sequence[int],
    decoder_convs: Sequence[int],
    num_classes: int,
    residual: bool = False,
) -> int:
    """Numbers in all outputs of convolutions for one patch: what nnU-Net estimates GPU memory from.

    Args:
        patch_size: voxels of each axis.
        strides: of each level.
        features: channels of each level.
        convs: convolutions of each encoder level; residual blocks (two convolutions each) where ``residual``.
        decoder_convs: convolutions of each decoder level, coarse to fine.
        num_classes: channels of the one full-resolution head.
        residual: a residual encoder: a stem of one convolution, and a projection at the skip of a block that changes
            size or channels.
    """
    size, voxels = list(patch_size), []
    for stride in strides:
        size = [n // s for n, s in zip(size, stride, strict=True)]
        voxels.append(prod(size))
    total = features[0] * prod(patch_size) if residual else 0
    for level, (count, channels, n) in enumerate(zip(convs, features, voxels, strict=True)):
        maps = count
        if residual:
            before = features[max(level - 1, 0)]
            maps = 2 * count + (before != channels or max(strides[level]) > 1)
        total += maps * channels * n
    for place, count in enumerate(decoder_convs):
        level = len(features) - 2 - place
        total += (count + 1) * features[level] * voxels[level]  # one more for the transposed convolution
    return total + num_classes * voxels[0]
