"""pass@k of held-out prompts in an environment, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.rl.environments.single_turn import SingleTurn
from bestiary.shared.rl.protocols import Environment
from bestiary.shared.rl.reward_pool import RewardPool
from bestiary.shared.rl.rollouts import Group, NativeEngine, Rollouts, numbered


class PassAt:
    """Plays held-out prompts out and counts those that are solved (a score of 1).

    pass@k is the unbiased estimate 1 − C(n − c, k) / C(n, k), averaged over prompts; with k = 1 it is avg@n. The
    interval is of the mean over prompts: Wilson's for one sample each, the normal one over prompts for several. A
    verdict that the harness could not reach counts as not solved, and is counted apart.

    Paper: arXiv:2107.03374 (Codex) Eq. 1.

    Args:
        samples: completions of each prompt (n).
        k: which pass@k to report; each at most ``samples``.
        sampling: how they are drawn; greedy by default.
        environment: None asks each example's verifier once.
        prompts_at_once: prompts that are completed together.
        label: put before the names of the numbers.
        by: a key of ``meta``, or several: pass@1 is reported for each of its values too, where an example has it.
    """

    name = "pass_at"
    version = "1"

    def __init__(
        self,
        samples: int = 1,
        k: Sequence[int] = (1,),
        sampling: Sampling | None = None,
        environment: Environment | None = None,
        prompts_at_once: int = 64,
        label: str = "",
        by: str | Sequence[str] | None = None,
    ):
        if not k or min(k) < 1 or max(k) > samples:
            raise ConfigError(f"pass@k needs k between 1 and samples={samples}, not {list(k)}")
        self.samples, self.k = samples, list(k)
        self.by = [by] if isinstance(by, str) else list(by or ())
        self.sampling = sampling or Sampling(64)
        if samples > 1 and self.sampling.temperature == 0:
            raise ConfigError("several samples of a greedy policy are one: set the protocol's sampling.temperature")
        self.environment = environment or SingleTurn()
        self.prompts_at_once = prompts_at_once
        self.prefix = f"{label}/" if label else ""

    def __call__(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """``pass@k``, ``pass@1/low`` and ``/high`` (95 %), ``prompts``, ``truncated_share``, ``length``, ``errors``."""
        groups = self.play(model, examples)
        solved = [[not math.isnan(s) and s >= 1 for s in group.scores] for group in groups]
        out = {f"pass@{k}": sum(unbiased(len(s), sum(s), k) for s in solved) / len(solved) for k in self.k}
        means = [sum(s) / len(s) for s in solved]
        out["pass@1/low"], out["pass@1/high"] = interval(means, self.samples)
        rows = [row for group in groups for row in group.rows]
        out |= {
            "prompts": float(len(groups)),
            "truncated_share": sum(row.truncated for row in rows) / len(rows),
            "length": sum(row.tokens for row in rows) / len(rows),
            "errors": float(sum(row.verdict.status == "error" for row in rows)),
        }
        for key in self.by:
            kinds: dict[str, list[float]] = {}
            for group, mean in zip(groups, means, strict=True):
                if key in (meta := group.example.get("meta", {})):
                    kinds.setdefault(str(meta[key]), []).append(mean)
            out |= {f"pass@1/{key}={kind}": sum(here) / len(here) for kind, here in sorted(kinds.items())}
        return {f"{self.prefix}{name}": value for name, value in out.items()}

    def play(self, model: nn.Module, examples: Sequence[Example]) -> list[Group]:
        """The groups that were played out, with their verdicts."""
        processor: Any = model.processor()  # type: ignore[operator]
        engine, pool = NativeEngine(), RewardPool()
        rollouts = Rollouts(engine, self.environment, pool, processor, processor.tokenizer, self.prompts_at_once)
        names = numbered([example["id"] for example in examples])
        tickets = list(zip(range(len(examples)), names, examples, strict=True))
        engine.begin(model, 0)
        try:
            with torch.no_grad():
                groups, finish = rollouts.play(tickets, self.samples, self.sampling, next(model.parameters()).device)
            finish()
        finally:
            engine.end()
            pool.close()
        return groups


def unbiased(n: int, c: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k): the chance that k of n samples, c of them right, hold a right one."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(means: Sequence[float], samples: int) -> tuple[float, float]:
    """95 % interval of the mean over prompts: Wilson's where each was tried once, else the normal one.

    Args:
        means: share of right samples of each prompt.
        samples: tries of each.
    """
    n, p, z = len(means), sum(means) / len(means), 1.959964
    if samples == 1 or n < 2:
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    else:
        error = math.sqrt(sum((m - p) ** 2 for m in means) / (n - 1) / n)
        low, high = p - z * error, p + z * error
    return max(0.0, low), min(1.0, high)
