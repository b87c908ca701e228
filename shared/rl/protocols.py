"""What the trainer asks of a verifier, a shaping, an environment and a rollout engine. Nothing here is inherited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from bestiary.shared.core.examples import Batch, Example, Message
from bestiary.shared.core.protocols import Rollout, Sampling

Status = Literal["ok", "timeout", "error"]


@dataclass(frozen=True)
class Verdict:
    """What a verifier found.

    Attributes:
        score: the reward; finite.
        status: ``ok``; ``timeout``: the answer cost too much time (its own fault: the score counts); ``error``: the
            harness failed, nothing is known of the answer, and the trainer masks the row.
        parts: named components of the score, for the log.
        note: a few words that say why, for the records.
    """

    score: float
    status: Status = "ok"
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@runtime_checkable
class Verifier(Protocol):
    """Scores one answer. Called from several threads at once; never hangs: each has a deadline of its own.

    One that can tell a bad example before it is played has ``check(example)``, which raises BadDataError; one whose
    best score is not 1 has ``best``. The self-test at start-up uses both.

    Attributes:
        name: in the registry, and in ``Example["verifier"]``.
        version: goes with every number.
    """

    name: str
    version: str

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Score an answer against the gold one; the order matters, a check is seldom symmetric.

        Args:
            gold: ``example["answer"]``, or an empty string where there is none.
            answer: the whole completion, thoughts included.
            example: what was asked; ``meta`` may hold tests, options, instructions.
        """
        ...

    def gold_answer(self, example: Example) -> str | None:
        """A completion that must score 1, for the self-test at start-up; None where no such text is known."""
        ...

    def close(self) -> None:
        """Give processes and files back."""
        ...


@dataclass(frozen=True)
class ScoredRow:
    """One completion as a shaping sees it.

    Attributes:
        example: what was asked. text: the completion. tokens: its length in the policy's own tokens.
        finish_reason: ``stop`` or ``length``. verdict: what the verifier found.
    """

    example: Example
    text: str
    tokens: int
    finish_reason: str
    verdict: Verdict


@runtime_checkable
class Shaping(Protocol):
    """Changes the rewards of a whole step, where a reward depends on the other completions.

    It sees the step of all processes, so what it computes does not depend on their number.
    """

    def __call__(self, rewards: torch.Tensor, groups: Sequence[Sequence[ScoredRow]]) -> torch.Tensor:
        """New rewards.

        Args:
            rewards: (P, G) float64, NaN where the harness failed.
            groups: P groups of G rows.
        """
        ...


@dataclass(frozen=True)
class Turn:
    """What an episode says to a completion.

    Attributes:
        messages: the turns that come before the policy speaks again (tool results, a user's reply).
        done: the episode is over; ``messages`` is empty.
    """

    messages: Sequence[Message] = ()
    done: bool = True


@runtime_checkable
class Episode(Protocol):
    """One rollout's world, made by :meth:`Environment.reset`. Used by one thread at a time."""

    def step(self, text: str) -> Turn:
        """Take what the policy said in its turn (special tokens left out)."""
        ...

    def verify(self, text: str) -> Verdict:
        """Score the episode when it is over; ``text`` is the policy's last turn."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


@runtime_checkable
class Environment(Protocol):
    """Where prompts are played out.

    It may have ``self_test(examples) -> str`` (called at start-up; raises ConfigError), ``describe() -> str`` (a line
    for the log) and ``counters() -> {name: number}`` (this process's, since the start; summed over processes, logged).

    Attributes:
        name, version: go with every number.
        max_turns: turns of the policy after which an episode is cut (it counts as truncated).
    """

    name: str
    version: str
    max_turns: int

    def prompt(self, example: Example) -> Example:
        """The example as the policy is shown it: with the system turn that describes tools, for one with tools."""
        ...

    def reset(self, example: Example, seed: int) -> Episode:
        """A fresh world for one rollout; equal arguments give equal worlds."""
        ...

    def close(self) -> None:
        """Give processes and files back."""
        ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Where completions are drawn. The native one uses the trainer's own model and its cache.

    An engine that lives elsewhere (vLLM beside the trainer or as a server, Ray workers) fits behind the same calls:
    ``begin`` wakes it and hands it the weights of a step, ``end`` puts it to sleep and gives the memory back, and the
    prompt's token ids go over as they stand in the batch.

    Attributes:
        name: goes with every number.
        exact: its log-probabilities are the trainer's own up to rounding, so a difference is an error. Where false, the
            recipe needs an importance correction.
    """

    name: str
    exact: bool

    def begin(self, model: nn.Module, step: int) -> None:
        """Rollouts of a step begin: from now on with these weights."""
        ...

    def generate(self, batch: Batch, n: int, sampling: Sampling, **options: Any) -> Rollout:
        """Complete left-padded prompts, n times each, prompt-major; the noise is that of ``Model.generate``."""
        ...

    def end(self) -> None:
        """Rollouts of the step are over."""
        ...
