"""Policy-gradient losses as pure functions of (logprobs, old_logprobs, rewards, mask).

A :class:`Rule` is a choice of baseline, scale, ratio, clipping, averaging, KL and importance correction; :data:`RULES`
names those of the papers. Shapes: P prompts, G completions of each, R = P·G rows (prompt-major), T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from bestiary.shared.core.build import nearest
from bestiary.shared.core.errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """How rewards become a loss.

    Attributes:
        baseline: what is taken off a reward: the ``mean`` of its group, the mean of the others in the group
            (``leave_one_out``), or nothing.
        scale: what it is divided by: the standard deviation of its ``group`` (n − 1, as in TRL and verl), of the
            ``batch``, or nothing.
        average: over all tokens of the step (``token``), over tokens and then sequences (``sequence``), or the sum over
            tokens by ``length``, then over sequences (``constant``).
        length: the constant of ``constant``; None is the longest completion that the sampling allows.
        ratio: ``token``, or ``sequence``: exp of the mean log ratio of a sequence, for all its tokens.
        clip_low, clip_high: the ratio is clipped to [1 − clip_low, 1 + clip_high]; None does not clip on that side.
        dual_clip: with a negative advantage the objective is at least ``dual_clip`` × advantage; None is no bound.
        surrogate: ``clip`` is PPO's; ``cispo`` clips the ratio as a constant factor of the log-probability, so no token
            loses its gradient.
        kl: weight of the k3 estimate of KL(policy || reference).
        correction: weight of trainer over sampler, exp(old − sampler): ``none``, per ``token``, or per ``sequence``
            (product over its tokens).
        correction_kind: what happens to a weight above ``correction_cap`` or below ``correction_floor``: ``truncate``
            to the bound, or ``mask``: its tokens count in the average and carry no gradient.
        mask_truncated: completions that were cut by the length limit are left out of the loss and of its average
            (DAPO's overlong filter); they stay in their group's statistics.
        eps: added to the standard deviation.
    """

    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    scale: Literal["group", "batch", "none"] = "group"
    average: Literal["token", "sequence", "constant"] = "token"
    length: float | None = None
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    surrogate: Literal["clip", "cispo"] = "clip"
    kl: float = 0.0
    correction: Literal["none", "token", "sequence"] = "none"
    correction_kind: Literal["truncate", "mask"] = "truncate"
    correction_cap: float = 2.0
    correction_floor: float = 0.0
    mask_truncated: bool = False
    eps: float = 1e-6


RULES: dict[str, Rule] = {
    # Paper: arXiv:2402.03300 (DeepSeekMath) Eq. 3, 4. Its KL weight is 0.04; here it must be asked for.
    "grpo": Rule(average="sequence"),
    # Paper: arXiv:2503.20783 (Dr. GRPO) Sec. 3.2: no std, no division by the row's own length.
    "dr_grpo": Rule(scale="none", average="constant"),
    # Paper: arXiv:2503.14476 (DAPO) Eq. 8–12.
    "dapo": Rule(clip_high=0.28, mask_truncated=True),
    # Paper: arXiv:2507.18071 (GSPO) Eq. 5–7, clip range of its Sec. 5.1.
    "gspo": Rule(average="sequence", ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    # Paper: arXiv:2402.14740 (RLOO): leave-one-out, the sequence is one action, so tokens are summed.
    "rloo": Rule(baseline="leave_one_out", scale="none", average="constant", length=1.0),
    # Paper: arXiv:2506.13585 (MiniMax-M1) Eq. 4, 5: only the upper side is bounded.
    "cispo": Rule(surrogate="cispo", clip_low=None, clip_high=2.0),
    # AceReason and Nemotron-Cascade: strictly on-policy, token-level, std: REINFORCE with group-normalised rewards.
    # Paper: arXiv:2505.16400 Sec. 3.1; arXiv:2512.13607 Sec. 4.1. With one update the ratio is 1 and no clip acts.
    "reinforce": Rule(clip_low=None, clip_high=None),
}


def make_rule(name: str = "reinforce", **changes: Any) -> Rule:
    """A rule by name, with changes.

    Raises:
        ConfigError: for an unknown name, field or value.
    """
    if name not in RULES:
        raise ConfigError(f"there is no rule {name!r}{nearest(name, RULES)}; rules: {', '.join(RULES)}")
    known = Rule.__dataclass_fields__
    for key in changes:
        if key not in known:
            raise ConfigError(f"a rule has no {key!r}{nearest(key, known)}; it has {', '.join(known)}")
    rule = replace(RULES[name], **changes)
    for key, allowed in _CHOICES.items():
        if getattr(rule, key) not in allowed:
            raise ConfigError(f"rule.{key} must be one of {', '.join(allowed)}, not {getattr(rule, key)!r}")
    if rule.clip_low is not None and not 0 <= rule.clip_low <= 1:
        raise ConfigError(f"rule.clip_low must be between 0 and 1, or null, not {rule.clip_low!r}")
    for key, least in (("clip_high", 0.0), ("length", 1.0), ("dual_clip", 1.0), ("kl", 0.0)):
        value = getattr(rule, key)
        if value is not None and not value >= least:
            raise ConfigError(f"rule.{key} must be at least {least:g}, not {value!r}")
    if not 0 <= rule.correction_floor <= 1 <= rule.correction_cap:
        raise ConfigError("rule.correction_floor must be between 0 and 1, and correction_cap at least 1")
    return rule


_CHOICES = {
    "baseline": ("mean", "leave_one_out", "none"),
    "scale": ("group", "batch", "none"),
    "average": ("token", "sequence", "constant"),
    "ratio": ("token", "sequence"),
    "surrogate": ("clip", "cispo"),
    "correction": ("none", "token", "sequence"),
    "correction_kind": ("truncate", "mask"),
}


def advantages(rewards: torch.Tensor, rule: Rule) -> torch.Tensor:
    """How much better than its group each completion is.

    A reward of NaN says that the harness failed: the row gets 0 and is left out of its group's statistics. A group
    whose rewards are all equal gets 0 exactly.

    Args:
        rewards: (P, G).
        rule: baseline, scale and eps are read.

    Returns:
        (P, G) float64.
    """
    rewards = rewards.double()
    known = ~rewards.isnan()
    filled = rewards.nan_to_num(0.0)
    count = known.sum(1, keepdim=True)
    mean = filled.sum(1, keepdim=True) / count.clamp(min=1)
    if rule.baseline == "mean":
        centred = rewards - mean
    elif rule.baseline == "leave_one_out":
        # reward − mean of the others = (reward − mean) · n / (n − 1); a row alone has no others.
        centred = (rewards - mean) * count / (count - 1).clamp(min=1)
    else:
        centred = rewards
    if rule.scale == "group":
        square = ((filled - mean) ** 2 * known).sum(1, keepdim=True)
        centred = centred / ((square / (count - 1).clamp(min=1)).sqrt() + rule.eps)
    elif rule.scale == "batch":
        values = rewards[known]
        centred = centred / ((values.std() if len(values) > 1 else torch.tensor(0.0)) + rule.eps)
    flat = spread(rewards) == 0
    if rule.baseline != "none":  # equal rewards leave rounding, which a tiny std would blow up
        centred = centred.masked_fill(flat[:, None], 0.0)
    return centred.nan_to_num(0.0)


def spread(rewards: torch.Tensor) -> torch.Tensor:
    """Largest minus smallest known reward of each group: (P, G) to (P,); 0 where fewer than two are known."""
    high = rewards.nan_to_num(nan=-torch.inf).amax(1)
    low = rewards.nan_to_num(nan=torch.inf).amin(1)
    return (high - low).clamp(min=0).nan_to_num(0.0, neginf=0.0)


def token_weights(mask: torch.Tensor, rule: Rule, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token's loss is multiplied by, and what the sum over the whole step is divided by.

    A row without a token of its own (masked, or truncated under ``mask_truncated``) counts in neither.

    Args:
        mask: (R, T) bool, true on the tokens that carry loss.
        rule: average and length are read.
        longest: the longest completion that the sampling allows, the default of ``length``.

    Returns:
        Weights (R, T) float32 and the number of terms, a scalar.
    """
    weights = mask.float()
    tokens = mask.sum(1)
    if rule.average == "token":
        return weights, tokens.sum()
    by = tokens[:, None].clamp(min=1) if rule.average == "sequence" else float(rule.length or longest)
    return weights / by, (tokens > 0).sum()


def token_losses(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    rule: Rule,
    sampler_logprobs: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of each token, to be multiplied by :func:`token_weights` and summed.

    Args:
        logprobs: (R, T) of the drawn tokens under the policy that is trained; carries the gradient.
        old_logprobs: (R, T) under the policy that the step began with; equal to ``logprobs.detach()`` on-policy.
        advantage: (R,) or (R, T).
        mask: (R, T) bool.
        rule: how.
        sampler_logprobs: (R, T) as the rollout engine reported them; needed for a correction.
        reference_logprobs: (R, T); needed for KL.

    Returns:
        Losses (R, T), 0 off the mask, and sums over the masked tokens: ``clipped`` (tokens whose gradient a bound
        took), ``kl``, ``masked_by_correction``.

    Raises:
        ValueError: if log-probabilities that the rule needs are not given.
    """
    zero = logprobs.new_zeros(())
    log_ratio = (logprobs - old_logprobs.detach()).masked_fill(~mask, 0.0)
    if rule.ratio == "sequence":
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        # The value is the sequence's, the gradient goes to each token. Paper: arXiv:2507.18071 Eq. 14 (GSPO-token).
        log_ratio = mean.detach() + (log_ratio - log_ratio.detach())
    ratio = log_ratio.exp()
    gain = advantage.to(logprobs)
    gain = gain[:, None].expand_as(logprobs) if gain.dim() == 1 else gain
    low = -torch.inf if rule.clip_low is None else 1 - rule.clip_low
    high = torch.inf if rule.clip_high is None else 1 + rule.clip_high
    bounded = ratio.clamp(low, high)
    if rule.surrogate == "cispo":
        objective = bounded.detach() * gain * logprobs.masked_fill(~mask, 0.0)
        clipped = (bounded != ratio).detach()
    else:
        objective = torch.minimum(ratio * gain, bounded * gain)
        clipped = (bounded * gain < ratio * gain).detach()
        if rule.dual_clip is not None:
            floor = rule.dual_clip * gain
            clipped = clipped | ((gain < 0) & (objective < floor)).detach()
            objective = torch.where(gain < 0, torch.maximum(objective, floor), objective)
    losses = -objective
    stats = {"clipped": (clipped & mask).sum().to(zero)}
    if rule.correction != "none":
        if sampler_logprobs is None:
            raise ValueError("an importance correction needs the sampler's log-probabilities")
        weight = correction_weights(old_logprobs, sampler_logprobs, mask, rule)
        losses = losses * weight
        stats["masked_by_correction"] = ((weight == 0) & mask).sum().to(zero)
    if rule.kl:
        if reference_logprobs is None:
            raise ValueError("KL needs the reference's log-probabilities")
        divergence = kl_k3(logprobs, reference_logprobs).masked_fill(~mask, 0.0)
        losses = losses + rule.kl * divergence
        stats["kl"] = divergence.detach().sum()
    return losses.masked_fill(~mask, 0.0), stats


def kl_k3(logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """Unbiased, positive estimate of KL(policy || reference) from drawn tokens: exp(d) − d − 1, d = ref − policy."""
    difference = reference_logprobs.detach() - logprobs
    return difference.exp() - difference - 1


def correction_weights(
    old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, mask: torch.Tensor, rule: Rule
) -> torch.Tensor:
    """Weights exp(old − sampler) that make up for a sampler which is not the trainer, (R, T), without gradient.

    Args:
        old_logprobs, sampler_logprobs: (R, T).
        mask: (R, T) bool.
        rule: correction, kind, cap and floor are read.
    """
    difference = (old_logprobs - sampler_logprobs).detach().masked_fill(~mask, 0.0)
    if rule.correction == "sequence":
        difference = difference.sum(1, keepdim=True).expand_as(difference)
    weight = difference.exp()
    if rule.correction_kind == "truncate":
        return weight.clamp(rule.correction_floor, rule.correction_cap)
    return weight * ((weight >= rule.correction_floor) & (weight <= rule.correction_cap))


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    rewards: torch.Tensor,
    mask: torch.Tensor,
    rule: Rule,
    *,
    truncated: torch.Tensor | None = None,
    longest: int | None = None,
    sampler_logprobs: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole loss of a step in one call; the trainer makes the same of micro-batches, and replay calls it.

    Args:
        logprobs, old_logprobs, mask: (R, T) as in :func:`token_losses`.
        rewards: (P, G) with P·G = R.
        rule: how.
        truncated: (R,) bool, completions that the length limit cut.
        longest: the longest completion that the sampling allows; T when None.
        sampler_logprobs, reference_logprobs: (R, T) where the rule needs them.

    Returns:
        The sum over terms and their number; the loss is the quotient.
    """
    mask = loss_mask(mask, rewards, rule, truncated)
    weights, terms = token_weights(mask, rule, longest or mask.shape[1])
    gain = advantages(rewards, rule).flatten()
    losses, _ = token_losses(logprobs, old_logprobs, gain, mask, rule, sampler_logprobs, reference_logprobs)
    return (losses * weights).sum(), terms


def loss_mask(
    mask: torch.Tensor, rewards: torch.Tensor, rule: Rule, truncated: torch.Tensor | None = None
) -> torch.Tensor:
    """The mask without rows whose reward is NaN, and without truncated rows where the rule leaves them out."""
    mask = mask & ~rewards.flatten().isnan()[:, None].to(mask.device)
    if rule.mask_truncated and truncated is not None:
        mask = mask & ~truncated[:, None].to(mask.device)
    return mask
