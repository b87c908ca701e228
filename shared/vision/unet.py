"""The plain convolutional U-Net of nnU-Net, in parts: an encoder, a decoder, and the net that joins them.

Both parts take a TokenMixer, which may put a block at the end of a level; its output feeds the next level and the
skip. Levels are counted from the full resolution (0) to the bottleneck. Nets whose levels are made of something else
than plain convolutions change what :class:`UNetEncoder` and :class:`UNetDecoder` put into a level.

Source: official code of arXiv:2508.07237, whose outer net is the PlainConvUNet of nnU-Net (arXiv:1809.10486).
Differs from it: nothing but names.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import nn

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.protocols import PyramidEncoder, TokenMixer
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.vision.convs import (
    CONV,
    TRANSPOSED,
    PerAxis,
    conv_units,
    counts_per_level,
    init_convolutions,
    per_level,
)


class UNetLevel(nn.Module):
    """The convolutions of a level, then the mixer if there is one.

    Args:
        convs: a module (B, in, *S) -> (B, out, *S / stride).
        mixer: a module (B, out, *S) -> (B, out, *S), or None.
    """

    def __init__(self, convs: nn.Module, mixer: nn.Module | None) -> None:
        super().__init__()
        self.convs = convs
        self.mixer = mixer

    def forward(self, x: torch.Tensor, orders: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Run the level; a mixer that has scan orders to give appends them to ``orders`` if that is a list."""
        x = self.convs(x)
        if self.mixer is None:
            return x
        if orders is not None and getattr(self.mixer, "gives_orders", False):
            x, order = self.mixer(x, return_orders=True)
            orders.append(order)
            return x
        return self.mixer(x)


