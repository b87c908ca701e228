"""Playing prompts out: completions, tool turns, rewards. Token ids stay as drawn, never made again from text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Batch, Example, Message, select_rows, text_message
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.core.streams import derive_seed
from bestiary.shared.language.causal_lm import move
from bestiary.shared.rl.protocols import Environment, Episode, RolloutEngine, ScoredRow, Turn, Verdict
from bestiary.shared.rl.reward_pool import Job, RewardPool


class NativeEngine:
    """Draws completions with the trainer's own model and its cache; nothing is copied, nothing can drift."""

    name = "native"
    exact = True

    def __init__(self) -> None:
        self._model: Any = None

    def begin(self, model: nn.Module, step: int) -> None:
        """Take the model as it is."""
        self._model = model

    def generate(self, batch: Batch, n: int, sampling: Sampling, **options: Any) -> Any:
        """``model.generate``, in eval mode (no dropout, no routing statistics)."""
        training = self._model.training
        self._model.eval()
        try:
            return self._model.generate(batch, n, sampling, **options)
        finally:
            self._model.train(training)

    def end(self) -> None:
        """Let the model go."""
        self._model = None


@dataclass
class Trajectory:
    """One completion, over all its turns.

    Attributes:
        example: what was asked. sample: its number in the group.
        ids: tokens after the prompt, the policy's and the tools'.
        own: which of them the policy drew; they alone carry loss.
        logprobs: of the policy's tokens when they were drawn, 0 elsewhere.
        entropies: of the distributions they were drawn from (nats, uncut), where the engine gives them.
        turns: what the policy said, a turn each.
        truncated: cut by a limit of tokens or turns.
        verdict: what the environment found; set by :meth:`Rollouts.play`.
    """

    example: Example
    sample: int
    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    truncated: bool = False
    verdict: Verdict = field(default_factory=lambda: Verdict(0.0, "error", note="not scored"))

    @property
    def tokens(self) -> int:
        """The policy's own tokens."""
        return sum(self.own)

    def scored(self) -> ScoredRow:
        """As a shaping sees it."""
        reason = "length" if self.truncated else "stop"
        return ScoredRow(self.example, self.turns[-1], self.tokens, reason, self.verdict)

    def add(self, ids: Sequence[int], own: Sequence[bool], logprobs: Sequence[float]) -> None:
        """Append tokens."""
        self.ids += ids
        self.own += own
        self.logprobs += logprobs


@dataclass
class Group:
    """The completions of one prompt.

    Attributes:
        index: the prompt's number in the step, over all processes.
        example: what was asked. name: unique in the step; names the noise.
        prompt_ids: the prompt's tokens, without padding.
        rows: its trajectories. rank: the process that played it.
    """

    index: int
    example: Example
    name: str
    prompt_ids: list[int]
    rows: list[Trajectory]
    rank: int = 0

    @property
    def scores(self) -> list[float]:
        """What the verifier gave each row; NaN where the harness failed."""
        return [math.nan if row.verdict.status == "error" else float(row.verdict.score) for row in self.rows]

    @property
    def rate(self) -> float:
        """Mean score of the rows that were scored; NaN where none was."""
        known = [score for score in self.scores if not math.isnan(score)]
        return sum(known) / len(known) if known else math.nan

    @property
    def flat(self) -> bool:
        """Whether its scores are all equal, so that nothing can be learned from it."""
        known = {score for score in self.scores if not math.isnan(score)}
        return len(known) < 2


