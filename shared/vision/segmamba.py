"""SegMamba: an encoder of gated convolutions and three-branch Mamba, and MONAI's UNETR blocks round it.

Paper: arXiv:2401.13560. Source: the official code, ``model_segmamba/segmamba.py`` of ge-xing/SegMamba at commit
1039e37. Differs from paper: the gated spatial convolution adds its two branches, as the official code does; the paper
describes a product (?). Differs from the official code: the head follows the widths (there, 48 is written into it); any
number of tokens (there, the slices must divide it); any image size, by padding; 2D, which is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from bestiary.shared.core.errors import ConfigError, require
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.nn.mamba import SlicedMamba
from bestiary.shared.nn.mixers import from_tokens, to_tokens
from bestiary.shared.vision.convs import CONV, counts_per_level
from bestiary.shared.vision.padding import PaddedNet, plan_width

_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
LEVELS = 4


def _unit(axes: int, channels: int, kernel_size: int) -> list[nn.Module]:
    conv = CONV[axes](channels, channels, kernel_size, padding=kernel_size // 2)
    return [conv, _NORM[axes](channels), nn.ReLU()]


class GatedSpatialConv(nn.Module):
    """``x + joined(cubes(x) + point(x))``: two 3x3x3 units beside a 1x1x1 unit, and a 1x1x1 unit on their sum.

    A unit is a convolution, an InstanceNorm without parameters, and a ReLU. Paper: Sec. 2.2 ("GSC").

    Args:
        axes: 2 or 3.
        channels: of input and output.
    """

    def __init__(self, axes: int, channels: int) -> None:
        super().__init__()
        self.cubes = nn.Sequential(*_unit(axes, channels, 3), *_unit(axes, channels, 3))
        self.point = nn.Sequential(*_unit(axes, channels, 1))
        self.joined = nn.Sequential(*_unit(axes, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, *S) to the same shape."""
        return x + self.joined(self.cubes(x) + self.point(x))


class TriOrientedMamba(nn.Module):
    """``x + SlicedMamba(LayerNorm(x))`` over the voxels in raster order. Paper: Sec. 2.2 ("ToM").

    Args:
        dim: channels.
        num_slices: slices of the third branch.
        **options: as :class:`~bestiary.shared.nn.mamba.Mamba`.
    """

    def __init__(self, dim: int, num_slices: int, **options) -> None:
        super().__init__()
        self.dim = dim
        self.norm = nn.LayerNorm(dim)
        self.mamba = SlicedMamba(dim, num_slices, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, dim, *S) to the same shape."""
        tokens, spatial = to_tokens(x, self.dim)
        return x + from_tokens(self.mamba(self.norm(tokens)), spatial)


class SegMambaLevel(nn.Module):
    """Down-sampling, gated convolution, Mamba; and what leaves the level: InstanceNorm and a two-layer perceptron.

    Args:
        down: the down-sampling.
        axes: 2 or 3.
        dim: channels.
        depth: Mamba layers.
        num_slices: slices of each.
        **options: as :class:`~bestiary.shared.nn.mamba.Mamba`.
    """

    def __init__(self, down: nn.Module, axes: int, dim: int, depth: int, num_slices: int, **options) -> None:
        super().__init__()
        self.down = down
        self.gsc = GatedSpatialConv(axes, dim)
        self.layers = nn.Sequential(*(TriOrientedMamba(dim, num_slices, **options) for _ in range(depth)))
        wide, narrow = CONV[axes](dim, 2 * dim, 1), CONV[axes](2 * dim, dim, 1)
        self.out = nn.Sequential(_NORM[axes](dim), wide, nn.GELU(), narrow)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, in, *S) to what the next level gets and what the decoder gets, each (B, dim, *S / 2)."""
        x = self.layers(self.gsc(self.down(x)))
        return x, self.out(x)


