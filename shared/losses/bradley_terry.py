"""Bradley-Terry: a reward model learns which of two answers is preferred."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Batch, split_rows
from bestiary.shared.core.protocols import Loss, StepContext


class BradleyTerry:
    """−log σ(r_chosen − r_rejected), summed over pairs; a term is a pair.

    The rows of a batch are pairs in turn: chosen, rejected, chosen, rejected, … The model's ``logits`` are (B, 1), one
    reward a row.

    Args:
        micro_batch: pairs a backward pass, or None for the rank's whole step.
    """

    loss_name = "bradley_terry"
    headline = ("bradley_terry", "pair_accuracy")

    def __init__(self, micro_batch: int | None = None):
        self.micro_batch = micro_batch

    def loss(self, model: nn.Module, batch: Batch, ctx: StepContext) -> Loss:
        """Sum over pairs; logs the share of pairs in the right order, and the mean margin.

        Raises:
            ConfigError: if the model does not give one number a row, or the rows are no pairs.
        """
        rewards = model(batch).logits
        if rewards.dim() != 2 or rewards.shape[1] != 1 or rewards.shape[0] % 2:
            raise ConfigError(
                f"Bradley-Terry needs one reward for each row of pairs, and the model gave {tuple(rewards.shape)}: "
                "use model=reward_model"
            )
        if rewards.dtype in (torch.bfloat16, torch.float16):
            rewards = rewards.float()
        margin = rewards[0::2, 0] - rewards[1::2, 0]
        metrics = {"pair_accuracy": (margin > 0).sum().detach(), "margin": margin.sum().detach()}
        return Loss(-F.logsigmoid(margin).sum(), torch.tensor(float(len(margin)), device=margin.device), metrics)

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """Consecutive pairs, ``micro_batch`` at a time."""
        return split_rows(batch, None if self.micro_batch is None else 2 * self.micro_batch)
