"""What a step of rollouts looked like, over all processes."""

from __future__ import annotations

import resource
from collections.abc import Sequence

import torch

from bestiary.shared.rl.losses import spread
from bestiary.shared.rl.rollouts import Group


def step_metrics(groups: Sequence[Group], scores: torch.Tensor, rewards: torch.Tensor) -> dict[str, float]:
    """Numbers to log.

    Args:
        groups: all groups of the step.
        scores: (P, G) what the verifiers gave, NaN where the harness failed.
        rewards: (P, G) after shaping.

    Returns:
        ``reward`` and ``score`` means, ``no_spread_share`` (groups that teach nothing), ``truncated_share``, ``length``
        (mean, least and most of the policy's own tokens), ``adjusted_entropy`` in nats a token, ``turns``, shares of
        ``timeout`` and ``error`` verdicts, the mean of each named part, and the process's peak memory.
    """
    rows = [row for group in groups for row in group.rows]
    lengths = [row.tokens for row in rows]
    out = {
        "reward": _mean(rewards),
        "score": _mean(scores),
        "no_spread_share": float((spread(rewards) == 0).double().mean()),
        "truncated_share": sum(row.truncated for row in rows) / len(rows),
        "length": sum(lengths) / len(rows),
        "length_min": float(min(lengths)),
        "length_max": float(max(lengths)),
        "timeout_share": sum(row.verdict.status == "timeout" for row in rows) / len(rows),
        "error_share": sum(row.verdict.status == "error" for row in rows) / len(rows),
    }
    entropies = [value for row in rows for value in row.entropies]
    if entropies:
        out["adjusted_entropy"] = sum(entropies) / len(entropies)
    turns = sum(len(row.turns) for row in rows) / len(rows)
    if turns > 1 or any(not all(row.own) for row in rows):
        out["turns"] = turns
    names = sorted({name for row in rows for name in row.verdict.parts})
    for name in names:
        values = [row.verdict.parts[name] for row in rows if name in row.verdict.parts]
        out[f"part/{name}"] = sum(values) / len(values)
    out["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return out


def _mean(values: torch.Tensor) -> float:
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else 0.0


class FlatSteps:
    """Counts steps in a row in which no group had a spread, and says what to change.

    Args:
        patience: steps after which it speaks, and again after as many more.
    """

    def __init__(self, patience: int):
        self.patience, self.count = patience, 0

    def see(self, stage: str, step: int, metrics: dict[str, float]) -> str | None:
        """A warning, or None."""
        self.count = self.count + 1 if metrics["no_spread_share"] == 1.0 else 0
        if not self.patience or not self.count or self.count % self.patience:
            return None
        if metrics["error_share"] == 1.0:
            why = "every verdict is an error of the harness: look at the notes in completions.jsonl"
        elif metrics["truncated_share"] > 0.9:
            why = "nearly all completions are cut by the length limit: raise sampling.max_new_tokens"
        elif metrics["score"] >= 0.999:
            why = "the policy solves every prompt: give it harder ones, or end the stage"
        elif metrics["score"] <= 0.001:
            why = (
                "no completion is ever right: give it easier prompts, more samples a prompt, or a stage of SFT before; "
                "read completions.jsonl to see whether the format is what the verifier expects"
            )
        else:
            why = "raise samples_per_prompt or the temperature"
        return (
            f"stage {stage}, step {step}: all rewards of each group have been equal for {self.count} steps, so nothing "
            f"is learned (mean score {metrics['score']:.3f}): {why}"
        )
