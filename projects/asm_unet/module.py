"""ASM-UNet's LightningModule: what it adds to the base is its report."""

from __future__ import annotations

from typing import Any

from torch import nn

from bestiary.shared.core.module import BestiaryModule
from bestiary.shared.viz.segmentation_report import segmentation_report


class ASMUNetModule(BestiaryModule):
    """Prints scores per class beside the baselines, and draws an overlay and the curves."""

    @classmethod
    def report(cls, model: nn.Module, run: Any) -> list[str]:
        """See :func:`~bestiary.shared.viz.segmentation_report.segmentation_report`."""
        return segmentation_report(model, run, net_name(model))


def net_name(model: nn.Module) -> str:
    """What to call a net: its own ``report_name``, else its mixer's name, else its encoder's ``report_name``."""
    network = getattr(model, "network", None)
    encoder = getattr(network, "encoder", None)
    parts = [network, *(m for m in model.modules() if m not in (network, encoder)), encoder]
    return next((str(part.report_name) for part in parts if hasattr(part, "report_name")), "plain net")
