"""The residual encoder of nnU-Net v2 (its ResEnc plans), which takes a mixer at the end of each level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bestiary.shared.core.protocols import TokenMixer
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.vision.convs import ConvUnit, PerAxis
from bestiary.shared.vision.unet import UNetEncoder, plan_of

_POOL = {2: nn.AvgPool2d, 3: nn.AvgPool3d}


class ResidualBlock(nn.Module):
    """Conv unit with the stride, convolution and norm, plus the skip; LeakyReLU (0.01) of the sum.

    The skip is averaged over the stride where there is one, and projected (1x1 convolution without bias, norm) where
    the channels change; otherwise it is the input itself.

    Paper: the ResNet-D of arXiv:1812.01187 Sec. 4. Source: ``BasicBlockD`` of dynamic-network-architectures 0.3.1, as
    nnU-Net v2 sets it up.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: one odd number per axis, of both convolutions.
        stride: one number per axis.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        super().__init__()
        ones = (1,) * len(stride)
        self.conv1 = ConvUnit(in_channels, out_channels, kernel_size, stride)
        self.conv2 = ConvUnit(out_channels, out_channels, kernel_size, ones, act=False)
        self.pool = nn.Identity() if stride == ones else _POOL[len(stride)](stride, stride)  # type: ignore[arg-type]
        same = in_channels == out_channels
        self.project = nn.Identity() if same else ConvUnit(in_channels, out_channels, ones, ones, bias=False, act=False)
        self.act = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in, *S) to (B, out, *S / stride)."""
        return self.act(self.conv2(self.conv1(x)) + self.project(self.pool(x)))


class UNetResidualEncoder(UNetEncoder):
    """nnU-Net v2's residual encoder: a conv unit as stem, then levels of :class:`ResidualBlock`.

    The last norm of each block starts at zero, so that every block begins as its skip.

    Source: ``ResidualEncoder`` of dynamic-network-architectures 0.3.1 and the ResEnc planners of nnU-Net v2.6.2.

    Arguments and errors as :class:`~bestiary.shared.vision.unet.UNetEncoder`; a unit is a residual block.
    """

    decoder_convs = 1
    report_name = "residual net"

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        features: Sequence[int],
        strides: Sequence[PerAxis],
        kernel_sizes: Sequence[PerAxis],
        convs_per_stage: int | Sequence[int],
        mixer: TokenMixer | None = None,
    ) -> None:
        super().__init__(spatial_dims, in_channels, features, strides, kernel_sizes, convs_per_stage, mixer)
        for block in self.modules():
            if isinstance(block, ResidualBlock):
                nn.init.zeros_(block.conv2.norm.weight)
                nn.init.zeros_(block.conv2.norm.bias)

    def make_stem(self, count: int) -> tuple[nn.Module, int]:
        """A conv unit at full resolution."""
        ones = (1,) * self.spatial_dims
        return ConvUnit(self.in_channels, self.channels[0], self.kernel_sizes[0], ones), self.channels[0]

    def make_convs(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, ...], stride: tuple[int, ...], count: int
    ) -> nn.Module:
        """Residual blocks, the first of which carries the stride."""
        return residual_blocks(in_channels, out_channels, kernel_size, stride, count)


def residual_blocks(
    in_channels: int, out_channels: int, kernel_size: tuple[int, ...], stride: tuple[int, ...], count: int
) -> nn.Sequential:
    """``count`` residual blocks, the first of which carries the change of channels and the stride."""
    ones = (1,) * len(stride)
    return nn.Sequential(
        *(
            ResidualBlock(out_channels if j else in_channels, out_channels, kernel_size, ones if j else stride)
            for j in range(count)
        )
    )


def unet_residual_encoder(
    spec: DataSpec,
    mixer: TokenMixer | None = None,
    features: Sequence[int] | None = None,
    convs_per_stage: int | Sequence[int] | None = None,
    strides: Sequence[PerAxis] | None = None,
    kernel_sizes: Sequence[PerAxis] | None = None,
) -> UNetResidualEncoder:
    """The residual encoder for a data set: what a config leaves open comes from the spec.

    Args:
        spec: the data set.
        mixer: what stands at the end of the levels, or None.
        features: channels per level; None: ``min(32 * 2^i, 320)`` in 3D, at most 512 in 2D.
        convs_per_stage: residual blocks (two convolutions each) per level, one number or one per level; None: 1, 3, 4,
            and 6 at every further level, as nnU-Net's ResEnc planners have it.
        strides: one per level; None: those of the spec.
        kernel_sizes: one per level; None: those of the spec, or 3 everywhere if it has none.

    Raises:
        ConfigError: if neither config nor spec gives strides, or the lists disagree.
    """
    features, steps, kernels = plan_of(spec, features, strides, kernel_sizes)
    if convs_per_stage is None:
        convs_per_stage = [1, 3, 4, *[6] * len(steps)][: len(steps)]
    return UNetResidualEncoder(spec.spatial_dims, spec.in_channels, features, steps, kernels, convs_per_stage, mixer)