class Rollouts:
    """Plays prompts out with one engine in one environment.

    Completions of ``prompts_at_once`` prompts are drawn together; while the next ones are, the rewards of the ones
    before are computed in the background. All of it is done with the same weights: nothing is off-policy.

    Args:
        engine: draws completions.
        environment: answers them, and scores the end.
        pool: runs verifiers and tools.
        processor: examples to batches, without a limit of length.
        tokenizer: the policy's.
        prompts_at_once: prompts whose completions are drawn together; None is all.
        max_prompt: longest prompt in tokens; longer ones are left out of the step. None is no limit.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        environment: Environment,
        pool: RewardPool,
        processor: Any,
        tokenizer: Any,
        prompts_at_once: int | None = None,
        max_prompt: int | None = None,
    ):
        self.engine, self.environment, self.pool = engine, environment, pool
        self.processor, self.tokenizer = processor, tokenizer
        self.prompts_at_once, self.max_prompt = prompts_at_once, max_prompt
        self.too_long: list[str] = []
        self._last: tuple[list[Group], Any] = ([], None)

    def play(
        self,
        prompts: Sequence[tuple[int, str, Example]],
        n: int,
        sampling: Sampling,
        device: torch.device,
        moved: Callable[[], None] = lambda: None,
    ) -> tuple[list[Group], Callable[[], None]]:
        """Play each prompt n times. ``engine.begin`` must have been called.

        Args:
            prompts: (number in the step, unique name, example) of each.
            n: completions of each.
            sampling: how they are drawn; ``max_new_tokens`` is a turn's.
            device: the model's.
            moved: called whenever something has got done.

        Returns:
            The groups, and a function that waits for the verdicts and fills them in.
        """
        if not prompts:
            return [], lambda: None
        shown = self._shown([(name, example) for _, name, example in prompts])
        batch: Any = self.processor(shown, "prompt")
        lengths = batch["attention_mask"].sum(1).tolist()
        if self.max_prompt is not None and max(lengths) > self.max_prompt:
            self.too_long += [p[1] for p, length in zip(prompts, lengths, strict=True) if length > self.max_prompt]
            kept = [at for at, length in enumerate(lengths) if length <= self.max_prompt]
            if not kept:
                return [], lambda: None
            prompts, batch = [prompts[at] for at in kept], trimmed(select_rows(batch, kept))
        batch = move(batch, device)
        groups: list[Group] = []
        jobs: list[tuple[Trajectory, Job]] = []
        size = self.prompts_at_once or len(prompts)
        for start in range(0, len(prompts), size):
            at = range(start, min(start + size, len(prompts)))
            part: Any = trimmed(select_rows(batch, at)) if len(at) < len(prompts) else batch
            made, pending = self._play_part([prompts[i] for i in at], part, n, sampling)
            groups += made
            jobs += pending
            moved()
        self._last = (groups, batch)

        def finish() -> None:
            verdicts = self.pool.verdicts([job for _, job in jobs])
            for (row, _), verdict in zip(jobs, verdicts, strict=True):
                row.verdict = verdict

        return groups, finish

    def batch_of(self, groups: Sequence[Group], device: torch.device) -> Any:
        """The prompts of these groups as a batch; what the last play made is used again where it is the same."""
        played, batch = self._last
        if [g.index for g in played] == [g.index for g in groups]:
            return batch
        return move(self.processor(self._shown([(g.name, g.example) for g in groups]), "prompt"), device)

    def complaint(self) -> str:
        """Why there was nothing to play."""
        return (
            f"every prompt is longer than the {self.max_prompt} tokens that max_len and the model's context leave "
            f"beside sampling.max_new_tokens (for example {', '.join(self.too_long[-3:])}): raise the stage's max_len"
        )

    def _shown(self, prompts: Sequence[tuple[str, Example]]) -> list[Any]:
        out = []
        for name, example in prompts:
            shown: Any = {**self.environment.prompt(example), "id": name}
            shown.pop("answer", None)
            out.append(shown)
        return out

    def _play_part(
        self, prompts: Sequence[tuple[int, str, Example]], batch: Any, n: int, sampling: Sampling
    ) -> tuple[list[Group], list[tuple[Trajectory, Job]]]:
        groups = [
            Group(index, example, name, batch["input_ids"][at][batch["attention_mask"][at].bool()].tolist(), [])
            for at, (index, name, example) in enumerate(prompts)
        ]
        for group in groups:
            group.rows = [Trajectory(group.example, sample) for sample in range(n)]
        rows = [row for group in groups for row in group.rows]
        # All samples of a prompt meet the same world: only what the policy does differs.
        seeds = [derive_seed(sampling.seed, "episode", group.name) for group in groups for _ in group.rows]
        episodes = [self.environment.reset(row.example, seed) for row, seed in zip(rows, seeds, strict=True)]
        self._take(rows, self.engine.generate(batch, n, sampling, entropy=True))
        jobs: list[tuple[Trajectory, Job]] = []
        alive = list(range(len(rows)))
        for turn in range(1, max(self.environment.max_turns, 1) + 1):
            answers = self._answers(rows, episodes, alive)
            going = []
            for at, answer in zip(alive, answers, strict=True):
                row = rows[at]
                if isinstance(answer, Verdict):  # the environment failed: nothing is known of this row
                    row.verdict = answer
                elif answer.done or row.truncated or turn == self.environment.max_turns:
                    row.truncated = row.truncated or not answer.done
                    jobs.append((row, self.pool.submit(_verify(episodes[at], row.turns[-1]))))
                else:
                    self._append_turn(row, answer.messages)
                    going.append(at)
            alive = going
            if not alive:
                break
            next_batch, owners = self._continued(groups, rows, alive, batch, n, turn)
            rollout = self.engine.generate(next_batch, 1, sampling, entropy=True)
            self._take([rows[at] for at in owners], rollout)
        return groups, jobs

    def _take(self, rows: Sequence[Trajectory], rollout: Any) -> None:
        """Append a turn of the policy to each row."""
        ids, own, scores = rollout.completion_ids.tolist(), rollout.mask.tolist(), rollout.logprobs.tolist()
        entropies = rollout.entropies.tolist() if rollout.entropies is not None else None
        lengths = [last_own(row) for row in own] if rollout.lengths is None else rollout.lengths.tolist()
        for at, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            row.add(ids[at][:length], own[at][:length], scores[at][:length])
            if entropies is not None:
                row.entropies += [e for e, mine in zip(entropies[at][:length], own[at][:length], strict=True) if mine]
            row.turns.append(rollout.texts[at])
            row.truncated = rollout.finish_reasons[at] == "length"

    def _answers(self, rows: list[Trajectory], episodes: list[Episode], alive: list[int]) -> list[Turn | Verdict]:
        """What the environment says to each row's last turn: at once where it has one turn, else in the background."""
        if self.environment.max_turns <= 1:
            return [_attempt(lambda at=at: episodes[at].step(rows[at].turns[-1])) for at in alive]
        jobs = [self.pool.submit(lambda at=at: episodes[at].step(rows[at].turns[-1])) for at in alive]
        self.pool.wait(jobs)
        out: list[Any] = []
        for job in jobs:
            good = not job.given_up and job.error is None and job.result is not None
            out.append(job.result if good else Verdict(0.0, "error", note=f"no answer: {job.error!r}"[:300]))
        return out

    def _append_turn(self, row: Trajectory, messages: Sequence[Message]) -> None:
        ids = continuation(self.tokenizer, messages, row.ids[-1])
        row.add(ids, [False] * len(ids), [0.0] * len(ids))

    def _continued(
        self, groups: list[Group], rows: list[Trajectory], alive: list[int], batch: Any, n: int, turn: int
    ) -> tuple[Batch, list[int]]:
        """Left-padded prompts of the rows that go on: what each has seen so far, token by token."""
        kept: Any = select_rows(batch, [at // n for at in alive])
        whole = [groups[at // n].prompt_ids + rows[at].ids for at in alive]
        width = max(len(ids) for ids in whole)
        device = batch["input_ids"].device
        pad = self.tokenizer.pad_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in whole], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in whole], device=device)
        names = [f"{groups[at // n].name}#{rows[at].sample}.{turn}" for at in alive]
        kept |= {"ids": names, "input_ids": ids, "attention_mask": mask, "labels": torch.full_like(ids, -100)}
        kept["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return kept, alive


def _verify(episode: Episode, text: str) -> Callable[[], Verdict]:
    def call() -> Verdict:
        try:
            return episode.verify(text)
        finally:
            episode.close()

    return call


def _attempt(call: Callable[[], Turn]) -> Turn | Verdict:
    try:
        return call()
    except Exception as error:
        return Verdict(0.0, "error", note=f"the environment failed: {error!r}"[:300])


def trimmed(batch: Any) -> Any:
    """A left-padded batch without the columns that are padding in all its rows."""
    mask = batch["attention_mask"]
    first = int(mask.any(0).int().argmax())
    names = ("input_ids", "attention_mask", "labels", "position_ids")
    return batch if not first else {**batch, **{name: batch[name][:, first:] for name in names}}


def continuation(tokenizer: Any, messages: Sequence[Message], last: int) -> list[int]:
    """The tokens between a turn of the policy and its next one: the turns given, as the chat template writes them.

    What the policy said is not rendered again: a stand-in is, and what follows it is kept. Where its turn lacks the
    token that ends it (a stop string cut it), that token comes first.

    Args:
        tokenizer: with the chat template.
        messages: the turns to put in.
        last: the last token the policy drew.

    Raises:
        ConfigError: if the template does not tell the assistant's words from its own.
    """
    chat = [text_message("user", "a"), text_message("assistant", "a"), *messages]
    ids, own = tokenizer.chat(chat, True)
    if True not in own:
        raise ConfigError("this chat template does not say which tokens the assistant wrote: it allows one turn alone")
    # A template may drop or rewrite what comes after; the stand-in's own tokens are one run, the first.
    start = own.index(True)
    end = own.index(False, start)
    closing = [i for i in ids[start:end] if i in {tokenizer.eos_id, *tokenizer.stop_ids}]
    ended = last in {tokenizer.eos_id, *tokenizer.stop_ids}
    return ([] if ended else closing[:1]) + ids[end:]


def last_own(mask: Sequence[bool]) -> int:
    """How many tokens there are up to the last one that the policy drew."""
    return next((at + 1 for at in range(len(mask) - 1, -1, -1) if mask[at]), 0)


def numbered(names: Sequence[str]) -> list[str]:
    """Unique names: a prompt that comes twice in a step draws other noise the second time.

    What is appended to the list changes no name before it.
    """
    used: set[str] = set()
    out: list[str] = []
    for name in names:
        unique, count = name, 1
        while unique in used:
            count += 1
            unique = f"{name}~{count}"
        used.add(unique)
        out.append(unique)
    return out


def with_seed(sampling: Sampling, *parts: int | str) -> Sampling:
    """The sampling with the noise of a step."""
    return replace(sampling, seed=derive_seed(*parts))
