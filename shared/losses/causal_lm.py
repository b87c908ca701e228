"""Next-token cross-entropy, summed over the tokens that carry a label."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from bestiary.shared.core.examples import IGNORE_INDEX, Batch, batch_size, select_rows
from bestiary.shared.core.protocols import Loss, StepContext


class CausalLM:
    """The objective of language modelling and of supervised fine-tuning: labels decide which tokens count.

    Every labelled token of the whole step weighs the same, however it is cut into micro-batches and ranks.

    Args:
        micro_batch: rows a backward pass, or None for the rank's whole step.
    """

    def __init__(self, micro_batch: int | None = None):
        self.micro_batch = micro_batch

    def loss(self, model: nn.Module, batch: Batch, ctx: StepContext) -> Loss:
        """Sum of cross-entropies; terms are tokens."""
        labels = batch["labels"][:, 1:]  # type: ignore[typeddict-item]
        logits = model(batch).logits[:, :-1]
        total = F.cross_entropy(
            logits.flatten(0, 1).float() if logits.dtype in (torch.bfloat16, torch.float16) else logits.flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        return Loss(total, (labels != IGNORE_INDEX).sum())

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """Consecutive rows, ``micro_batch`` at a time."""
        rows = batch_size(batch)
        size = self.micro_batch or rows
        return [select_rows(batch, range(i, min(i + size, rows))) for i in range(0, rows, size)]
