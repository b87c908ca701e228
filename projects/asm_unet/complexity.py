"""Parameters and multiply-accumulates of a network, on fake tensors: no memory, no arithmetic.

Paper: arXiv:2508.07237v1 prints figures of its own, which are not available; the values compared with come from the
official code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock


@dataclass
class SequenceOps:
    """What the sequence ops of a forward pass would cost.

    Attributes:
        conv_macs: multiply-accumulates of the short causal convolutions.
        scan_flops: floating point operations of the selective scans.
    """

    conv_macs: int = 0
    scan_flops: int = 0


def measure(
    patch: Sequence[int],
    num_classes: int,
    features: Sequence[int],
    strides: Sequence[Sequence[int]],
    kernel_sizes: Sequence[Sequence[int]],
    asm: bool = True,
    **net: Any,
) -> dict[str, float]:
    """Build the net of fake tensors and count.

    Multiply-accumulates are those of convolutions, transposed convolutions, linear layers and matrix products of one
    forward pass in evaluation, batch 1, one input channel, without the heads of deep supervision below the full
    resolution. Scans are counted apart, by the formula 9·L·d_inner·16 + 2·L·d_inner floating point operations each,
    whatever a backend really executes. The blocks compute as the official code does; with ``fused``, their first linear
    layer is shared over the score groups, which takes fewer.

    Args:
        patch: voxels of the input, one number per axis.
        num_classes: with background.
        features: channels per level.
        strides: per level and axis.
        kernel_sizes: per level and axis.
        asm: whether levels with more than 64 channels get the block; without, it is the plain net.
        **net: further arguments of ``ASMUNet`` (``asm_in_decoder``, ``per_group_stack``).

    Returns:
        ``params`` (a count), ``gmacs`` (10^9) and ``scan_gflops`` (10^9).
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from bestiary.projects.asm_unet.model import ASMUNet

    # Fake rather than meta tensors: they answer as a CPU's would where code asks for the device (autocast does).
    fake = FakeTensorMode()
    with fake:
        model = ASMUNet(
            spatial_dims=len(patch),
            in_channels=1,
            num_classes=num_classes,
            features=tuple(features),
            strides=tuple(map(tuple, strides)),
            kernel_sizes=tuple(map(tuple, kernel_sizes)),
            asm_min_channels=64 if asm else max(features),
            deep_supervision=True,
            **{"fused": False, **net},
        ).eval()
        image = torch.empty(1, 1, *patch)
    with fake, torch.no_grad(), counted_sequence_ops() as ops, FlopCounterMode(display=False) as counter:
        model(image)
    return {
        "params": float(sum(p.numel() for p in model.parameters())),
        "gmacs": (counter.get_total_flops() / 2 + ops.conv_macs) / 1e9,
        "scan_gflops": ops.scan_flops / 1e9,
    }


@contextmanager
def counted_sequence_ops() -> Iterator[SequenceOps]:
    """Count the scans and causal convolutions by formula instead of running them.

    A backend's own operations would depend on the backend (the reference multiplies small matrices a token at a
    time, a compiled one is a single call that torch's counter cannot look into), and would take L steps here.
    """
    import torch

    from bestiary.kernels import causal_conv1d, selective_scan

    found = SequenceOps()

    def scan(u_BDL: torch.Tensor, delta: torch.Tensor, A_DN: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        states = A_DN.shape[1]
        found.scan_flops += 9 * u_BDL.numel() * states + 2 * u_BDL.numel()
        return torch.empty_like(u_BDL)

    def conv(x_BDL: torch.Tensor, weight_DW: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found.conv_macs += x_BDL.numel() * weight_DW.shape[1]
        return torch.empty_like(x_BDL)

    with (
        mock.patch.object(selective_scan, "implementation", return_value=scan),
        mock.patch.object(causal_conv1d, "implementation", return_value=conv),
    ):
        yield found