class UNetEncoder(nn.Module):
    """An encoder: one :class:`UNetLevel` per resolution. A subclass says what stands before and in the levels.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        features: channels of each level, fine to coarse.
        strides: one number or tuple per level.
        kernel_sizes: one number or tuple per level, odd.
        convs_per_stage: units per level, one number or one per level.
        mixer: what stands at the end of the levels, or None.

    Attributes:
        num_mixers: levels that end in a mixer.
        decoder_convs: conv units per decoder level in the plans that have this encoder.

    Raises:
        ConfigError: if the lists disagree in length or a value is impossible.
    """

    gives_orders = True
    """``forward`` takes a list that it fills with scan orders."""

    decoder_convs: int = 2

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        features: Sequence[int],
        strides: Sequence[PerAxis],
        kernel_sizes: Sequence[PerAxis],
        convs_per_stage: int | Sequence[int] = 2,
        mixer: TokenMixer | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ConfigError(f"spatial_dims must be 2 or 3, not {spatial_dims}")
        self.spatial_dims, self.in_channels = spatial_dims, in_channels
        self.channels = tuple(int(c) for c in features)
        self.strides = per_level("strides", strides, spatial_dims)
        self.kernel_sizes = per_level("kernel_sizes", kernel_sizes, spatial_dims)
        n = len(self.channels)
        if not n or len(self.strides) != n or len(self.kernel_sizes) != n:
            raise ConfigError(
                f"an encoder needs one entry per level: features has {n}, strides {len(self.strides)}, "
                f"kernel_sizes {len(self.kernel_sizes)}"
            )
        if any(k % 2 == 0 for kernel in self.kernel_sizes for k in kernel):
            raise ConfigError(f"kernel_sizes must be odd, got {self.kernel_sizes}")
        counts = counts_per_level("convs_per_stage", convs_per_stage, n)
        self.stem, width = self.make_stem(counts[0])
        widths = (width, *self.channels)
        self.levels = nn.ModuleList()
        for i in range(n):
            # The mixer first: the order of building is that of the random numbers, and so part of what a seed means.
            block = None if mixer is None else mixer.build(widths[i + 1], spatial_dims, i)
            convs = self.make_convs(widths[i], widths[i + 1], self.kernel_sizes[i], self.strides[i], counts[i])
            self.levels.append(UNetLevel(convs, block))
        self.num_mixers = sum(level.mixer is not None for level in self.levels)
        init_convolutions(self)

    def make_stem(self, count: int) -> tuple[nn.Module, int]:
        """What stands before level 0, and its channels; ``count`` is that of level 0's units."""
        return nn.Identity(), self.in_channels

    def make_convs(
        self, in_channels: int, out_channels: int, kernel_size: tuple[int, ...], stride: tuple[int, ...], count: int
    ) -> nn.Module:
        """The convolutions of one level."""
        raise NotImplementedError

    def forward(self, image: torch.Tensor, orders: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """(B, C, *S) to ``[(B, C_i, *S_i)]``, fine to coarse.

        Args:
            image: the image.
            orders: a list to which the scan orders (G, B, L) of the levels that have them are appended.
        """
        image, pyramid = self.stem(image), []
        for level in self.levels:
            image = level(image, orders)
            pyramid.append(image)
        return pyramid


class UNetPlainEncoder(UNetEncoder):
    """nnU-Net's plain encoder: levels of conv units; down-sampling is the strided first convolution.

    Arguments and errors as :class:`UNetEncoder`.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        features: Sequence[int],
        strides: Sequence[PerAxis],
        kernel_sizes: Sequence[PerAxis],
        convs_per_stage: int | Sequence[int] = 2,
        mixer: TokenMixer | None = None,
    ) -> None:
        super().__init__(spatial_dims, in_channels, features, strides, kernel_sizes, convs_per_stage, mixer)
        if isinstance(convs_per_stage, int):
            self.decoder_convs = convs_per_stage

    make_convs = staticmethod(conv_units)  # type: ignore[assignment]


class UNetDecoder(nn.Module):
    """The decoder: transposed convolution, concatenation (upsampled first, skip second), conv units, head.

    A subclass may change what up-samples and what a level is made of.

    Works on any PyramidEncoder. Heads are 1x1 convolutions under the number of their level, so that a net without
    deep supervision has ``heads.0`` alone and under the same name.

    Args:
        encoder: the encoder whose pyramid is decoded; only its channels, strides and kernel sizes are read.
        num_classes: channels of the logits.
        convs_per_stage: conv units per level, one number or one per decoder level, coarse to fine.
        mixer: what stands at the end of the levels, or None.
        deep_supervision: build a head at every level and, in training, return all of them.
        finest_skip: give level 0 the encoder's full resolution.

    Raises:
        ConfigError: if a value does not fit.
    """

    def __init__(
        self,
        encoder: PyramidEncoder,
        num_classes: int,
        convs_per_stage: int | Sequence[int] = 2,
        mixer: TokenMixer | None = None,
        deep_supervision: bool = True,
        finest_skip: bool = True,
    ) -> None:
        super().__init__()
        n = len(encoder.channels)
        if n < 2:
            raise ConfigError("a decoder needs an encoder of two levels or more")
        axes = len(encoder.strides[0])
        convs = counts_per_level("decoder convs_per_stage", convs_per_stage, n - 1)
        self.num_classes, self.deep_supervision, self.finest_skip = num_classes, deep_supervision, finest_skip
        self.upsamples, self.levels, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleDict()
        for k, level in enumerate(range(n - 2, -1, -1)):
            below, here, stride = encoder.channels[level + 1], encoder.channels[level], encoder.strides[level + 1]
            self.upsamples.append(self.make_upsample(below, here, stride))
            block = None if mixer is None else mixer.build(here, axes, level)
            wide = 2 * here if level or finest_skip else here
            one = (1,) * axes
            self.levels.append(
                UNetLevel(self.make_convs(wide, here, encoder.kernel_sizes[level], one, convs[k]), block)
            )
            if deep_supervision or level == 0:
                self.heads[str(level)] = CONV[axes](here, num_classes, 1)
        init_convolutions(self)

    make_convs = staticmethod(conv_units)

    def make_upsample(self, in_channels: int, out_channels: int, stride: tuple[int, ...]) -> nn.Module:
        """What brings the features of one level to the size and the channels of the next finer one."""
        return TRANSPOSED[len(stride)](in_channels, out_channels, stride, stride)  # type: ignore[arg-type]

    def forward(
        self, pyramid: Sequence[torch.Tensor], orders: list[torch.Tensor] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """A pyramid, fine to coarse, to logits.

        Args:
            pyramid: ``[(B, C_i, *S_i)]``.
            orders: as for the encoder.

        Returns:
            (B, num_classes, *S_0); in training with deep supervision a list, full to lowest resolution.
        """
        every = self.deep_supervision and self.training
        x, logits = pyramid[-1], []
        for k, (upsample, level) in enumerate(zip(self.upsamples, self.levels, strict=True)):
            at = len(pyramid) - 2 - k
            x = upsample(x)
            x = level(torch.cat([x, pyramid[at]], dim=1) if at or self.finest_skip else x, orders)
            if every or at == 0:
                logits.append(self.heads[str(at)](x))
        return logits[::-1] if every else logits[0]


class SegUNet(nn.Module):
    """An encoder and a decoder: an image in, logits out.

    Args:
        encoder: a PyramidEncoder.
        decoder: what turns its pyramid into logits.
        in_channels: image channels, for the check of the input; None skips it.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, in_channels: int | None = None) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.in_channels = in_channels
        strides = encoder.strides
        self.total_stride: tuple[int, ...] = tuple(prod(axis) for axis in zip(*strides, strict=True))  # type: ignore

    def forward(self, x: torch.Tensor, return_orders: bool = False):
        """Logits of an image.

        Args:
            x: (B, C, *S), every axis divisible by the product of the strides.
            return_orders: also return the scan order of each block that has one, in the order of execution.

        Returns:
            (B, num_classes, *S); in training with deep supervision a list of logits, full to lowest resolution.
            With ``return_orders`` a pair of that and ``[(G, B, L) int64]``, one per block.

        Raises:
            ValueError: if the shape of the image does not fit.
        """
        self._check(x)
        if not return_orders:
            return self.decoder(self.encoder(x))
        orders: list[torch.Tensor] = []
        pyramid = self.encoder(x, orders) if getattr(self.encoder, "gives_orders", False) else self.encoder(x)
        return self.decoder(pyramid, orders), orders

    def _check(self, x: torch.Tensor) -> None:
        axes, channels = len(self.total_stride), self.in_channels
        if x.ndim != axes + 2 or (channels is not None and x.shape[1] != channels):
            shape = f"(B, {'C' if channels is None else channels}, {', '.join(['Z', 'H', 'W'][-axes:])})"
            raise ValueError(f"the network needs an image {shape}, got {tuple(x.shape)}")
        if any(size == 0 or size % stride for size, stride in zip(x.shape[2:], self.total_stride, strict=True)):
            raise ValueError(
                f"image size {tuple(x.shape[2:])} must be divisible by the product of the strides "
                f"{self.total_stride}: pad the image or choose another patch size"
            )


