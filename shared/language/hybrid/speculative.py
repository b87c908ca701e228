"""Greedy decoding several tokens at a time: the MTP module drafts, one pass of the model checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.language.hybrid.cache import HybridCache
from bestiary.shared.language.hybrid.layout import Layout
from bestiary.shared.language.hybrid.model import HybridLM


@dataclass
class Speculation:
    """What came out.

    Attributes:
        ids: the new tokens, a stop token included.
        accepted: how many tokens each pass of the model gave: one more than the drafts that were right, and no more
            than were asked for.
    """

    ids: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def mean_accepted(self) -> float:
        """Tokens a pass behind the prompt's own, on average; 1 is what plain decoding gives."""
        return sum(self.accepted) / len(self.accepted) if self.accepted else 1.0


@torch.no_grad()
def speculative_greedy(
    model: HybridLM, ids: Sequence[int], max_new_tokens: int, draft: int = 3, stop_ids: Sequence[int] = ()
) -> Speculation:
    """Complete one row; the tokens are those of plain greedy decoding, as far as rounding does not decide.

    With float16 states a pass rounds once for all its tokens where single steps round each.

    The model's first MTP module is applied ``draft`` times, each time to what it said before. A pass over all drafts
    then tells how many are right, and the cache goes back to the last of these.

    Paper: arXiv:2211.17192 (the greedy case); arXiv:2512.20856 (one MTP module applied recursively).

    Args:
        model: with an MTP module.
        ids: the prompt, one token at least.
        max_new_tokens: most new tokens.
        draft: tokens that are drafted for each pass.
        stop_ids: tokens that end the row.

    Raises:
        ConfigError: if the model has no MTP module, bounds step sizes as transformers does (whose single steps differ
            from its passes), or ``draft`` is not positive.
    """
    if not len(model.mtp):
        raise ConfigError("speculative decoding needs an MTP module: backbone.config.num_nextn_predict_layers is 0")
    if model.config.transformers_clamp:
        raise ConfigError("speculative decoding needs passes that agree with steps: transformers_clamp must be false")
    if draft < 1 or max_new_tokens < 1 or not len(ids):
        raise ConfigError("speculative decoding needs a prompt, draft >= 1 and max_new_tokens >= 1")
    device = model.embeddings.weight.device
    cache = model.new_cache(1)
    cache.record = True
    ahead = HybridCache.empty(model.config, model.config.mtp_pattern, 1, model.embeddings.weight)
    result = Speculation()

    new = torch.tensor([list(ids)], device=device)
    logits, hidden, _ = model(model.embed(new), cache=cache, logits_to_keep=1)
    verified = torch.cat([new[0, 1:], logits[0, -1:].argmax(-1)])  # the token after each of those in the cache
    while True:
        result.ids += [int(verified[-1])] if not result.ids else verified[-result.accepted[-1] :].tolist()
        stop = next((i for i, token in enumerate(result.ids) if token in stop_ids), None)
        if stop is not None or len(result.ids) >= max_new_tokens:
            wanted = min(max_new_tokens, len(result.ids) if stop is None else stop + 1)
            if result.accepted:
                result.accepted[-1] -= len(result.ids) - wanted
            result.ids = result.ids[:wanted]
            return result
        drafts = _draft(model, ahead, hidden, verified, draft)
        chunk = torch.cat([verified[-1:], drafts])[None]
        logits, hidden, _ = model(model.embed(chunk), cache=cache)
        said = logits[0].argmax(-1)
        right = int((drafts == said[:-1]).long().cumprod(0).sum())
        result.accepted.append(right + 1)
        cache.truncate(cache.length - draft + right)
        hidden, verified = hidden[:, : right + 1], said[: right + 1]


def _draft(
    model: HybridLM, ahead: HybridCache, hidden: torch.Tensor, following: torch.Tensor, draft: int
) -> torch.Tensor:
    """Draft tokens behind ``following``, whose first ones go with ``hidden`` (1, n, D); (draft,) int64."""
    module = model.mtp[0]
    drafts: list[torch.Tensor] = []
    known = ahead.length + hidden.shape[1]
    tokens = following[None]
    for _ in range(draft):
        layout = Layout(1, hidden.shape[1], ahead.length, hidden.device)
        hidden = module(hidden, model.embed(tokens), layout, ahead)[0][:, -1:]
        tokens = model.lm_head(hidden)[:, -1].argmax(-1, keepdim=True)
        drafts.append(tokens[0])
    ahead.truncate(known)  # what was only drafted is not known
    return torch.cat(drafts)
