"""ASM-UNet's LightningModule: what it adds to the base is its report."""

from __future__ import annotations

from typing import Any

from torch import nn

from bestiary.projects.asm_unet.adaptive_scan import AdaptiveScanMamba
from bestiary.shared.core.module import BestiaryModule
from bestiary.shared.nn.mixers import RasterMamba
from bestiary.shared.viz.segmentation_report import segmentation_report

NAMES = {AdaptiveScanMamba: "ASM-UNet", RasterMamba: "raster order"}


class ASMUNetModule(BestiaryModule):
    """Prints scores per class beside the baselines, and draws an overlay and the curves."""

    @classmethod
    def report(cls, model: nn.Module, run: Any) -> list[str]:
        """See :func:`~bestiary.shared.viz.segmentation_report.segmentation_report`."""
        kinds = {type(module) for module in model.modules()}
        name = next((name for kind, name in NAMES.items() if kind in kinds), "plain net")
        return segmentation_report(model, run, name)
