"""From scored groups to the batches of a step: who carries loss, and what fits into memory together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from bestiary.shared.core.examples import select_rows
from bestiary.shared.rl.losses import Rule, loss_mask, token_weights
from bestiary.shared.rl.rollouts import Group, trimmed


@dataclass
class PolicyBatch:
    """Completions to learn from. R rows, T tokens; prompts left-padded, completions right-padded.

    Attributes:
        ids: names of the rows.
        prompts: the batch of P prompts. owner: (R,) the prompt of each row.
        completions: (R, T) token ids. present: (R, T) bool, false on padding.
        mask: (R, T) bool, tokens that carry loss. weights: (R, T) of their losses.
        advantages: (R,). sampler_logprobs: (R, T).
        terms: what the sum of losses is divided by, rows that are left out included.
        old_logprobs: (R, T) from the first update on these rollouts, or None before it.
        rows: (R,) where each row stands in the step.
    """

    ids: list[str]
    prompts: Any
    owner: torch.Tensor
    completions: torch.Tensor
    present: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor
    advantages: torch.Tensor
    sampler_logprobs: torch.Tensor
    terms: float
    rows: torch.Tensor
    old_logprobs: torch.Tensor | None = None

    def __getitem__(self, key: str) -> Any:
        """As other batches are read: ``batch["ids"]``."""
        return getattr(self, key)


def make_batch(groups: Sequence[Group], prompts: Any, advantage: torch.Tensor, rule: Rule, pad: int, longest: int):
    """The whole step of a process as one batch.

    Args:
        groups: the process's groups, in the order of ``prompts``.
        prompts: their batch.
        advantage: (P, G), NaN rewards already 0.
        rule: mask_truncated and the average are read.
        pad: token id of padding.
        longest: longest completion that the sampling allows.
    """
    rows = [row for group in groups for row in group.rows]
    device = prompts["input_ids"].device
    width = max(1, max(len(row.ids) for row in rows))

    def padded(values: list[Any], fill: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([v + [fill] * (width - len(v)) for v in values], dtype=dtype).to(device)

    failed = torch.tensor([row.verdict.status == "error" for row in rows])
    rewards = torch.zeros(len(rows)).masked_fill(failed, torch.nan)
    own = padded([row.own for row in rows], False, torch.bool)
    mask = loss_mask(own, rewards, rule, torch.tensor([row.truncated for row in rows]))
    weights, terms = token_weights(mask, rule, longest)
    count = len(groups[0].rows)
    return PolicyBatch(
        ids=[f"{group.name}#{row.sample}" for group in groups for row in group.rows],
        prompts=prompts,
        owner=torch.arange(len(groups), device=device).repeat_interleave(count),
        completions=padded([row.ids for row in rows], pad, torch.long),
        present=padded([[True] * len(row.ids) for row in rows], False, torch.bool),
        mask=mask,
        weights=weights,
        advantages=advantage.flatten().to(device),
        sampler_logprobs=padded([row.logprobs for row in rows], 0.0, torch.float32),
        terms=float(terms),
        rows=torch.arange(len(rows), device=device),
    )


def take(batch: PolicyBatch, rows: Sequence[int], terms: float) -> PolicyBatch:
    """These rows, with the prompts they need, without columns that are padding in all of them."""
    index = torch.as_tensor(list(rows), device=batch.owner.device)
    wanted, owner = batch.owner[index].unique(return_inverse=True)
    width = max(1, int(batch.present[index].sum(1).max()))
    values: dict[str, Any] = {}
    for field in fields(PolicyBatch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            value = value[index]
            values[field.name] = value[:, :width] if value.dim() == 2 else value
    prompts = trimmed(select_rows(batch.prompts, wanted.tolist()))
    values |= {"ids": [batch.ids[i] for i in rows], "prompts": prompts, "owner": owner, "terms": terms}
    return replace(batch, **values)


def split(batch: PolicyBatch, tokens: int | None, keep_flat: bool = False) -> list[PolicyBatch]:
    """Micro-batches of at most ``tokens`` tokens, padding included, whose gradients add up to the whole step's.

    Rows that cannot change the policy (no advantage, no token that carries loss) are left out; their tokens stay in
    the step's terms, so the gradient is the same. Groups stay together where they fit, for their prompt is encoded
    once; rows of like length come together. There is always one micro-batch, for other processes wait for it.

    Args:
        batch: the whole step.
        tokens: the budget, or None for one micro-batch.
        keep_flat: keep rows without advantage (KL moves them too).
    """
    useful = (batch.weights != 0).any(1)
    if not keep_flat:
        useful &= batch.advantages != 0
    lengths = batch.present.sum(1).tolist()
    prompt_lengths = batch.prompts["attention_mask"].sum(1).tolist()
    owners = batch.owner.tolist()
    groups: dict[int, list[int]] = {}
    for row in useful.nonzero()[:, 0].tolist():
        groups.setdefault(owners[row], []).append(row)
    if not groups:
        # The shortest row, to go through the motions with: it weighs nothing.
        shortest = min(range(len(lengths)), key=lengths.__getitem__)
        part = take(batch, [shortest], batch.terms)
        return [replace(part, weights=torch.zeros_like(part.weights))]
    order = sorted(groups, key=lambda g: (-max(lengths[r] for r in groups[g]), g))
    packs: list[list[int]] = []
    for owner in order:
        rows = sorted(groups[owner], key=lambda r: -lengths[r])
        if packs and _area(packs[-1] + rows, owners, lengths, prompt_lengths) <= (tokens or float("inf")):
            packs[-1] += rows
            continue
        for row in rows:  # a group that does not fit alone is cut
            new = not packs or row == rows[0]
            if new or _area([*packs[-1], row], owners, lengths, prompt_lengths) > (tokens or float("inf")):
                packs.append([])
            packs[-1].append(row)
    return [take(batch, sorted(rows), batch.terms if not at else 0.0) for at, rows in enumerate(packs)]


def _area(rows: list[int], owners: list[int], lengths: list[int], prompt_lengths: list[int]) -> int:
    """Tokens that a micro-batch of these rows computes, padding included."""
    prompts = {owners[row] for row in rows}
    return len(prompts) * max(prompt_lengths[p] for p in prompts) + len(rows) * max(lengths[row] for row in rows)


def to_state(batch: PolicyBatch) -> dict[str, Any]:
    """The batch as plain data, for a checkpoint."""
    return vars(batch).copy()


def from_state(state: dict[str, Any]) -> PolicyBatch:
    """A batch from a checkpoint."""
    return PolicyBatch(**state)
