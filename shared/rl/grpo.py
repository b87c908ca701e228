"""GRPO: prompts in, completions, rewards, advantages, one update. The objective that a recipe's ``grpo`` stage names.

A step, from top to bottom: :meth:`GRPO.experience` draws prompts, plays them out, scores them and makes the batch;
:meth:`GRPO.micro_batches` cuts it by a token budget; :meth:`GRPO.loss` is the surrogate of one micro-batch. The
surrogate's value is 0 on-policy whatever the policy learns: each group's advantages add up to 0, and the ratio is 1.
Its gradient is not. Watch ``reward``, ``no_spread_share`` and the held-out pass@1.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from bestiary.shared.core.errors import ConfigError, UserError
from bestiary.shared.core.loader import StageData
from bestiary.shared.core.protocols import Loss, Sampling, StepContext
from bestiary.shared.language.causal_lm import move
from bestiary.shared.rl.controllers.pass_rates import PassRates
from bestiary.shared.rl.environments.single_turn import SingleTurn
from bestiary.shared.rl.gather import gather
from bestiary.shared.rl.losses import Rule, advantages, token_losses
from bestiary.shared.rl.micro_batches import PolicyBatch, from_state, make_batch, split, to_state
from bestiary.shared.rl.prompts import Prompts
from bestiary.shared.rl.protocols import Environment, RolloutEngine
from bestiary.shared.rl.records import Records
from bestiary.shared.rl.reward_pool import RewardPool
from bestiary.shared.rl.rollouts import Group, NativeEngine, Rollouts, numbered, with_seed
from bestiary.shared.rl.scoring import completion_logprobs
from bestiary.shared.rl.start_up import check_start, context_of, prompt_limit
from bestiary.shared.rl.step_metrics import FlatSteps, step_metrics
from bestiary.shared.rl.watchdog import Watchdog


class GRPO:
    """Group-relative policy optimisation on the contract of objectives.

    The stage's ``batch_size`` is the number of prompts a step; all else follows from it and ``samples_per_prompt``.

    Paper: arXiv:2402.03300; the default rule is that of arXiv:2505.16400 (AceReason): strictly on-policy, token-level.

    Args:
        model: the policy.
        samples_per_prompt: completions of each prompt (G).
        sampling: how they are drawn; its seed is not used, each step has its own.
        rule: how rewards become a loss (:func:`~bestiary.shared.rl.losses.make_rule`); None is on-policy REINFORCE.
        environment: where prompts are played; None asks each example's verifier once.
        shapings: change the rewards of a whole step, in order.
        controllers: change sampling and the choice of prompts as training goes (:mod:`bestiary.shared.rl.controllers`).
        engine: where completions are drawn; None is the model itself.
        micro_tokens: tokens a backward pass, padding included; None takes the step at once.
        prompts_at_once: prompts whose completions are drawn together; their rewards are computed while the next ones
            are drawn. None is all.
        updates: optimiser steps on the same rollouts; above 1 they are off-policy and the clip acts. A step is an
            optimiser step, so new rollouts come every ``updates`` steps.
        reward_workers: verifiers at once. reward_deadline_s: longest a verdict may take.
        max_logprob_gap: largest difference between a token's log-probability when it was drawn and when it is trained
            on; a larger one ends the run. None is 0.01 for float32 and 0.5 for lower precision.
        self_test: how many examples the verifiers are tested on before the stage starts.
        flat_patience: steps without any spread of rewards, after which a warning says what to change; 0 never.
        watchdog_minutes: how long nothing may move before all stacks are written; None never.
        record_tokens: keep token ids and log-probabilities in completions.jsonl (replay needs them).

    Raises:
        ConfigError: for values that cannot be.
    """

    loss_name = "surrogate"
    headline = ("reward", "no_spread_share", "length")
    whole_model = True
    """Every process draws from all of the model: FSDP is refused."""

    def __init__(
        self,
        model: nn.Module,
        samples_per_prompt: int = 8,
        sampling: Sampling | None = None,
        rule: Rule | None = None,
        environment: Environment | None = None,
        shapings: Sequence[Any] = (),
        controllers: Sequence[Any] = (),
        engine: RolloutEngine | None = None,
        micro_tokens: int | None = None,
        prompts_at_once: int | None = None,
        updates: int = 1,
        reward_workers: int = 8,
        reward_deadline_s: float = 300.0,
        max_logprob_gap: float | None = None,
        self_test: int = 32,
        flat_patience: int = 20,
        watchdog_minutes: float | None = 10.0,
        record_tokens: bool = True,
    ):
        self.rule = rule or Rule(clip_low=None, clip_high=None)
        self.sampling = sampling or Sampling(64, temperature=1.0)
        self.samples, self.updates = samples_per_prompt, updates
        if samples_per_prompt < 2 and self.rule.baseline != "none":
            raise ConfigError(
                f"samples_per_prompt={samples_per_prompt} leaves nothing to compare a completion with, so every "
                "advantage would be 0: give 2 or more, or rule.baseline=none"
            )
        for name, value in (("samples_per_prompt", samples_per_prompt), ("updates", updates)):
            if value < 1:
                raise ConfigError(f"{name} must be 1 or more, not {value}")
        if self.sampling.temperature == 0:
            raise ConfigError("sampling.temperature=0 draws the same completion every time: give 0.6 to 1.2")
        self.engine = engine or NativeEngine()
        if not self.engine.exact and self.rule.correction == "none":
            raise ConfigError(f"engine {self.engine.name} draws from another copy of the weights: set rule.correction")
        self.environment = environment or SingleTurn()
        self.shapings, self.controllers = list(shapings), list(controllers)
        self.micro_tokens, self.prompts_at_once = micro_tokens, prompts_at_once
        self.self_test, self.record_tokens = self_test, record_tokens
        self.max_gap = max_logprob_gap
        self.pool = RewardPool(reward_workers, reward_deadline_s)
        self.rates, self.flat, self.watchdog = PassRates(), FlatSteps(flat_patience), Watchdog(watchdog_minutes)
        # The policy the stage begins with; taken before a checkpoint is loaded, so a resumed run has the same.
        self.reference = copy.deepcopy(model).requires_grad_(False).eval() if self.rule.kl else None
        self.context = context_of(model)
        for module in model.modules():  # a dropped unit when training, and not when sampling, is another policy
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.prompts: Prompts | None = None
        self._state: dict[str, Any] | None = None
        self._batch: PolicyBatch | None = None
        self._metrics: dict[str, float] = {}
        self._gap, self._passes, self._low_precision = 0.0, 0, False
        self._now = self.sampling
        self._began = 0.0

    # --- before the first step --------------------------------------------------------------------------------------

    def loader(self, data: StageData) -> Steps:
        """Take the stage's data, test the verifiers, and go on from where a checkpoint was."""
        self.data = data
        self.prompts = Prompts(data, self.controllers, self.rates)
        self.records = Records(data.folder / "completions.jsonl", self.record_tokens)
        self.rollouts = Rollouts(
            self.engine,
            self.environment,
            self.pool,
            data.processor,
            data.processor.tokenizer,
            self.prompts_at_once,
            prompt_limit(data.max_len, self.context, self.sampling.max_new_tokens),
        )
        check_start(self, data)
        if self._state is not None:
            self._restore(self._state)
        if data.rank == 0:
            self.records.rewind(self.records.size)
        return Steps(data.start, data.steps)

    # --- a step -----------------------------------------------------------------------------------------------------

    def experience(self, model: nn.Module, batch: Any, ctx: StepContext) -> PolicyBatch:
        """The step's rollouts as a batch; with several updates, those of the steps before are used again."""
        self.watchdog.beat()
        self._passes = ctx.step % self.updates
        self._gap = 0.0
        device = next(model.parameters()).device
        if self._passes and self._batch is not None:
            self._began, self._metrics = time.perf_counter(), {}
            self._batch = from_state(move(to_state(self._batch), device))  # a checkpoint's lies on the CPU
            return self._batch
        if any(isinstance(p, DTensor) for p in model.parameters()):
            raise ConfigError("rollouts of a model that FSDP has sharded are not built: use trainer=ddp or one process")
        began = time.perf_counter()
        self._metrics = {}
        self._now = with_seed(self.sampling, self.data.stream.seed, ctx.stage, "rollout", ctx.step)
        for controller in self.controllers:
            self._now = controller.sampling(ctx.step, self._now)
        self.rollouts.max_prompt = prompt_limit(self.data.max_len, self.context, self._now.max_new_tokens)
        own, whole, waited = self._play_step(model, ctx, device)
        scores = torch.tensor([group.scores for group in whole], dtype=torch.float64)
        rewards = scores
        for shaping in self.shapings:
            rewards = shaping(rewards, [[row.scored() for row in group.rows] for group in whole])
        rule = self._rule(ctx.step)
        gains = advantages(rewards, rule)
        self._note(ctx, whole, scores, rewards, gains)
        if not own:
            raise UserError(f"stage {ctx.stage}, step {ctx.step}, process {ctx.rank}: {self.rollouts.complaint()}")
        place = {group.index: at for at, group in enumerate(whole)}
        idle = own[0].index not in place
        advantage = torch.zeros(1, self.samples) if idle else gains[[place[group.index] for group in own]]
        tokenizer: Any = self.data.processor.tokenizer
        prompts = self.rollouts.batch_of(own, device)
        made = make_batch(own, prompts, advantage, rule, tokenizer.pad_id, self._now.max_new_tokens)
        self._batch = made = replace(made, terms=0.0, weights=torch.zeros_like(made.weights)) if idle else made
        self._began = time.perf_counter()
        self._metrics |= {"seconds/rollout": self._began - began - waited, "seconds/reward_wait": waited}
        return made

    def micro_batches(self, batch: PolicyBatch) -> list[PolicyBatch]:
        """Parts of at most ``micro_tokens`` tokens."""
        return split(batch, self.micro_tokens, keep_flat=bool(self.rule.kl))

    def loss(self, model: nn.Module, batch: PolicyBatch, ctx: StepContext) -> Loss:
        """The surrogate, summed over tokens; terms are those of the whole step, however it is cut."""
        self.watchdog.beat()
        part = batch
        of = (part.prompts, part.owner, part.completions, part.present, self._now)
        logprobs = completion_logprobs(model, *of)
        taken = logprobs.detach()
        kind = taken.device.type
        weights = next(model.parameters()).dtype
        self._low_precision = torch.is_autocast_enabled(kind) or weights in (torch.bfloat16, torch.float16)
        if not self._passes:
            gap = (taken - part.sampler_logprobs).abs().masked_fill(~part.mask, 0.0).max()
            self._gap = max(self._gap, float(gap.nan_to_num(nan=torch.inf)))
        old = taken
        if self.updates > 1 and self._batch is not None:
            old = self._old(part, taken)
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = completion_logprobs(self.reference.to(taken.device), *of)
        losses, stats = token_losses(
            logprobs, old, part.advantages, part.mask, self._rule(ctx.step), part.sampler_logprobs, reference
        )
        metrics = {name: value for name, value in stats.items() if name != "clipped" or self.updates > 1}
        return Loss((losses * part.weights).sum(), part.terms, metrics)

    def after_step(self, applied: bool) -> dict[str, float]:
        """Numbers of the step, equal on all processes.

        Raises:
            UserError: if a log-probability is not the one that was sampled from.
        """
        self.watchdog.rest()
        own: Any = getattr(self.environment, "counters", dict)()
        parts = gather((self._gap, {f"verifier/{n}": v for n, v in self.pool.counters.items()} | own))
        gap = max(value for value, _ in parts)
        if not self._passes:
            self._metrics["max_logprob_gap"] = gap
            self._check_gap(gap)
        for name in sorted({name for _, counts in parts for name in counts}):
            self._metrics[name] = float(sum(counts.get(name, 0) for _, counts in parts))
        self._metrics["seconds/update"] = time.perf_counter() - self._began
        if self.updates == 1:
            self._batch = None
        return self._metrics

    def close(self) -> None:
        """The stage is over: give threads, processes and files back."""
        self.watchdog.rest()
        self.pool.close()
        self.environment.close()

    # --- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on besides weights."""
        return {
            "cursor": self.prompts.cursor if self.prompts else 0,
            "rates": self.rates.state_dict(),
            "controllers": [c.state_dict() for c in self.controllers],
            "records": self.records.size if self.prompts else 0,
            "flat": self.flat.count,
            "sampling": vars(self._now).copy(),
            "batch": to_state(self._batch) if self._batch is not None and self.updates > 1 else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state for :meth:`loader`, which comes after."""
        self._state = state

    def _restore(self, state: dict[str, Any]) -> None:
        assert self.prompts is not None
        self.prompts.cursor, self.records.size, self.flat.count = state["cursor"], state["records"], state["flat"]
        self.rates.load_state_dict(state["rates"])
        for controller, value in zip(self.controllers, state["controllers"], strict=True):
            controller.load_state_dict(value)
        self._now = Sampling(**{**state["sampling"], "stop": tuple(state["sampling"]["stop"])})
        self._batch = from_state(state["batch"]) if state["batch"] is not None else None

    # --- inside -----------------------------------------------------------------------------------------------------

    def _play_step(
        self, model: nn.Module, ctx: StepContext, device: torch.device
    ) -> tuple[list[Group], list[Group], float]:
        """Own groups, the groups of all processes in order, and the seconds spent waiting for rewards.

        With dynamic sampling, groups without a spread of scores are replaced by further prompts, a number of times.
        """
        assert self.prompts is not None
        rounds = max((getattr(c, "rounds", 0) for c in self.controllers), default=0)
        wanted = self.data.stream.global_batch
        kept: list[Group] = []
        spare: list[Group] = []
        ids: list[str] = []
        waited = 0.0
        self.engine.begin(model, ctx.step)
        try:
            for _ in range(rounds + 1):
                drawn, examples = len(ids), self.prompts.draw(ctx.step, wanted - len(kept))
                ids += [example["id"] for example in examples]
                tickets = list(zip(range(drawn, len(ids)), numbered(ids)[drawn:], examples, strict=True))
                groups, finish = self.rollouts.play(
                    tickets[ctx.rank :: ctx.world_size], self.samples, self._now, device, self.watchdog.beat
                )
                before = time.perf_counter()
                finish()
                waited += time.perf_counter() - before
                found = [(rank, group) for rank, part in enumerate(gather(groups)) for group in part]
                for rank, group in sorted(found, key=lambda pair: pair[1].index):
                    group.rank = rank
                    (spare if rounds and group.flat else kept).append(group)
                if len(kept) >= wanted:
                    break
        finally:
            self.engine.end()
        everything = [*kept, *spare]
        if not everything:
            raise UserError(f"stage {ctx.stage}, step {ctx.step}: {self.rollouts.complaint()}")
        self.rates.update([g.example["id"] for g in everything], [g.rate for g in everything], ctx.step)
        if rounds:
            self._metrics["prompts_drawn"] = float(len(ids))
        whole = kept or spare  # a step without any spread goes through the motions too
        # A process without a group of its own takes part with one that carries no loss.
        own = [g for g in whole if g.rank == ctx.rank] or [g for g in everything if g.rank == ctx.rank][:1]
        return own, whole, waited

    def _rule(self, step: int) -> Rule:
        """The rule, with what a controller says about truncated completions."""
        said = [c.overlong(step) for c in self.controllers]
        opinions = [value for value in said if value is not None]
        return replace(self.rule, mask_truncated=opinions[-1]) if opinions else self.rule

    def _note(self, ctx: StepContext, groups: list[Group], scores: Any, rewards: Any, gains: Any) -> None:
        """Metrics, records, controllers, warnings."""
        self._metrics |= step_metrics(groups, scores, rewards)
        self._metrics |= {"temperature": self._now.temperature, "max_new_tokens": float(self._now.max_new_tokens)}
        if self.rollouts.too_long:
            self._metrics["prompts_too_long"] = float(len(self.rollouts.too_long))
        for controller in self.controllers:
            self._metrics |= controller.observe(ctx.step, self._metrics)
        if warning := self.flat.see(ctx.stage, ctx.step, self._metrics):
            self._say(warning)
        if ctx.rank == 0:
            extra = {"temperature": self._now.temperature, "max_new_tokens": self._now.max_new_tokens}
            self.records.write(ctx.step, groups, rewards.tolist(), gains.tolist(), extra)

    def _old(self, part: PolicyBatch, taken: torch.Tensor) -> torch.Tensor:
        """Log-probabilities under the policy that these rollouts were first trained with."""
        assert self._batch is not None
        if self._batch.old_logprobs is None:
            self._batch.old_logprobs = torch.zeros_like(self._batch.sampler_logprobs)
        if not self._passes:
            self._batch.old_logprobs[part.rows, : taken.shape[1]] = taken
        return self._batch.old_logprobs[part.rows, : taken.shape[1]]

    def _check_gap(self, gap: float) -> None:
        limit = self.max_gap
        if limit is None:
            limit = 0.5 if self._low_precision else 0.01
        if self.engine.exact and gap > limit:
            raise UserError(
                f"a token was drawn with a log-probability that differs by {gap:.3g} from the trainer's (at most "
                f"{limit:g} is allowed): the policy that samples is not the one that is trained. Look for dropout, a "
                "kernel that differs between decoding and training, or a precision that is too low; whoever means it "
                "sets max_logprob_gap"
            )

    def _say(self, text: str) -> None:
        if self.data.rank == 0:
            print(f"warning: {text}", flush=True)


class Steps:
    """What the steps of a stage begin with: their names. Prompts are drawn inside the step."""

    def __init__(self, start: int, steps: int):
        self.start, self.steps = start, steps

    def __len__(self) -> int:
        return self.steps  # as RankSteps: Lightning counts from the stage's first step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in range(self.start, self.steps):
            yield {"ids": [f"step {step}"]}
