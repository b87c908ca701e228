"""How often an audio encoder's supervised heads are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.language.causal_lm import move
from bestiary.shared.losses.attributes import attribute_logits


class AttributeAccuracy:
    """Accuracy of each linear head (:mod:`bestiary.shared.losses.attributes`) and their mean.

    An example counts for an attribute if it has a clip and says its class (a number, 0 or more). A model without heads
    has nothing to score.

    Args:
        batch_size: clips at once.
    """

    name = "attribute_accuracy"
    version = "1"

    def __init__(self, batch_size: int = 64):
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """``accuracy/ATTRIBUTE`` and ``accuracy/mean``; nothing for a model without heads.

        Raises:
            ConfigError: if no example says an attribute that a head is for.
        """
        if not hasattr(model, "attribute_heads"):
            return {}
        processor: Any = model.processor()  # type: ignore[operator]
        device = next(model.parameters()).device
        right: dict[str, int] = {}
        count: dict[str, int] = {}
        for start in range(0, len(examples), self.batch_size):
            chunk = [examples[i] for i in range(start, min(start + self.batch_size, len(examples)))]
            batch = move(processor(chunk, "eval"), device)
            media = batch["media"].get("audio")
            if media is None:
                continue
            heard = torch.zeros(len(chunk), dtype=torch.bool, device=device)
            heard[media["owner"]] = True
            for name, logits in attribute_logits(model, media, len(chunk)).items():
                target = batch.get(f"class/{name}")
                if target is not None:
                    known = heard & (target >= 0)
                    right[name] = right.get(name, 0) + int((logits.argmax(-1) == target)[known].sum())
                    count[name] = count.get(name, 0) + int(known.sum())
        if not sum(count.values()):
            raise ConfigError("no held-out clip says an attribute that the model has a head for")
        out = {f"accuracy/{name}": right[name] / count[name] for name in count if count[name]}
        return out | {"accuracy/mean": sum(out.values()) / len(out)}
