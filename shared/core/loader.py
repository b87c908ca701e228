"""From a data source to a rank's whole step: sample k is a pure function of (seed, stage, k), workers or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.core.protocols import DataSource, Processor
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream


class Blend:
    """Several sources drawn in proportion: which one sample k comes from depends on (seed, stage, k) alone.

    Args:
        entries: (source, part, weight) of each; weights need not sum to one.
    """

    def __init__(self, entries: Sequence[tuple[DataSource, str | None, float]]):
        if not entries or any(weight <= 0 for *_, weight in entries):
            raise ConfigError("a blend needs at least one source, and positive weights")
        self.entries = list(entries)
        self.revision = "+".join(source.revision for source, *_ in entries)
        self._edges = np.cumsum([weight for *_, weight in entries])

    def spec(self) -> DataSpec:
        """The first source's spec."""
        return self.entries[0][0].spec()

    def check(self) -> None:
        """Check every source."""
        for source, *_ in self.entries:
            source.check()

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Sample k of the blend. ``part`` is not used: each entry has its own."""
        at = stream.rng(k, "blend").random() * self._edges[-1]
        index = int(np.searchsorted(self._edges, at, side="right"))
        source, own_part, _ = self.entries[index]
        return source.train_example(k, Stream(stream.seed, f"{stream.stage}/{index}", stream.global_batch), own_part)

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """All sources' held-out examples, one after another."""
        return [example for source, own, _ in self.entries for example in source.held_out(split, part or own)]


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
