"""What levels of a U-Net are made of: units of convolution, norm and activation, their initialisation and counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bestiary.shared.core.errors import ConfigError

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}

PerAxis = int | Sequence[int]
"""One number, or one for each axis."""


class ConvUnit(nn.Module):
    """Convolution, InstanceNorm (affine, eps 1e-5), LeakyReLU (0.01).

    Args:
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: one odd number per axis; padding is ``(k - 1) / 2``.
        stride: one number per axis.
        bias: give the convolution a bias.
        act: end in the LeakyReLU.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        bias: bool = True,
        act: bool = True,
    ) -> None:
        super().__init__()
        axes = len(kernel_size)
        padding = tuple((k - 1) // 2 for k in kernel_size)
        self.conv = CONV[axes](in_channels, out_channels, kernel_size, stride, padding, bias=bias)  # type: ignore
        self.norm = _NORM[axes](out_channels, eps=1e-5, affine=True)
        self.act = nn.LeakyReLU(0.01, inplace=True) if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in, *S) to (B, out, *S / stride)."""
        return self.act(self.norm(self.conv(x)))


def conv_units(
    in_channels: int, out_channels: int, kernel_size: tuple[int, ...], stride: tuple[int, ...], count: int
) -> nn.Sequential:
    """``count`` conv units, the first of which carries the change of channels and the stride."""
    ones = (1,) * len(kernel_size)
    return nn.Sequential(
        *(
            ConvUnit(in_channels if j == 0 else out_channels, out_channels, kernel_size, ones if j else stride)
            for j in range(count)
        )
    )


def init_convolutions(module: nn.Module) -> None:
    """Kaiming-normal weights (a = 0.01) and zero biases for 2D and 3D convolutions, transposed ones included.

    Everything else keeps its initialisation, the 1D convolutions of a mixer too.
    """
    kinds = (*CONV.values(), *TRANSPOSED.values())
    for part in module.modules():
        if isinstance(part, kinds):
            for name, parameter in part.named_parameters(recurse=False):
                if name == "weight":
                    nn.init.kaiming_normal_(parameter, a=0.01)
                else:
                    nn.init.zeros_(parameter)


def per_level(name: str, values: Sequence[PerAxis], axes: int) -> tuple[tuple[int, ...], ...]:
    """Each level's numbers, one per axis; ``name`` is for the ConfigError that a wrong value raises."""
    levels = tuple((v,) * axes if isinstance(v, int) else tuple(int(x) for x in v) for v in values)
    if any(len(level) != axes or min(level) < 1 for level in levels):
        raise ConfigError(f"every level of {name} needs {axes} positive numbers, got {levels}")
    return levels


def counts_per_level(name: str, value: int | Sequence[int], n: int) -> tuple[int, ...]:
    """One count for each of n levels; ``name`` is for the ConfigError that a wrong value raises."""
    counts = (value,) * n if isinstance(value, int) else tuple(int(v) for v in value)
    if len(counts) != n or min(counts) < 1:
        raise ConfigError(f"{name} must be a positive number or {n} of them, one per level, got {value}")
    return counts
