"""Dice and cross-entropy for segmentation, with deep supervision (nnU-Net's loss)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import IGNORE_INDEX, Batch, split_rows
from bestiary.shared.core.protocols import Loss, Output, StepContext


class Segmentation:
    """Soft Dice plus cross-entropy over all resolutions.

    Each sample has its own loss: cross-entropy is the mean over its voxels, and Dice the mean over its classes. The sum
    over samples is returned, so a step that is accumulated or distributed equals the big batch exactly. With
    ``batch_dice`` the sums of Dice run over the micro-batch instead, as nnU-Net does for 2D and for sets with a
    low-resolution stage: then the result depends on how the batch is split.

    Dice of a class is (2 * sum(p * y) + smooth) / (sum(p) + sum(y) + smooth) with p the softmax; the loss is 1 - Dice
    (nnU-Net writes -Dice, which has the same gradient). Lower resolutions are compared with the label at the nearest
    voxel. A level of weight 0 takes part with a zero gradient, so that every head has one under DDP. Voxels labelled
    :data:`~bestiary.shared.core.examples.IGNORE_INDEX` take no part: cross-entropy is the mean over the others.

    Args:
        dice_weight: factor on the Dice loss.
        ce_weight: factor on the cross-entropy.
        batch_dice: see above.
        deep_supervision_weights: of the outputs from full to lowest resolution, scaled to sum 1; None is 1, 1/2, 1/4
            ... with 0 for the lowest (nnU-Net's).
        micro_batch: samples that go through the network at once; None is the whole step.
        smooth: see above.
        include_background: whether Dice counts class 0.

    Paper: arXiv:1809.10486 (nnU-Net), with the constants of its version 2.5.
    """

    def __init__(
        self,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        batch_dice: bool = False,
        deep_supervision_weights: Sequence[float] | None = None,
        micro_batch: int | None = None,
        smooth: float = 1e-5,
        include_background: bool = False,
    ) -> None:
        if dice_weight < 0 or ce_weight < 0 or dice_weight + ce_weight == 0:
            raise ConfigError(f"dice_weight {dice_weight} and ce_weight {ce_weight}: at least one must be above 0")
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(f"micro_batch must be 1 or more, or null for the whole step, not {micro_batch}")
        self.dice_weight, self.ce_weight = dice_weight, ce_weight
        self.batch_dice = batch_dice
        self.weights = None if deep_supervision_weights is None else tuple(deep_supervision_weights)
        self.micro_batch = micro_batch
        self.smooth = smooth
        self.include_background = include_background

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """The batch in pieces of ``micro_batch`` samples."""
        return split_rows(batch, self.micro_batch)

    def loss(self, model: nn.Module, batch: Batch, ctx: StepContext) -> Loss:
        """Run the model and compare its outputs with the label.

        Args:
            model: ``model(batch)`` gives an Output with logits (B, C, *S) and, where it has them, aux_logits.
            batch: with image and label (B, 1, *S).
            ctx: not used.
        """
        return self.compare(model(batch), batch["label"])  # type: ignore[typeddict-item]

    def compare(self, output: Output, label: torch.Tensor) -> Loss:
        """The loss of given outputs.

        Args:
            output: logits (B, C, *S), aux_logits from fine to coarse.
            label: (B, 1, *S) int64.

        Raises:
            ConfigError: if deep_supervision_weights are not as many as the outputs.
        """
        levels = [output.logits, *output.aux_logits]
        total = torch.zeros((), device=output.logits.device, dtype=_precise(output.logits).dtype)
        metrics: dict[str, torch.Tensor] = {}
        for weight, logits in zip(level_weights(len(levels), self.weights), levels, strict=True):
            logits = _precise(logits)
            if weight == 0:
                # Element by element, and in fp32: a sum could overflow, and infinity times 0 is not 0.
                total = total + (logits * 0.0).sum()
                continue
            target = nearest_label(label, logits.shape[2:])
            hidden = target == IGNORE_INDEX
            known = ~hidden if bool(hidden.any()) else None
            ce = F.cross_entropy(logits, target[:, 0], reduction="none", ignore_index=IGNORE_INDEX).flatten(1)
            # What is ignored adds 0 to the sum, and must not count in the mean either.
            ce = (ce.mean(1) if known is None else ce.sum(1) / known.flatten(1).sum(1).clamp_min(1)).sum()
            dice = (1 - self._dice(logits, target, known)).sum()
            total = total + weight * (self.ce_weight * ce + self.dice_weight * dice)
            if not metrics:
                metrics = {"ce": ce.detach(), "dice_loss": dice.detach()}
        return Loss(total, float(label.shape[0]), metrics)

    def _dice(self, logits: torch.Tensor, target: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor:
        """Mean soft Dice over classes in the known voxels (B, 1, *S), all where None; one number a sample, (B,)."""
        probability = logits.softmax(1)
        truth = torch.zeros_like(probability).scatter_(
            1, target if known is None else target.masked_fill(~known, 0), 1.0
        )
        if known is not None:
            probability, truth = probability * known, truth * known
        if not self.include_background:
            probability, truth = probability[:, 1:], truth[:, 1:]
        both, size = (probability * truth).flatten(2).sum(2), (probability + truth).flatten(2).sum(2)
        if self.batch_dice:
            both, size = both.sum(0, keepdim=True), size.sum(0, keepdim=True)
        dice = ((2 * both + self.smooth) / (size + self.smooth).clamp_min(1e-8)).mean(1)
        return dice.expand(logits.shape[0])


def level_weights(levels: int, weights: Sequence[float] | None = None) -> list[float]:
    """Weights of the outputs from full to lowest resolution, with sum 1.

    Args:
        levels: how many outputs there are.
        weights: None for 1, 1/2, 1/4 ... with 0 for the lowest.

    Raises:
        ConfigError: if there are not as many weights as outputs, or none is above 0.
    """
    if levels == 1 and weights is None:
        return [1.0]
    chosen = [0.5**i for i in range(levels - 1)] + [0.0] if weights is None else list(weights)
    if len(chosen) != levels or min(chosen) < 0 or sum(chosen) == 0:
        raise ConfigError(f"deep_supervision_weights {chosen} do not fit {levels} outputs (one each, not all 0)")
    return [w / sum(chosen) for w in chosen]


def nearest_label(label: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A label (B, 1, *S) at another resolution (B, 1, *shape), from the nearest voxels."""
    if tuple(label.shape[2:]) == tuple(shape):
        return label
    return F.interpolate(label.float(), size=tuple(shape), mode="nearest-exact").long()


def _precise(logits: torch.Tensor) -> torch.Tensor:
    # Sums over a whole patch overflow in half precision.
    return logits if logits.dtype == torch.float64 else logits.float()