class SegMamba(PaddedNet):
    """The whole net; its total stride is 16, the same for all axes whatever the plan says.

    In training too it gives one tensor of logits: it has no deep supervision.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        num_classes: channels of the logits.
        features: channels of the four levels, at 1/2 to 1/16 of the resolution.
        hidden_size: channels of the bottleneck, at 1/16 too.
        depths: Mamba layers of each level.
        num_slices: slices of the third branch at each level.
        **options: as :class:`~bestiary.shared.nn.mamba.Mamba`.

    Raises:
        ConfigError: if a list has not four entries.
        MissingExtraError: without MONAI.
    """

    report_name = "SegMamba"

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        num_classes: int,
        features: Sequence[int] = (48, 96, 192, 384),
        hidden_size: int = 768,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_slices: Sequence[int] = (64, 32, 16, 8),
        **options,
    ) -> None:
        super().__init__(spatial_dims, in_channels, 2**LEVELS)
        if spatial_dims not in CONV:
            raise ConfigError(f"spatial_dims must be 2 or 3, not {spatial_dims}")
        dims = counts_per_level("features", list(features), LEVELS)
        layers = counts_per_level("depths", list(depths), LEVELS)
        slices = counts_per_level("num_slices", list(num_slices), LEVELS)
        conv, norm = CONV[spatial_dims], _NORM[spatial_dims]
        downs: list[nn.Module] = [conv(in_channels, dims[0], 7, stride=2, padding=3)]
        downs += [nn.Sequential(norm(a), conv(a, b, 2, stride=2)) for a, b in itertools.pairwise(dims)]
        self.levels = nn.ModuleList(
            SegMambaLevel(downs[i], spatial_dims, dims[i], layers[i], slices[i], **options) for i in range(LEVELS)
        )
        blocks = require("monai.networks.blocks", "medical")
        widths, shared = [in_channels, *dims, hidden_size], dict(kernel_size=3, norm_name="instance", res_block=True)
        self.skips = nn.ModuleList(
            blocks.UnetrBasicBlock(spatial_dims, a, b, stride=1, **shared) for a, b in itertools.pairwise(widths)
        )
        self.ups = nn.ModuleList(
            blocks.UnetrUpBlock(spatial_dims, widths[i + 1], widths[i], upsample_kernel_size=2, **shared)
            for i in range(LEVELS, 0, -1)
        )
        self.last = blocks.UnetrBasicBlock(spatial_dims, dims[0], dims[0], stride=1, **shared)
        self.head = conv(dims[0], num_classes, 1)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`~bestiary.shared.vision.padding.PaddedNet`."""
        skips = [self.skips[0](x)]
        for level, skip in zip(self.levels, list(self.skips)[1:], strict=True):
            x, out = level(x)
            skips.append(skip(out))
        x = skips.pop()
        for up in self.ups:
            x = up(x, skips.pop())
        return self.head(self.last(x))


def segmamba(
    spec: DataSpec,
    features: Sequence[int] | None = None,
    hidden_size: int | None = None,
    depths: Sequence[int] = (2, 2, 2, 2),
    num_slices: Sequence[int] = (64, 32, 16, 8),
    plan_features: Sequence[int] | None = None,
    d_state: int = 16,
    d_conv: int = 4,
    expand: int = 2,
) -> SegMamba:
    """SegMamba for a data set.

    Args:
        spec: the data set; its strides and kernels make no difference here.
        features: channels of the four levels; None: w, 2w, 4w, 8w with w half as much again as the plan's first level,
            which are the official 48 to 384 where that has 32.
        hidden_size: channels of the bottleneck; None: twice the last of ``features``.
        depths: Mamba layers of each level.
        num_slices: slices of the third branch at each level.
        plan_features: channels of the plan's levels; None: nnU-Net's. Read where ``features`` is None.
        d_state: states per channel of Mamba.
        d_conv: width of Mamba's convolution.
        expand: inner width over outer width of Mamba.

    Raises:
        ConfigError: if a list has not four entries.
        MissingExtraError: without MONAI.
    """
    if features is None:
        features = [plan_width(plan_features) * 2**i for i in range(LEVELS)]
    return SegMamba(
        spec.spatial_dims,
        spec.in_channels,
        spec.num_classes,
        features,
        2 * features[-1] if hidden_size is None else hidden_size,
        depths,
        num_slices,
        d_state=d_state,
        d_conv=d_conv,
        expand=expand,
    )
