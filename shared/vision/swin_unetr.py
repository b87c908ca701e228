"""MONAI's Swin UNETR, with what a segmentation model here needs round it.

Paper: arXiv:2201.01266. Source: MONAI, ``monai.networks.nets.SwinUNETR``, which this builds and does not change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bestiary.shared.core.errors import require
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.vision.padding import PaddedNet, plan_width


class SwinUNETR(PaddedNet):
    """MONAI's net; its total stride is 32, the same for all axes whatever the plan says.

    In training too it gives one tensor of logits: it has no deep supervision.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        num_classes: channels of the logits.
        **options: as MONAI's class, but ``patch_size``, which is 2.

    Raises:
        MissingExtraError: without MONAI or einops.
        ValueError: for a value that MONAI refuses.
    """

    report_name = "Swin UNETR"

    def __init__(self, spatial_dims: int, in_channels: int, num_classes: int, **options) -> None:
        super().__init__(spatial_dims, in_channels, 32)
        require("einops", "medical")
        nets = require("monai.networks.nets", "medical")
        with torch.device("cpu"):  # MONAI reads numbers out of tensors, which the meta device has none of
            net = nets.SwinUNETR(
                in_channels=in_channels, out_channels=num_classes, spatial_dims=spatial_dims, **options
            )
        self.net = net.to(torch.get_default_device())

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """See :class:`~bestiary.shared.vision.padding.PaddedNet`."""
        return self.net(x)


def swin_unetr(
    spec: DataSpec,
    feature_size: int | None = None,
    depths: Sequence[int] = (2, 2, 2, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    window_size: int = 7,
    use_v2: bool = False,
    use_checkpoint: bool = False,
    plan_features: Sequence[int] | None = None,
) -> SwinUNETR:
    """Swin UNETR for a data set.

    Args:
        spec: the data set; its strides and kernels make no difference here.
        feature_size: channels of the first level, a multiple of 12; None: the multiple of 12 next to half as much again
            as the plan's first level, which is the paper's 48 where that has 32.
        depths: Swin blocks of the four levels.
        num_heads: attention heads of the four levels.
        window_size: voxels of a window along each axis.
        use_v2: a residual convolution block at the start of each Swin level.
        use_checkpoint: recompute the Swin blocks in the backward pass.
        plan_features: channels of the plan's levels; None: nnU-Net's. Read where ``feature_size`` is None.

    Raises:
        MissingExtraError: without MONAI or einops.
        ValueError: for a value that MONAI refuses.
    """
    if feature_size is None:
        feature_size = 12 * max(1, round(plan_width(plan_features) / 12))
    return SwinUNETR(
        spec.spatial_dims,
        spec.in_channels,
        spec.num_classes,
        feature_size=feature_size,
        depths=tuple(depths),
        num_heads=tuple(num_heads),
        window_size=window_size,
        use_v2=use_v2,
        use_checkpoint=use_checkpoint,
    )
