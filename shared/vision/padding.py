"""Nets whose own strides do not follow the plan: the image is padded for them, and the logits are cropped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def padded_size(size: Sequence[int], stride: int) -> tuple[int, ...]:
    """The smallest size that a net of this total stride can take.

    Every axis is a multiple of the stride. Where the coarsest level would be a single voxel, which an instance norm
    cannot normalise, the last axis has one more.

    Args:
        size: voxels per axis.
        stride: of the net, the same for all axes.
    """
    padded = [-(-n // stride) * stride for n in size]
    if all(n == stride for n in padded):
        padded[-1] += stride
    return tuple(padded)


class PaddedNet(nn.Module):
    """A net with strides of its own. A subclass says in ``logits`` what it computes.

    An image that does not fit is padded with zeros behind each axis, and the logits are cropped. Zero is the mean of a
    z-scored image, and what a sliding window pads with; still, instance norms see the padding, so a patch size that
    fits costs less and is cleaner.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        stride: total stride, the same for all axes.
    """

    def __init__(self, spatial_dims: int, in_channels: int, stride: int) -> None:
        super().__init__()
        self.spatial_dims, self.in_channels, self.stride = spatial_dims, in_channels, stride

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) to (B, num_classes, *S), every axis a multiple of the stride."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) of any size to (B, num_classes, *S).

        Raises:
            ValueError: if the image has other axes or channels than the net, or no voxels.
        """
        if x.ndim != self.spatial_dims + 2 or x.shape[1] != self.in_channels or 0 in x.shape:
            shape = f"(B, {self.in_channels}, {', '.join(['Z', 'H', 'W'][-self.spatial_dims :])})"
            raise ValueError(f"the network needs an image {shape}, got {tuple(x.shape)}")
        size = x.shape[2:]
        padded = padded_size(size, self.stride)
        if padded == tuple(size):
            return self.logits(x)
        behind = [(0, p - n) for p, n in zip(padded, size, strict=True)]
        x = self.logits(F.pad(x, [n for pair in reversed(behind) for n in pair]))
        return x[(..., *(slice(n) for n in size))]


def plan_width(plan_features: Sequence[int] | None) -> int:
    """Width of the first level of a net that starts with 48 channels where nnU-Net's plan starts with 32.

    Args:
        plan_features: channels of each level of the plan; None: nnU-Net's.

    Returns:
        Half as much again as the plan's first level.
    """
    return round(1.5 * (plan_features[0] if plan_features else 32))
