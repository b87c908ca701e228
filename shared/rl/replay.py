"""What stored rollouts would have taught under another rule, or been given by another verifier."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from bestiary.shared.core.checkpoint import read_json
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.train import read_config
from bestiary.shared.rl.losses import Rule, advantages, make_rule, policy_loss, spread
from bestiary.shared.rl.records import read_records, recorded_example, recorded_verdict
from bestiary.shared.rl.reward_pool import RewardPool

SHOWN = 5
"""Completions on which two verifiers differ that are printed."""


def replay(cfg: Any, rest: Sequence[str]) -> list[dict[str, float]]:
    """What tools/replay.py does.

    Args:
        cfg: conf/replay.yaml with its arguments.
        rest: ``rule.KEY=VALUE`` and ``verifier.KEY=VALUE``.

    Returns:
        One row a step, as in the table that is written.

    Raises:
        BadDataError: if there are no rollouts. ConfigError: for an unknown rule, verifier or option.
    """
    options = read_options(rest)
    if options["rule"] and cfg.rule is None:
        cfg.rule = "reinforce"
    if options["verifier"] and cfg.verifier is None:
        raise ConfigError("verifier.KEY=VALUE needs verifier=NAME")
    file = find_records(Path(cfg.run).expanduser(), cfg.stage)
    stored = stored_rule(file)
    rule = make_rule(cfg.rule, **options["rule"]) if cfg.rule else stored
    first, last = int(cfg.first), math.inf if cfg.last is None else int(cfg.last)
    verifier, pool = None, RewardPool()
    if cfg.verifier is not None:
        from bestiary.shared.rl.rewards.registry import make_verifier

        verifier = make_verifier(cfg.verifier, **options["verifier"])
    rows, changes = [], Changes()
    try:
        for step, lines in groupby(read_records(file), key=lambda line: line["step"]):
            if first <= step < last:
                groups = list(lines)
                rewards = torch.tensor([[_reward(r) for r in g["rows"]] for g in groups], dtype=torch.float64)
                new = rewards if verifier is None else rescored(groups, verifier, pool, changes)
                rows.append(compare(step, groups, rewards, new, stored, rule))
    finally:
        pool.close()
        if verifier is not None:
            verifier.close()
    if not rows:
        raise BadDataError(f"{file}: no step from {first} to {last}")
    out = Path(cfg.out).expanduser() if cfg.out else file.with_name("replay.csv")
    with open(out, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for name in list(rows[0])[1:]:
        values = [row[name] for row in rows if not math.isnan(row[name])]
        if values:
            print(f"{name:<28} {sum(values) / len(values):.4f}   mean over {len(values)} steps")
    for line in changes.lines():
        print(line)
    print(out)
    return rows


def read_options(rest: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``rule.KEY=VALUE`` and ``verifier.KEY=VALUE`` as two dicts.

    Raises:
        ConfigError: for any other argument.
    """
    out: dict[str, dict[str, Any]] = {"rule": {}, "verifier": {}}
    for argument in rest:
        key, _, value = argument.partition("=")
        kind, _, name = key.partition(".")
        if kind not in out or not name:
            raise ConfigError(f"{argument}: replay takes rule.KEY=VALUE and verifier.KEY=VALUE besides its own keys")
        out[kind][name] = OmegaConf.create(f"x: {value}").x
    return out


def find_records(given: Path, stage: str | None) -> Path:
    """The completions.jsonl that a path means.

    Raises:
        BadDataError: if there is none.
    """
    if given.is_file():
        return given
    if (given / "completions.jsonl").is_file():
        return given / "completions.jsonl"
    if (given / "run.json").is_file():
        stages = [stage] if stage else reversed(read_json(given / "run.json")["stages"])
        for name in stages:
            file = given / "stages" / name / "completions.jsonl"
            if file.is_file():
                return file
    raise BadDataError(f"{given}: no completions.jsonl there{f' for stage {stage}' if stage else ''}")


def stored_rule(file: Path) -> Rule:
    """The rule that the run used, from its config; the default one for a file that stands alone."""
    run = next((p for p in file.parents if (p / "config.yaml").is_file()), None)
    if run is None:
        return make_rule()
    node = OmegaConf.to_container(read_config(run / "config.yaml"), resolve=True)
    objective = node["recipe"]["stages"].get(file.parent.name, {}).get("objective", {})  # type: ignore[index, call-overload]
    return make_rule(**{k: v for k, v in (objective.get("rule") or {}).items() if k != "_target_"})


