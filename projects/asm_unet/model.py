"""The ASM-UNet network: a flat facade over encoder, mixer and decoder, and the builder for configs.

Paper: arXiv:2508.07237; the outer net and the places of the blocks are from the official code.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bestiary.projects.asm_unet.adaptive_scan import AdaptiveScan, AdaptiveScanMamba, Order, ScoreTerms
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.protocols import TokenMixer
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.vision.unet import PerAxis, SegUNet, UNetDecoder, UNetPlainEncoder

__all__ = ["ASMUNet", "AdaptiveScanMamba", "build_network"]


class ASMUNet(SegUNet):
    """nnU-Net's plain U-Net with an adaptive scan block at the end of every level that is wide enough.

    ``forward(x, return_orders=False)`` is that of :class:`~bestiary.shared.vision.unet.SegUNet`: full-resolution
    logits in eval mode, in training with deep supervision a list from full to lowest resolution.

    Paper: arXiv:2508.07237. Source: the official code, trainers ``…_asmunet_enc`` (blocks in the encoder, the
    default) and ``…_asmunet`` (``asm_in_decoder=True``).

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        num_classes: channels of the logits, background included.
        features: channels of each level, fine to coarse.
        strides: one number or tuple per level.
        kernel_sizes: one number or tuple per level.
        convs_per_stage: a pair (encoder, decoder), each one number or one per level (the decoder has one level
            less; coarse to fine). A single number is for both.
        asm_min_channels: a level has a block when its channels exceed this number (strictly).
        asm_in_decoder: blocks in the decoder too.
        num_groups: as :class:`~bestiary.projects.asm_unet.adaptive_scan.AdaptiveScanMamba`.
        group_length: see there.
        num_slices: see there.
        d_state: see there.
        d_conv: see there.
        expand: see there.
        depth: see there.
        per_group_stack: see there.
        deep_supervision: a head at every decoder level.
        residual: see there.
        checkpoint: see there.
        fused: see there.
        score_terms: see there.
        order: see there.
        score_channel: see there.

    Raises:
        ConfigError: if the lists disagree in length or a value is impossible.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        num_classes: int,
        features: Sequence[int],
        strides: Sequence[PerAxis],
        kernel_sizes: Sequence[PerAxis],
        convs_per_stage: int | Sequence[int | Sequence[int]] = (2, 2),
        asm_min_channels: int = 64,
        asm_in_decoder: bool = False,
        num_groups: int = 3,
        group_length: int = 2048,
        num_slices: int = 5,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        depth: int = 2,
        per_group_stack: bool = False,
        deep_supervision: bool = True,
        residual: bool = False,
        checkpoint: bool = False,
        fused: bool = True,
        score_terms: ScoreTerms = "both",
        order: Order = "score",
        score_channel: bool = True,
    ) -> None:
        if isinstance(convs_per_stage, int):
            convs_per_stage = (convs_per_stage, convs_per_stage)
        if len(convs_per_stage) != 2:
            raise ConfigError(f"convs_per_stage must be a pair (encoder, decoder), got {convs_per_stage}")
        mixer = AdaptiveScan(
            min_channels=asm_min_channels,
            num_groups=num_groups,
            group_length=group_length,
            num_slices=num_slices,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            depth=depth,
            per_group_stack=per_group_stack,
            residual=residual,
            checkpoint=checkpoint,
            fused=fused,
            score_terms=score_terms,
            order=order,
            score_channel=score_channel,
        )
        encoder = UNetPlainEncoder(
            spatial_dims, in_channels, features, strides, kernel_sizes, convs_per_stage[0], mixer
        )
        decoder = UNetDecoder(
            encoder, num_classes, convs_per_stage[1], mixer if asm_in_decoder else None, deep_supervision
        )
        super().__init__(encoder, decoder, in_channels)


def build_network(
    spec: DataSpec,
    encoder: nn.Module,
    backbone: TokenMixer | None = None,
    asm_in_decoder: bool = False,
    deep_supervision: bool = True,
    decoder_convs: int | Sequence[int] | None = None,
) -> SegUNet:
    """Join parts that a config built into the same kind of network, with the same names as :class:`ASMUNet`.

    Args:
        spec: the data set: classes and channels.
        encoder: a PyramidEncoder that already holds its mixer.
        backbone: the TokenMixer, which is used here for the decoder alone; None for a plain net.
        asm_in_decoder: put the mixer into the decoder too.
        deep_supervision: a head at every decoder level.
        decoder_convs: conv units per decoder level, one number or one per level, coarse to fine; None: what goes with
            the encoder (of a plain one its own, where they are one number, else 2; 1 of a residual one).

    Returns:
        The network.

    Raises:
        ConfigError: if the encoder is missing or no pyramid encoder, or there is no mixer for the decoder.
    """
    missing = [name for name in ("channels", "strides", "kernel_sizes") if not hasattr(encoder, name)]
    if missing:
        raise ConfigError(
            f"this network needs an encoder that yields a pyramid, for example encoder=unet_plain; "
            f"{type(encoder).__name__} has no {', '.join(missing)}"
        )
    if asm_in_decoder and backbone is None:
        raise ConfigError("asm_in_decoder=true needs a mixer: choose backbone=adaptive_scan or another of kind mixer")
    if backbone is not None and getattr(encoder, "num_mixers", None) == 0:
        raise ConfigError(
            f"the mixer builds no block: no level has more channels than its min_channels ({encoder.channels}); "
            "lower backbone.min_channels, or choose backbone=none for the plain net"
        )
    if decoder_convs is None:
        decoder_convs = int(getattr(encoder, "decoder_convs", 2))
    mixer = backbone if asm_in_decoder else None
    decoder = UNetDecoder(encoder, spec.num_classes, decoder_convs, mixer, deep_supervision)  # type: ignore[arg-type]
    return SegUNet(encoder, decoder, spec.in_channels)