def unet_plain_encoder(
    spec: DataSpec,
    mixer: TokenMixer | None = None,
    features: Sequence[int] | None = None,
    convs_per_stage: int | Sequence[int] = 2,
    strides: Sequence[PerAxis] | None = None,
    kernel_sizes: Sequence[PerAxis] | None = None,
) -> UNetPlainEncoder:
    """The encoder for a data set: what a config leaves open comes from the spec.

    Args:
        spec: the data set.
        mixer: what stands at the end of the levels, or None.
        features: channels per level; None: ``min(32 * 2^i, 320)`` in 3D, at most 512 in 2D.
        convs_per_stage: conv units per level, one number or one per level.
        strides: one per level; None: those of the spec.
        kernel_sizes: one per level; None: those of the spec, or 3 everywhere if it has none.

    Raises:
        ConfigError: if neither config nor spec gives strides, or the lists disagree.
    """
    plan = plan_of(spec, features, strides, kernel_sizes)
    return UNetPlainEncoder(spec.spatial_dims, spec.in_channels, *plan, convs_per_stage, mixer)


def plan_of(
    spec: DataSpec,
    features: Sequence[int] | None = None,
    strides: Sequence[PerAxis] | None = None,
    kernel_sizes: Sequence[PerAxis] | None = None,
) -> tuple[Sequence[int], Sequence[PerAxis], Sequence[PerAxis]]:
    """Features, strides and kernel sizes of each level: those given, else the spec's, else nnU-Net's.

    Args:
        spec: the data set.
        features: channels per level; None: ``min(32 * 2^i, 320)`` in 3D, at most 512 in 2D.
        strides: one per level; None: those of the spec.
        kernel_sizes: one per level; None: those of the spec, or 3 everywhere if it has none.

    Raises:
        ConfigError: if neither config nor spec gives strides.
    """
    steps: Sequence[PerAxis] = list(strides) if strides is not None else list(spec.strides)
    if not steps:
        raise ConfigError("the encoder needs strides: this data set's spec has none, so give encoder.strides")
    if features is None:
        top = 320 if spec.spatial_dims == 3 else 512
        features = [min(32 * 2**i, top) for i in range(len(steps))]
    kernels: Sequence[PerAxis] = (
        list(kernel_sizes) if kernel_sizes is not None else list(spec.kernel_sizes) or [3] * len(steps)
    )
    return list(features), steps, kernels
