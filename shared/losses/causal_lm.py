"""Next-token cross-entropy, summed over the tokens that carry a label."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from bestiary.shared.core.examples import IGNORE_INDEX, Batch, split_rows
from bestiary.shared.core.protocols import Loss, StepContext


class CausalLM:
    """The objective of language modelling and of supervised fine-tuning: labels decide which tokens count.

    Every labelled token of the whole step weighs the same, however it is cut into micro-batches and ranks. What a model
    adds in training (:class:`~bestiary.shared.core.protocols.Output`) counts where it has a weight here: router balance
    is a mean over a micro-batch's sequences, a multi-token head's loss a mean over the tokens it predicts; both are
    weighed by the micro-batch's share of the step's tokens.

    Args:
        micro_batch: rows a backward pass, or None for the rank's whole step.
        balance_weight: factor of the router balance of MoE layers, or None to leave it out.
        mtp_weight: factor of the mean over the multi-token heads' losses, or None: they are neither run nor trained.
        model: what will be trained; its multi-token heads are switched on or off, and frozen where they are off.
    """

    def __init__(
        self,
        micro_batch: int | None = None,
        balance_weight: float | None = None,
        mtp_weight: float | None = None,
        model: nn.Module | None = None,
    ):
        self.micro_batch, self.balance_weight, self.mtp_weight = micro_batch, balance_weight, mtp_weight
        for module in model.modules() if model is not None else ():
            look_ahead = getattr(module, "look_ahead", None)
            if callable(look_ahead):
                look_ahead(mtp_weight is not None)

    def loss(self, model: nn.Module, batch: Batch, ctx: StepContext) -> Loss:
        """Sum of cross-entropies; terms are tokens."""
        labels = batch["labels"]  # type: ignore[typeddict-item]
        output = model(batch)
        total, terms = next_token_loss(output.logits, labels, 1)
        metrics = {"cross_entropy": total.detach()} if output.aux_losses or output.aux_logits else {}
        if self.balance_weight is not None and "balance" in output.aux_losses:
            balance = output.aux_losses["balance"] * terms
            metrics["balance"] = balance.detach()
            total = total + self.balance_weight * balance
        if self.mtp_weight is not None and output.aux_logits:
            seq_idx = batch["seq_idx"]  # type: ignore[typeddict-item]
            for depth, logits in enumerate(output.aux_logits, 1):
                ahead, count = next_token_loss(logits, labels, depth + 1, seq_idx)
                ahead = ahead / count.clamp(min=1) * terms
                metrics[f"mtp_{depth}"] = ahead.detach()
                total = total + self.mtp_weight / len(output.aux_logits) * ahead
        return Loss(total, terms, metrics)

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """Consecutive rows, ``micro_batch`` at a time."""
        return split_rows(batch, self.micro_batch)


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, ahead: int, seq_idx: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the token ``ahead`` places further, summed over those with a label.

    Args:
        logits: (B, T, V); half precision is widened first.
        labels: (B, T), :data:`IGNORE_INDEX` where there is no loss.
        ahead: 1 for the next token.
        seq_idx: (B, T) of packed rows: what is read must be of one sequence. The token foretold may begin the next one,
            as for the next token; whether that is learned is its label's to say.

    Returns:
        The sum, and how many tokens it has.
    """
    target = labels[:, ahead:]
    if seq_idx is not None and target.shape[1]:
        # A number that comes again is another sequence.
        runs = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).cumsum(1)
        inside = runs[:, ahead - 1 : -1] == runs[:, : target.shape[1]]
        target = target.masked_fill(~inside, IGNORE_INDEX)
    scores = logits[:, : target.shape[1]].flatten(0, 1)
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    total = F.cross_entropy(scores, target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total, (target != IGNORE_INDEX).sum()
