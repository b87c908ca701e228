"""Log-probabilities of completions under the policy that is trained, by the code that sampled them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bestiary.shared.core.examples import Batch
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.language.generate import sampling_logprobs, select_rows


def completion_logits(
    model: nn.Module, prompts: Batch, owner: torch.Tensor, ids: torch.Tensor, present: torch.Tensor
) -> torch.Tensor:
    """Logits that each completion token was drawn from; a prompt is encoded once for all its completions.

    Where the backbone's cache carries gradients, the decoder runs over a prompt once and its keys and values are shared
    by the group; elsewhere the prompt's embeddings (its images and audio in them) are, and the decoder runs over whole
    rows. The gradient is the same.

    Args:
        model: with ``backbone`` and, for prompts that hold more than text, ``embed``.
        prompts: P left-padded prompts.
        owner: (R,) which prompt each row completes.
        ids: (R, T) right-padded completions.
        present: (R, T) bool, false on padding.

    Returns:
        (R, T, V): entry t is what token t was drawn from.
    """
    backbone: Any = model.backbone
    embed: Any = getattr(model, "embed", None)
    batch: Any = prompts
    mask, position, width = batch["attention_mask"], batch["position_ids"], ids.shape[1]
    prefix = embed(prompts) if embed is not None else backbone.embed(batch["input_ids"])
    earlier = present[:, :-1].to(mask.dtype)
    steps = torch.arange(1, width, device=ids.device)
    later = position[owner, -1:] + steps
    after = backbone.embed(ids[:, :-1])
    if not getattr(backbone, "cache_carries_gradient", False):
        rows = torch.cat([prefix[owner], after.to(prefix.dtype)], 1)
        whole = torch.cat([mask[owner], earlier], 1)
        logits, _, _ = backbone(rows, whole, torch.cat([position[owner], later], 1), None, None, width)
        return logits
    cache = backbone.new_cache(len(mask))
    first, _, cache = backbone(prefix, mask, position, None, cache, 1)
    if width == 1:
        return first[owner]
    cache = select_rows(cache, owner)
    rest, _, _ = backbone(after, torch.cat([mask[owner], earlier], 1), later, None, cache, 0)
    return torch.cat([first[owner], rest], 1)


def completion_logprobs(
    model: nn.Module,
    prompts: Batch,
    owner: torch.Tensor,
    ids: torch.Tensor,
    present: torch.Tensor,
    sampling: Sampling,
) -> torch.Tensor:
    """(R, T) float32 log-probabilities of the completions' tokens, cut and renormalised as when they were drawn.

    Arguments are those of :func:`completion_logits`, and the sampling. A token that the trainer's own cut leaves out
    (a rounding away from the sampler's) has minus infinity.
    """
    logits = completion_logits(model, prompts, owner, ids, present)
    return sampling_logprobs(logits, sampling).gather(2, ids[..., None])[..., 0]
