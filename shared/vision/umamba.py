"""U-Mamba: a residual U-Net with Mamba at its bottleneck ("Bot") or at the levels of its encoder ("Enc").

Paper: arXiv:2401.04722. Source: the official code, ``UMambaBot_2d/_3d`` and ``UMambaEnc_2d/_3d`` of
bowang-lab/U-Mamba at commit 530739b. Differs from it: the 1x1 convolution of the decoder's up-sampling comes before
the voxels are repeated, which is the same at less cost; channels that serve as tokens need the patch that the net was
built for, and any other is a ValueError.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import ceil, prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.nn.mamba import Mamba
from bestiary.shared.nn.mixers import from_tokens, to_tokens
from bestiary.shared.vision.convs import CONV, ConvUnit, PerAxis, counts_per_level, per_level
from bestiary.shared.vision.unet import SegUNet, UNetDecoder, UNetEncoder, plan_of
from bestiary.shared.vision.unet_residual import residual_blocks

Placement = Literal["all", "alternate"]


class ProjectedBlock(nn.Module):
    """Conv unit with the stride, convolution and norm, plus a strided 1x1 convolution of the input; LeakyReLU (0.01).

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: one odd number per axis.
        stride: one number per axis.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.conv1 = ConvUnit(in_channels, out_channels, kernel_size, stride)
        self.conv2 = ConvUnit(out_channels, out_channels, kernel_size, (1,) * len(stride), act=False)
        self.project = CONV[len(stride)](in_channels, out_channels, 1, stride)  # type: ignore[arg-type]
        self.act = nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in, *S) to (B, out, *S / stride)."""
        return self.act(self.conv2(self.conv1(x)) + self.project(x))


def umamba_convs(
    in_channels: int, out_channels: int, kernel_size: tuple[int, ...], stride: tuple[int, ...], count: int
) -> nn.Module:
    """One :class:`ProjectedBlock`, then ``count - 1`` blocks of nnU-Net's residual encoder."""
    ones = (1,) * len(stride)
    rest = residual_blocks(out_channels, out_channels, kernel_size, ones, count - 1)
    return nn.Sequential(ProjectedBlock(in_channels, out_channels, kernel_size, stride), *rest)


class UMambaLayer(nn.Module):
    """``Mamba(LayerNorm(tokens))`` without a residual, in float32 also under autocast.

    Tokens are the voxels in raster order; or, at levels with few voxels, the channels, whose width is then the number
    of voxels.

    Args:
        dim: width of the tokens.
        channel_tokens: the channels are the tokens.
        **options: as :class:`~bestiary.shared.nn.mamba.Mamba`.
    """

    def __init__(self, dim: int, channel_tokens: bool = False, **options) -> None:
        super().__init__()
        self.dim, self.channel_tokens = dim, channel_tokens
        self.norm = nn.LayerNorm(dim)
        self.mamba = Mamba(dim, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, *S) to the same shape, float32 or wider.

        Raises:
            ValueError: if the channels are tokens and the image is not of the patch size the net was built for.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if not self.channel_tokens:
                tokens, spatial = to_tokens(x, self.dim)
                return from_tokens(self.mamba(self.norm(tokens)), spatial)  # type: ignore[arg-type]
            if prod(x.shape[2:]) != self.dim:
                raise ValueError(
                    f"this U-Mamba was built for a patch that leaves {self.dim} voxels at a level whose channels are "
                    f"its tokens, and the image leaves {prod(x.shape[2:])}: give it the patch size of its data spec, "
                    "or build it with channel_tokens=false"
                )
            return self.mamba(self.norm(x.flatten(2))).view_as(x)  # type: ignore[union-attr]


class UMambaPlaces:
    """The TokenMixer that puts an :class:`UMambaLayer` at some levels.

    Args:
        levels: those with a layer.
        voxels: voxels of the patch at each level; a level with no more of them than channels has its channels as
            tokens. None: never.
        **options: as :class:`~bestiary.shared.nn.mamba.Mamba`.
    """

    def __init__(self, levels: Collection[int], voxels: Sequence[int] | None = None, **options) -> None:
        self.levels, self.voxels, self.options = levels, voxels, options

    def build(self, dim: int, spatial_dims: int, level: int) -> UMambaLayer | None:
        """The layer of one level, or None."""
        if level not in self.levels:
            return None
        if self.voxels is not None and self.voxels[level] <= dim:
            return UMambaLayer(self.voxels[level], channel_tokens=True, **self.options)
        return UMambaLayer(dim, **self.options)