def _reward(row: dict[str, Any]) -> float:
    return math.nan if row["reward"] is None else row["reward"]


def rescored(groups: Sequence[dict[str, Any]], verifier: Any, pool: RewardPool, changes: Changes) -> torch.Tensor:
    """(P, G) scores of another verifier on the last turn of each row; NaN where it fails."""
    jobs = []
    for group in groups:
        example = recorded_example(group)
        for row in group["rows"]:
            text = row["turns"][-1]
            jobs.append(pool.submit(lambda e=example, t=text: verifier.verify(e.get("answer", ""), t, e)))
    verdicts = pool.verdicts(jobs)
    found = iter(verdicts)
    for group in groups:
        for row in group["rows"]:
            changes.see(group, row, next(found))
    scores = [math.nan if v.status == "error" else v.score for v in verdicts]
    return torch.tensor(scores, dtype=torch.float64).view(len(groups), -1)


class Changes:
    """Counts what a second verifier says against the first."""

    def __init__(self) -> None:
        self.rows = self.up = self.down = self.failed = 0
        self.examples: list[str] = []

    def see(self, group: dict[str, Any], row: dict[str, Any], verdict: Any) -> None:
        """One row's verdict."""
        self.rows += 1
        if verdict.status == "error":
            self.failed += 1
            return
        before = recorded_verdict(row)
        self.up += verdict.score > before.score
        self.down += verdict.score < before.score
        if verdict.score != before.score and len(self.examples) < SHOWN:
            text = row["turns"][-1]
            shown = text if len(text) <= 120 else f"{text[:60]} … {text[-60:]}"
            said = f"{before.score:g} -> {verdict.score:g}"
            self.examples.append(f"  {group['id']}: {said}  gold {str(group.get('answer'))[:40]!r}  said {shown!r}")

    def lines(self) -> list[str]:
        """What to print; nothing if no row was scored again."""
        if not self.rows:
            return []
        said = f"{self.rows} completions scored again: {self.up} higher, {self.down} lower, {self.failed} failed"
        return [said, *self.examples]


def compare(
    step: int, groups: Sequence[dict[str, Any]], rewards: torch.Tensor, new: torch.Tensor, stored: Rule, rule: Rule
) -> dict[str, float]:
    """One step under the run's rule and rewards, and under the others.

    Returns:
        ``reward`` and ``no_spread_share`` of both, ``surrogate`` of both (from the stored log-probabilities, at ratio
        1; NaN where they were not kept), and ``same_direction``: the cosine between what the two put on each token, 1
        where the other rule would have taken the same step.
    """
    before, after = advantages(rewards, stored), advantages(new, rule)
    out = {
        "step": step,
        "reward": float(rewards.nanmean()),
        "reward_new": float(new.nanmean()),
        "no_spread_share": float((spread(rewards) == 0).double().mean()),
        "no_spread_share_new": float((spread(new) == 0).double().mean()),
        "advantage_size": float(before.abs().mean()),
        "advantage_size_new": float(after.abs().mean()),
    }
    rows = [row for group in groups for row in group["rows"]]
    nothing = {"surrogate": math.nan, "surrogate_new": math.nan, "same_direction": math.nan}
    if any("ids" not in row for row in rows):
        return out | nothing
    width = max(1, max(len(row["ids"]) for row in rows))
    logprobs = torch.tensor([row["logprobs"] + [0.0] * (width - len(row["logprobs"])) for row in rows])
    own = [[bool(x) for x in row.get("own", [1] * len(row["ids"]))] for row in rows]
    mask = torch.tensor([row + [False] * (width - len(row)) for row in own])
    truncated = torch.tensor([bool(row["truncated"]) for row in rows])
    longest = groups[0].get("max_new_tokens", width)
    pulls = []
    for name, given, under in (("surrogate", rewards, stored), ("surrogate_new", new, rule)):
        leaf = logprobs.clone().double().requires_grad_()
        more = {"sampler_logprobs": leaf.detach(), "reference_logprobs": leaf.detach()}
        total, terms = policy_loss(
            leaf, leaf.detach(), given, mask, under, truncated=truncated, longest=longest, **more
        )
        loss = total / terms.clamp(min=1)
        pulls.append(torch.autograd.grad(loss, leaf)[0].flatten())
        out[name] = float(loss.detach())
    sizes = pulls[0].norm() * pulls[1].norm()
    out["same_direction"] = float(pulls[0] @ pulls[1] / sizes) if sizes > 0 else math.nan
    return out
