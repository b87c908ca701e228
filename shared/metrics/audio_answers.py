"""A model's answers to examples with audio, held a batch at a time: what AudioQA, ErrorRate and StructuredF1 score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.language.causal_lm import move


@dataclass(frozen=True)
class Answered:
    """An example without its media, and what the model said.

    Attributes:
        example: ``id``, ``answer``, ``verifier`` and ``meta`` of the example.
        text: the completion.
        cut: whether it was cut off at its longest length.
    """

    example: Example
    text: str
    cut: bool


def completions(
    model: nn.Module, examples: Sequence[Example], max_new_tokens: int, batch_size: int, temperature: float = 0.0
) -> list[Answered]:
    """One completion of each example. One batch of audio is held at a time.

    Args:
        model: any model with ``processor`` and ``generate``.
        examples: chat examples, read one batch after another.
        max_new_tokens: longest completion.
        batch_size: examples at once.
        temperature: 0 is greedy.
    """
    process: Any = model.processor()  # type: ignore[operator]
    device = next(model.parameters()).device
    out = []
    for start in range(0, len(examples), batch_size):
        chunk = [examples[at] for at in range(start, min(start + batch_size, len(examples)))]
        batch = move(process(chunk, "prompt"), device)
        rollout = model.generate(batch, 1, Sampling(max_new_tokens, temperature))  # type: ignore[operator]
        for example, text, reason in zip(chunk, rollout.texts, rollout.finish_reasons, strict=True):
            kept: Any = {key: example[key] for key in ("id", "answer", "verifier", "meta") if key in example}  # type: ignore[literal-required]
            out.append(Answered(kept, text, reason == "length"))
    return out


def check_sizes(name: str, max_new_tokens: int, batch_size: int) -> None:
    """Raise ConfigError for lengths and batches below 1."""
    if max_new_tokens < 1 or batch_size < 1:
        raise ConfigError(f"{name}: max_new_tokens and batch_size must be 1 or more")


def values_of(example: Example, key: str) -> list[str]:
    """The values of a key of ``meta`` as texts: none, one, or those of a list."""
    value: Any = (example.get("meta") or {}).get(key)
    if value is None:
        return []
    return [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
