"""The order of data: sample k of a stage is a pure function of (seed, stage, k)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Stream:
    """Names one stage's endless stream of samples. Sample k depends on these fields and k, on nothing else.

    Attributes:
        seed: the run's seed.
        stage: the stage's name.
        global_batch: samples per optimiser step over all ranks; ``k % global_batch`` is the place in a batch.
    """

    seed: int
    stage: str
    global_batch: int = 1

    def rng(self, k: int, purpose: str = "") -> np.random.Generator:
        """A fresh generator for sample k; ``purpose`` separates independent draws for one sample."""
        return np.random.default_rng([self.seed, _code(self.stage), _code(purpose), k])

    def shuffled(self, k: int, n: int) -> int:
        """Index of sample k in a set of n items that is reshuffled each time round."""
        if n <= 0:
            raise ValueError("an empty set has no samples")
        return int(_permutation(self.seed, _code(self.stage), k // n, n)[k % n])


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from numbers and names; the same parts give the same seed on every machine."""
    numbers = [_code(p) if isinstance(p, str) else p for p in parts]
    return int(np.random.SeedSequence(numbers).generate_state(2, np.uint32).view(np.uint64)[0] >> np.uint64(1))


def _code(name: str) -> int:
    return zlib.crc32(name.encode())


@lru_cache(maxsize=8)
def _permutation(seed: int, stage: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, stage, epoch, n]).permutation(n)
