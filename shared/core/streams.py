"""The order of data: sample k of a stage is a pure function of (seed, stage, k)."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
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


def uniform_keys(seed: int, names: Sequence[str], samples: Sequence[int]) -> np.ndarray:
    """One 64-bit key a row, a function of (seed, name, sample); see :func:`uniforms`."""
    known: dict[str, int] = {}
    for name in names:
        if name not in known:
            known[name] = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    keys = np.array([known[name] for name in names], np.uint64)
    keys = _mix(keys ^ _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64)))
    return _mix(keys + np.asarray(samples, np.uint64))


def uniforms(keys: np.ndarray, number: int) -> np.ndarray:
    """Draw ``number`` of each key: float64 in [0, 1 - 2**-52], independent between keys and numbers."""
    bits = _mix(keys ^ _mix(np.array([number], np.uint64)))
    return (bits >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of 64 bits in which each input bit changes half of the output's."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _code(name: str) -> int:
    return zlib.crc32(name.encode())


@lru_cache(maxsize=8)
def _permutation(seed: int, stage: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, stage, epoch, n]).permutation(n)
