"""From a data source to a rank's whole step: sample k is a pure function of (seed, stage, k), workers or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.core.protocols import DataSource, Processor
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream

Weight = float | Sequence[float]
"""A blend's weight of one entry: a number, or one number a phase."""


class Blend:
    """Several sources drawn in proportion: which one sample k comes from depends on (seed, stage, k) alone.

    With phases, the proportions change at given steps; sample k belongs to the step ``k // global_batch``, so a run
    that is resumed in any phase draws what the unbroken run draws.

    Args:
        entries: (source, part, weight) of each; weights need not sum to one. A list holds one weight a phase.
        starts: the steps at which the second and later phases begin; empty for one phase.

    Raises:
        ConfigError: for weights that do not fit.
    """

    def __init__(self, entries: Sequence[tuple[DataSource, str | None, Weight]], starts: Sequence[int] = ()):
        weights = {str(i): weight for i, (*_, weight) in enumerate(entries)}
        self.entries = [(source, part) for source, part, _ in entries]
        self.starts = list(starts)
        self.revision = "+".join(source.revision for source, *_ in entries)
        self._edges = np.cumsum(phase_weights("a blend", weights, len(self.starts) + 1), 1)

    def spec(self) -> DataSpec:
        """The first source's spec."""
        return self.entries[0][0].spec()

    def check(self) -> None:
        """Check every source."""
        for source, _ in self.entries:
            source.check()

    def phase(self, k: int, stream: Stream) -> int:
        """The phase that sample k of a stream falls into, from 0."""
        return int(np.searchsorted(self.starts, k // stream.global_batch, side="right"))

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Sample k of the blend. ``part`` is not used: each entry has its own."""
        edges = self._edges[self.phase(k, stream)]
        index = int(np.searchsorted(edges, stream.rng(k, "blend").random() * edges[-1], side="right"))
        source, own_part = self.entries[index]
        return source.train_example(k, Stream(stream.seed, f"{stream.stage}/{index}", stream.global_batch), own_part)

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """All sources' held-out examples, one after another."""
        return [example for source, own in self.entries for example in source.held_out(split, part or own)]


def phase_weights(where: str, weights: Mapping[str, Weight], phases: int) -> np.ndarray:
    """The weights of a blend as (phases, entries); a single number holds in every phase.

    Args:
        where: what the message begins with.
        weights: entry name to its weight, or to one weight a phase (0: not in this phase).
        phases: how many phases there are.

    Raises:
        ConfigError: for a list of another length, a weight that is no number or negative, an entry that no phase draws
            from, or a phase without an entry.
    """
    table = np.zeros((phases, len(weights)))
    for column, (name, weight) in enumerate(weights.items()):
        values = list(weight) if isinstance(weight, Sequence) and not isinstance(weight, str) else [weight] * phases
        if len(values) != phases:
            raise ConfigError(
                f"{where}: entry {name} has {len(values)} weights and there are {phases} phases "
                "(phases: [0.6, 0.8] makes three); give one number, or one a phase"
            )
        if not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < float("inf") for v in values):
            raise ConfigError(f"{where}: entry {name} needs positive weights, not {weight!r}")
        table[:, column] = values
    if not len(weights) or (table.sum(0) <= 0).any() or (table.sum(1) <= 0).any():
        raise ConfigError(f"{where} needs at least one source in each phase, and positive weights")
    return table


def phase_starts(shares: Sequence[float], steps: int) -> list[int]:
    """The steps at which the second and later phases begin.

    Args:
        shares: shares of a stage's steps, rising.
        steps: the stage's steps.
    """
    return [round(share * steps) for share in shares]


def check_phases(where: str, blend: Mapping[str, Any] | None, shares: Any) -> None:
    """Check a stage's ``phases`` and the weights of its ``blend`` before anything is built.

    Raises:
        ConfigError: for phases without a blend, shares that do not rise between 0 and 1, or weights that do not fit.
    """
    shares = shares or []
    if shares and not blend:
        raise ConfigError(f"{where}.phases needs a blend, whose weights it changes")
    numbers = isinstance(shares, list) and all(isinstance(s, int | float) for s in shares)
    if not numbers or not all(a < b for a, b in zip([0, *shares], [*shares, 1], strict=True)):
        raise ConfigError(f"{where}.phases is a rising list of shares between 0 and 1, like [0.6, 0.8], not {shares!r}")
    if blend:
        weights = {name: (entry or {}).get("weight", 1) for name, entry in blend.items()}
        phase_weights(f"{where}.blend", weights, len(shares) + 1)


@dataclass(frozen=True)
class StageData:
    """What an objective that makes its own data is given in place of a loader (``Objective.loader``).

    Attributes:
        source, part: where prompts come from. stream: names the stage's samples.
        processor: examples to batches.
        start, steps: the first step that is left, and the stage's steps.
        rank, world_size: this process.
        folder: the stage's folder, for what the objective writes.
        max_len: longest sequence in tokens, or None.
    """

    source: DataSource
    part: str | None
    stream: Stream
    processor: Processor
    start: int
    steps: int
    rank: int
    world_size: int
    folder: Path
    max_len: int | None = None


class StreamDataset(Dataset[Example]):
    """Sample k of a stage by its number; with ``repeat`` set, k counts within the first ``repeat`` samples only."""

    def __init__(self, source: DataSource, stream: Stream, part: str | None = None, repeat: int | None = None):
        self.source, self.stream, self.part, self.repeat = source, stream, part, repeat

    def __getitem__(self, k: int) -> Example:
        return self.source.train_example(k % self.repeat if self.repeat else k, self.stream, self.part)


class RankSteps(Sampler[list[int]]):
    """The sample numbers of one rank, a whole step at a time, from any step on."""

    def __init__(self, steps: int, global_batch: int, rank: int = 0, world_size: int = 1, start: int = 0):
        if global_batch % world_size:
            raise ConfigError(f"batch_size {global_batch} cannot be divided over {world_size} processes")
        self.steps, self.global_batch, self.start = steps, global_batch, start
        self.per_rank = global_batch // world_size
        self.offset = rank * self.per_rank

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.steps):
            first = step * self.global_batch + self.offset
            yield list(range(first, first + self.per_rank))


class Collate:
    """Examples to the rank's batch; a class so that workers can pickle it."""

    def __init__(self, processor: Processor):
        self.processor = processor

    def __call__(self, examples: list[Example]) -> Any:
        return self.processor(examples, "train")


def train_loader(dataset: StreamDataset, sampler: RankSteps, processor: Processor, num_workers: int) -> DataLoader:
    """A loader that yields the rank's whole step, in the sampler's order whatever the number of workers."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=Collate(processor),
        num_workers=num_workers,
    )
