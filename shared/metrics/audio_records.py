"""Captions against structured records: precision, recall and F1 of each category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.metrics.audio_answers import Answered, check_sizes, completions
from bestiary.shared.rl.rewards.metadata import Metadata, Named

CATEGORIES = (
    "Genre", "BPM", "Key", "Meter", "Structure", "Instruments", "Vocal character", "Lyric themes", "Theory",
    "Mix notes", "Dynamics",
)  # fmt: skip
"""Music Flamingo's categories of a record. Paper: arXiv:2511.10289, structured thinking reward."""


class StructuredF1:
    """What captions name of the records of their music, by the rules of the verifier ``metadata``.

    Counts are summed over all captions: recall is the share of the records' values that are named, precision the share
    of right ones among the values that are named. Of tempos, keys and metres all that a caption names are known; of
    another category precision is known where all its values are (``vocabulary``), and is left out elsewhere, with its
    F1. Thoughts do not count.

    Args:
        categories: those that count, any names; None for all that records have. :data:`CATEGORIES` are the paper's.
        kinds: category to ``text``, ``bpm``, ``key`` or ``meter``; tempo, key and metre are known by their names.
        vocabulary: category to all values it can have; an example's ``meta["vocabulary"]`` comes before it.
        answer_tag: what is read is in ``<tag>…</tag>``; None for all that follows the thoughts.
        max_new_tokens: longest caption.
        batch_size: prompts at once.
        label: put before the names of the numbers.
        temperature: of the captions; 0 is greedy.
    """

    name = "structured_f1"
    version = "1"

    def __init__(
        self,
        categories: Sequence[str] | None = None,
        kinds: Mapping[str, str] | None = None,
        vocabulary: Mapping[str, Sequence[str]] | None = None,
        answer_tag: str | None = None,
        max_new_tokens: int = 512,
        batch_size: int = 8,
        label: str = "",
        temperature: float = 0.0,
    ):
        check_sizes("structured_f1", max_new_tokens, batch_size)
        self.metadata = Metadata(categories, kinds, vocabulary, answer_tag=answer_tag)
        self.max_new_tokens, self.batch_size, self.temperature = max_new_tokens, batch_size, temperature
        self.prefix = f"{label}/" if label else ""

    def __call__(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """``precision/CATEGORY``, ``recall/…`` and ``f1/…``, each with its ``/mean`` over the categories that have it,
        and the number of ``prompts``.

        Raises:
            BadDataError: for a record that is missing, or a value that no caption could name.
            ConfigError: if no record has a category that counts.
        """
        return self.numbers(completions(model, examples, self.max_new_tokens, self.batch_size, self.temperature))

    def numbers(self, answers: Sequence[Answered]) -> dict[str, float]:
        """The metrics of captions: no model is needed."""
        counts: dict[str, list[Named]] = {}
        for one in answers:
            self.metadata.check(one.example)
            for category, named in self.metadata.named(one.text, one.example).items():
                counts.setdefault(category, []).append(named)
        if not counts:
            raise ConfigError("structured_f1: no example has a record with a category that counts")
        scores: dict[str, dict[str, float]] = {"precision": {}, "recall": {}, "f1": {}}
        for category, rows in sorted(counts.items()):
            wanted, hit = sum(row.wanted for row in rows), sum(row.hit for row in rows)
            scores["recall"][category] = recall = hit / wanted
            if any(row.named is None for row in rows):
                continue
            said, right = sum(row.named or 0 for row in rows), sum(row.right or 0 for row in rows)
            scores["precision"][category] = precision = right / said if said else 0.0
            both = precision + recall
            scores["f1"][category] = 2 * precision * recall / both if both else 0.0
        out = {"prompts": float(len(answers))}
        for kind, values in scores.items():
            out |= {f"{kind}/{category}": value for category, value in values.items()}
            if values:
                out[f"{kind}/mean"] = sum(values.values()) / len(values)
        return {f"{self.prefix}{name}": value for name, value in out.items()}