class UMambaEncoder(UNetEncoder):
    """The residual encoder of U-Mamba. Arguments and errors as :class:`~bestiary.shared.vision.unet.UNetEncoder`."""

    make_convs = staticmethod(umamba_convs)  # type: ignore[assignment]

    def make_stem(self, count: int) -> tuple[nn.Module, int]:
        """As many blocks as level 0 has, at full resolution."""
        width, ones = self.channels[0], (1,) * self.spatial_dims
        return umamba_convs(self.in_channels, width, self.kernel_sizes[0], ones, count), width


class RepeatUpsample(nn.Module):
    """A 1x1 convolution, then every voxel repeated.

    Args:
        in_channels: channels in.
        out_channels: channels out.
        stride: how often a voxel is repeated, one number per axis.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.stride = stride
        self.conv = CONV[len(stride)](in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in, *S) to (B, out, *S * stride)."""
        size = [n * s for n, s in zip(x.shape[2:], self.stride, strict=True)]
        return F.interpolate(self.conv(x), size=size, mode="nearest")


class UMambaDecoder(UNetDecoder):
    """The residual decoder of U-Mamba. Arguments and errors as :class:`~bestiary.shared.vision.unet.UNetDecoder`."""

    make_convs = staticmethod(umamba_convs)  # type: ignore[assignment]

    def make_upsample(self, in_channels: int, out_channels: int, stride: tuple[int, ...]) -> nn.Module:
        """A 1x1 convolution, and nearest neighbours."""
        return RepeatUpsample(in_channels, out_channels, stride)


class UMamba(SegUNet):
    """A U-Mamba; ``forward`` is that of :class:`~bestiary.shared.vision.unet.SegUNet`.

    Args:
        encoder: with its Mamba layers.
        decoder: what turns its pyramid into logits.
        in_channels: image channels.
        report_name: what reports call it.
    """

    def __init__(self, encoder: UMambaEncoder, decoder: UMambaDecoder, in_channels: int, report_name: str) -> None:
        super().__init__(encoder, decoder, in_channels)
        self.report_name = report_name


def umamba_bot(
    spec: DataSpec,
    features: Sequence[int] | None = None,
    strides: Sequence[PerAxis] | None = None,
    kernel_sizes: Sequence[PerAxis] | None = None,
    convs_per_stage: int | Sequence[int] | None = 2,
    decoder_convs: int | Sequence[int] | None = None,
    finest_skip: bool | None = None,
    deep_supervision: bool = True,
    d_state: int = 16,
    d_conv: int = 4,
    expand: int = 2,
) -> UMamba:
    """U-Mamba with one Mamba layer, at the bottleneck.

    Args:
        spec: the data set.
        features: channels per level; None: ``min(32 * 2^i, 320)`` in 3D, at most 512 in 2D.
        strides: one per level; None: those of the spec.
        kernel_sizes: one per level; None: those of the spec, or 3 everywhere if it has none.
        convs_per_stage: blocks (two convolutions each) per encoder level, one number or one per level; the coarser
            half has one whatever is given, as in the official code. None is 2.
        decoder_convs: blocks per decoder level, one number or one per level, coarse to fine; the finer half has one,
            as in the official code. None: as ``convs_per_stage`` if that is one number, else 2.
        finest_skip: give the decoder the encoder's full resolution. None: in 3D and not in 2D, as the official code.
        deep_supervision: a head at every decoder level.
        d_state: states per channel of Mamba.
        d_conv: width of Mamba's convolution.
        expand: inner width over outer width of Mamba.

    Raises:
        ConfigError: if neither config nor spec gives strides, or the lists disagree.
    """
    plan = plan_of(spec, features, strides, kernel_sizes)
    mixer = UMambaPlaces({len(plan[0]) - 1}, d_state=d_state, d_conv=d_conv, expand=expand)
    counts = (convs_per_stage, decoder_convs)
    return _umamba(spec, plan, mixer, counts, finest_skip, deep_supervision, "U-Mamba Bot")


