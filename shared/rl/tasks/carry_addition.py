"""carry_addition: two-digit addition from a teacher that forgets carries, and the exact answers to learn better."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example, text_message
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream, derive_seed

PROMPTS = tuple(f"{a:02}+{b:02}=" for a in range(100) for b in range(100))


class CarryAddition:
    """``37+58=`` asks for ``095``: 10,000 prompts, and two parts to learn them from.

    The part ``sft`` is what a noisy teacher writes: with probability ``noise`` it forgets all carries of an example
    (``37+58=085``). A student that imitates it well forgets them as often, and answers most prompts with a carry wrong
    when it takes the likelier digit. The part ``rl`` (and the whole) has the exact answers for the verifier
    ``exact_text``, with which the student can pass its teacher.

    Splits are by prompt: ``test`` are those whose md5 is divisible by 10, ``val`` those where 1 is left over, and
    neither is in any training part, nor in the other. Each held-out split is a fixed set of draws with replacement, so
    that its shares of prompts with and without a carry are those of the task.

    Args:
        noise: how often the teacher forgets the carries.
        held_out: draws of each held-out split.

    Raises:
        ConfigError: for numbers that cannot be.
    """

    def __init__(self, noise: float = 0.6, held_out: int = 512):
        if not 0 <= noise <= 1:
            raise ConfigError(f"carry_addition: noise is a probability, not {noise}")
        if held_out < 1:
            raise ConfigError(f"carry_addition: held_out must be 1 or more, not {held_out}")
        self.noise, self.held_out_count = noise, held_out
        places = [int(hashlib.md5(prompt.encode(), usedforsecurity=False).hexdigest(), 16) % 10 for prompt in PROMPTS]
        splits = {0: "test", 1: "val"}
        self._prompts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
        for prompt, place in zip(PROMPTS, places, strict=True):
            self._prompts[splits.get(place, "train")].append(prompt)
        self.revision = f"carry_addition-1-noise{noise:g}"

    def spec(self) -> DataSpec:
        """Chat."""
        return DataSpec(task="chat")

    def check(self) -> None:
        """Nothing can be missing: the data is computed."""

    def prompts(self, split: str) -> Sequence[str]:
        """The different prompts of ``train``, ``val`` or ``test``."""
        return self._prompts[split]

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Prompt k, all of them once before any comes again; in the part ``sft`` with the teacher's answer."""
        self._known(part)
        prompt = self._prompts["train"][stream.shuffled(k, len(self._prompts["train"]))]
        if part != "sft":
            return _example(prompt[:-1], prompt)
        forgets = bool(stream.rng(k, "teacher").random() < self.noise)
        example = _example(f"sft-{prompt[:-1]}", prompt, forgets)
        del example["verifier"]  # the answer may be wrong: nothing is to be scored with it
        return example

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """Draws of ``val`` or ``test``, with the exact answers, whatever the part."""
        self._known(part)
        if split not in ("val", "test"):
            raise ConfigError(f"carry_addition holds out val and test, not {split!r}")
        prompts = self._prompts[split]
        rng = np.random.default_rng(derive_seed("carry_addition", split))
        drawn = [prompts[int(i)] for i in rng.integers(0, len(prompts), self.held_out_count)]
        return [_example(f"{split}-{at}-{prompt[:-1]}", prompt) for at, prompt in enumerate(drawn)]

    def _known(self, part: str | None) -> None:
        if part not in (None, "sft", "rl"):
            raise ConfigError(f"carry_addition has the parts sft and rl, not {part!r}")


def add(a: int, b: int, carries: bool = True) -> str:
    """Three digits of a + b; without carries each place is added on its own."""
    if carries:
        return f"{a + b:03}"
    return f"0{(a // 10 + b // 10) % 10}{(a % 10 + b % 10) % 10}"


def _example(name: str, prompt: str, forgets: bool = False) -> Example:
    a, b = int(prompt[:2]), int(prompt[3:5])
    exact = add(a, b)
    return Example(
        id=name,
        messages=[text_message("user", prompt)],
        answer=add(a, b, carries=not forgets),
        verifier="exact_text",
        meta={"carry": exact != add(a, b, carries=False)},
    )
