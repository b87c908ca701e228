"""Supervised heads on an audio encoder: what stands in for a pretrained one where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import IGNORE_INDEX, Batch, batch_size, split_rows
from bestiary.shared.core.protocols import Loss, StepContext


class Attributes:
    """Cross-entropy of linear heads on the mean of a clip's encoder tokens, added up over attributes.

    A small encoder and a small decoder that both begin at random learn nothing together from the loss on words alone;
    an encoder that already tells an organ from a flute does. Music Flamingo's encoder is pretrained on captions of
    13 million clips; this takes the place of that on a laptop, and is called what it is. The heads are put on the model
    by :func:`add_attribute_heads` and stay there, so that what they know can be measured.

    Args:
        model: with ``encoder`` and ``attribute_heads``.
        classes: attribute to its number of classes; an example's ``meta["classes"]`` holds the numbers.
        time_mask: frames of each clip that are covered at random in training, in one run; 0 covers none.
        micro_batch: clips a backward pass, or None for all.

    Raises:
        ConfigError: for a model without heads, or classes that are none.
    """

    def __init__(
        self, model: nn.Module, classes: Mapping[str, int], time_mask: int = 0, micro_batch: int | None = None
    ):
        if not hasattr(model, "attribute_heads"):
            raise ConfigError("supervised attributes need heads: prepare the stage with add_attribute_heads")
        if not classes or min(classes.values()) < 2:
            raise ConfigError(f"attributes need two classes or more each, not {dict(classes)}")
        self.classes, self.time_mask, self.micro_batch = dict(classes), time_mask, micro_batch

    def micro_batches(self, batch: Batch) -> list[Batch]:
        """Parts of at most ``micro_batch`` clips."""
        return split_rows(batch, self.micro_batch)

    def loss(self, model: nn.Module, batch: Batch, ctx: StepContext) -> Loss:
        """Summed over clips; a term is a clip. One whose attribute is not known counts as not right in the accuracy.

        Raises:
            BadDataError: for a batch without audio, or without a target that a head is for.
        """
        values: Any = batch
        if "audio" not in values["media"]:
            raise BadDataError(f"the data set's examples have no audio to learn attributes from: {values['ids'][0]!r}")
        media = dict(values["media"]["audio"])
        if self.time_mask:
            media["features"] = covered(media["features"], media["lengths"], self.time_mask)
        logits = attribute_logits(model, media, batch_size(batch))
        total, metrics = torch.zeros((), device=media["features"].device), {}
        for name in self.classes:
            if f"class/{name}" not in values:
                raise BadDataError(f"the data set does not say the attribute {name!r} of its clips")
            target = values[f"class/{name}"]
            wanted = torch.where(target < 0, IGNORE_INDEX, target)
            total = total + F.cross_entropy(logits[name].float(), wanted, reduction="sum", ignore_index=IGNORE_INDEX)
            metrics[f"accuracy/{name}"] = (logits[name].argmax(-1) == target).sum().detach()
        return Loss(total, batch_size(batch), metrics)


def add_attribute_heads(model: nn.Module, classes: Mapping[str, int]) -> nn.Module:
    """A ``prepare`` step: put a linear head an attribute on a model's audio encoder.

    Args:
        model: with ``encoder``.
        classes: attribute to its number of classes.

    Raises:
        ConfigError: for a model without an encoder of audio.
    """
    encoder: Any = getattr(model, "encoder", None)
    if not hasattr(encoder, "token_counts"):
        raise ConfigError("supervised attributes need a model with an encoder of audio")
    if not hasattr(model, "attribute_heads"):
        model.attribute_heads = nn.ModuleDict({n: nn.Linear(encoder.out_dim, c) for n, c in classes.items()})
    return model


def attribute_logits(model: nn.Module, media: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """Logits (B, classes) of each head on the mean of a row's encoder tokens.

    Args:
        model: with ``encoder`` and ``attribute_heads``.
        media: the audio of a batch.
        rows: B.
    """
    encoder: Any = model.encoder
    tokens, counts = encoder(media["features"], media["lengths"])
    owner = media["owner"].repeat_interleave(counts)
    sums = tokens.new_zeros(rows, tokens.shape[1]).index_add_(0, owner, tokens)
    number = torch.zeros(rows, dtype=tokens.dtype, device=tokens.device).index_add_(
        0, media["owner"], counts.to(tokens)
    )
    pooled = sums / number.clamp(min=1)[:, None]
    heads: Any = model.attribute_heads
    return {name: head(pooled) for name, head in heads.items()}


def covered(features: torch.Tensor, lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """Features (W, M, T) with up to ``longest`` real frames of each window set to the mean of its real ones.

    Paper: arXiv:1904.08779 (SpecAugment), the time mask alone.
    """
    widths = (torch.rand(len(features), device=features.device) * (longest + 1)).long().minimum(lengths)
    starts = (torch.rand(len(features), device=features.device) * (lengths - widths + 1)).long()
    frame = torch.arange(features.shape[-1], device=features.device)
    real = (frame < lengths[:, None])[:, None]
    mean = (features * real).sum((1, 2)) / (lengths * features.shape[1])
    inside = (frame >= starts[:, None]) & (frame < (starts + widths)[:, None])
    return torch.where(inside[:, None], mean[:, None, None].to(features), features)
