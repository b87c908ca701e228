"""Controls for questions about audio: the same questions with silence, or with the audio of another item.

A model that answers as well without the right audio does not listen: it reads the question.

Paper: arXiv:2504.00369 (RUListening), which asked models about noise; silence and a swap are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Content, Example
from bestiary.shared.core.streams import derive_seed
from bestiary.shared.data.lazy import LazyExamples

MODES = ("real", "silent", "swapped")
TRIES = 100
"""Orders of the clips that are tried, where items hold several."""


def controlled(examples: Sequence[Example], mode: str = "real", seed: int = 0) -> Sequence[Example]:
    """Examples with their own audio, with silence, or with audio of other items.

    Args:
        examples: any sequence of chat examples; it is read lazily where it is.
        mode: ``real`` gives the examples as they are, ``silent`` a :class:`Silent`, ``swapped`` a :class:`Swapped`.
        seed: of the swap.

    Raises:
        ConfigError: for another mode.
    """
    if mode not in MODES:
        raise ConfigError(f"audio is {', '.join(MODES)}, not {mode!r}")
    if mode == "real":
        return examples
    return Silent(examples) if mode == "silent" else Swapped(examples, seed)


class Silent(LazyExamples):
    """The examples with zeros of the same length in place of each clip; ``meta["audio"]`` says ``silent``.

    Args:
        examples: chat examples.
    """

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, at: int) -> Example:
        return _replaced(self.examples[at], _silence, "silent")


class Swapped(LazyExamples):
    """The examples, each clip replaced by that of another item; ``meta["audio"]`` says ``swapped``.

    Clips are told apart by the ``key`` of their content (one without a key is a clip of its own). The exchange is a
    fixed one of all clips, a function of their keys and the seed: every clip goes to one other, none stays, and none
    goes to an item that holds it as well. Two questions about one clip get the same other one. A part of the examples
    is exchanged as the whole is. What a clip is exchanged for may happen to have the same answer.

    A sequence with ``audio_keys`` (for each example the keys of its clips, in order) is not read to plan the exchange;
    of any other each example is read once.

    Args:
        examples: chat examples.
        seed: of the exchange.

    Raises:
        ConfigError: at the first access, if there is no such exchange (a single clip, or items that share them all).
    """

    def __init__(self, examples: Sequence[Example], seed: int = 0):
        self.examples, self.seed = examples, seed

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, at: int) -> Example:
        others = iter([self._donors[key] for key in self._keys[at]])
        return _replaced(self.examples[at], lambda content: self._clip(*next(others)), "swapped")

    def _clip(self, item: int, place: int) -> Content:
        return list(_clips(self.examples[item]))[place]

    @cached_property
    def _keys(self) -> list[tuple[str, ...]]:
        known = getattr(self.examples, "audio_keys", None)
        if known is not None:
            return [tuple(keys) for keys in known]
        return [
            tuple(content.get("key") or f"#{at}/{place}" for place, content in enumerate(_clips(self.examples[at])))
            for at in range(len(self.examples))
        ]

    @cached_property
    def _donors(self) -> dict[str, tuple[int, int]]:
        """Key of a clip to the item, and the place in it, of the clip that it is exchanged for."""
        places: dict[str, tuple[int, int]] = {}
        together: set[tuple[str, str]] = set()
        for item, keys in enumerate(self._keys):
            for place, key in enumerate(keys):
                places.setdefault(key, (item, place))
            together |= set(combinations(sorted(set(keys)), 2))
        names = sorted(places)
        rng = np.random.default_rng(derive_seed("swapped-audio", self.seed))
        for _ in range(TRIES if len(names) > 1 else 0):
            ring = [names[i] for i in rng.permutation(len(names))]
            pairs = list(zip(ring, [*ring[1:], ring[0]], strict=True))
            if not any(tuple(sorted(pair)) in together for pair in pairs):
                return {own: places[other] for own, other in pairs}
        raise ConfigError(
            f"audio=swapped needs clips of different items to exchange, and there are {len(names)} in {len(self)} items"
        )


def _clips(example: Example) -> Iterator[Content]:
    for message in example.get("messages", ()):
        yield from (content for content in message["content"] if content["type"] == "audio")


def _silence(content: Content) -> Content:
    value = np.zeros_like(np.asarray(content["value"], np.float32))
    # Silence of one length is one clip, whatever it stands for.
    return {**content, "value": value, "key": f"silence/{len(value)}/{content.get('rate')}"}  # type: ignore[return-value]


def _replaced(example: Example, make: Any, mode: str) -> Example:
    messages: Any = [
        {**message, "content": [make(c) if c["type"] == "audio" else c for c in message["content"]]}
        for message in example.get("messages", ())
    ]
    out: Any = {**example, "messages": messages, "meta": {**example.get("meta", {}), "audio": mode}}
    return out