def umamba_enc(
    spec: DataSpec,
    features: Sequence[int] | None = None,
    strides: Sequence[PerAxis] | None = None,
    kernel_sizes: Sequence[PerAxis] | None = None,
    convs_per_stage: int | Sequence[int] | None = 2,
    decoder_convs: int | Sequence[int] | None = None,
    mamba_levels: Placement | None = None,
    channel_tokens: bool = True,
    finest_skip: bool | None = None,
    deep_supervision: bool = True,
    d_state: int = 16,
    d_conv: int = 4,
    expand: int = 2,
) -> UMamba:
    """U-Mamba with Mamba layers at the levels of the encoder.

    Args:
        spec: the data set.
        features: as :func:`umamba_bot`.
        strides: as :func:`umamba_bot`.
        kernel_sizes: as :func:`umamba_bot`.
        convs_per_stage: as :func:`umamba_bot`.
        decoder_convs: as :func:`umamba_bot`.
        mamba_levels: ``all``, or ``alternate``: every other one, the bottleneck among them. None: all in 3D, alternate
            in 2D, as the official code.
        channel_tokens: at levels where the patch has no more voxels than channels, the channels are the tokens, as in
            the official code; the net then takes images of the spec's patch size alone.
        finest_skip: as :func:`umamba_bot`.
        deep_supervision: as :func:`umamba_bot`.
        d_state: as :func:`umamba_bot`.
        d_conv: as :func:`umamba_bot`.
        expand: as :func:`umamba_bot`.

    Raises:
        ConfigError: as :func:`umamba_bot`, or for an unknown placement.
    """
    plan = plan_of(spec, features, strides, kernel_sizes)
    n = len(plan[0])
    if mamba_levels is None:
        mamba_levels = "all" if spec.spatial_dims == 3 else "alternate"
    if mamba_levels not in ("all", "alternate"):
        raise ConfigError(f"mamba_levels must be all or alternate, not {mamba_levels!r}")
    levels = range(n) if mamba_levels == "all" else range(n - 1, -1, -2)
    voxels, size = [], list(spec.patch_size)
    for stride in per_level("strides", plan[1], spec.spatial_dims):
        size = [a // b for a, b in zip(size, stride, strict=True)]
        voxels.append(prod(size))
    mixer = UMambaPlaces(levels, voxels if channel_tokens else None, d_state=d_state, d_conv=d_conv, expand=expand)
    counts = (convs_per_stage, decoder_convs)
    return _umamba(spec, plan, mixer, counts, finest_skip, deep_supervision, "U-Mamba Enc")


def _umamba(
    spec: DataSpec,
    plan: tuple[Sequence[int], Sequence[PerAxis], Sequence[PerAxis]],
    mixer: UMambaPlaces,
    counts: tuple[int | Sequence[int] | None, int | Sequence[int] | None],
    finest_skip: bool | None,
    deep_supervision: bool,
    name: str,
) -> UMamba:
    n = len(plan[0])
    convs, decoder_convs = counts
    convs = 2 if convs is None else convs
    if decoder_convs is None:
        decoder_convs = convs if isinstance(convs, int) else 2
    half = ceil(n / 2)  # levels of the encoder, and of the decoder, that may have more than one block
    encoder_counts = [c if i < half else 1 for i, c in enumerate(counts_per_level("convs_per_stage", convs, n))]
    given = counts_per_level("decoder_convs", decoder_convs, n - 1)
    decoder_counts = [c if i < half else 1 for i, c in enumerate(given)]
    encoder = UMambaEncoder(spec.spatial_dims, spec.in_channels, *plan, encoder_counts, mixer)
    skip = spec.spatial_dims == 3 if finest_skip is None else finest_skip
    decoder = UMambaDecoder(encoder, spec.num_classes, decoder_counts, None, deep_supervision, skip)
    return UMamba(encoder, decoder, spec.in_channels, name)
