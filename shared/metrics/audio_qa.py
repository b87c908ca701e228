"""Questions about audio whose answers are letters, labels or numbers: accuracy, and how often an answer can be read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bestiary.shared.core.build import nearest
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.metrics.audio_answers import Answered, check_sizes, completions, values_of
from bestiary.shared.metrics.audio_matchers import MATCHERS, Read, numeric, plain_label
from bestiary.shared.metrics.pass_at import interval
from bestiary.shared.rl.rewards.text import options_of

UNREAD = "(not read)"
"""Column of a confusion for answers that could not be read."""


@dataclass(frozen=True)
class Scored:
    """An answer, and what the matcher read in it; ``read`` is None for an example that is not scored."""

    answered: Answered
    read: Read | None


class AudioQA:
    """Greedy answers, read by a matcher and compared with the gold ones.

    What is asked is the data set's (its ``prompt``), so a number is of a wording, a matcher and a version. Examples
    without a verifier (secret answers, open questions for a judge) are asked and not scored: they are counted as
    ``unscored``, and their answers are in ``answers_file``.

    Examples with ``meta["item"]`` and ``meta["fold"]`` are folds of one item: the interval is then over items, and
    ``vote`` is the accuracy of what most folds of an item answered (of as many, what was answered first).

    Args:
        matcher: ``letter``, ``mmau_words``, ``muchomusic``, ``rul``, ``label`` or ``numeric``; see
            :mod:`bestiary.shared.metrics.audio_matchers`.
        max_new_tokens: longest answer, thoughts included.
        batch_size: prompts at once.
        by: keys of ``meta``: accuracy is reported for each of their values too.
        label: put before the names of the numbers.
        absolute: of the matcher ``numeric``: the largest difference that counts as equal.
        answers_file: a JSON file for all answers, the confusion and the numbers, or None.

    Raises:
        ConfigError: for a matcher that is not there, or sizes below 1.
    """

    name = "audio_qa"
    version = "1"

    def __init__(
        self,
        matcher: str = "letter",
        max_new_tokens: int = 64,
        batch_size: int = 8,
        by: Sequence[str] = (),
        label: str = "",
        absolute: float = 0.0,
        answers_file: str | Path | None = None,
    ):
        if matcher not in MATCHERS:
            raise ConfigError(
                f"audio_qa has no matcher {matcher!r}{nearest(matcher, MATCHERS)}; there are: {', '.join(MATCHERS)}"
            )
        check_sizes("audio_qa", max_new_tokens, batch_size)
        self.matcher, self.max_new_tokens, self.batch_size = matcher, max_new_tokens, batch_size
        self.by, self.prefix, self.absolute = tuple(by), f"{label}/" if label else "", absolute
        self.answers_file = None if answers_file is None else Path(answers_file)

    def __call__(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """``accuracy`` with ``/low`` and ``/high`` (95 %), ``followed``, ``prompts``, ``unscored``,
        ``truncated_share``; ``accuracy/KEY=VALUE`` by ``by``; ``vote`` for folds; ``macro_f1`` of ``label``.

        ``followed`` is the share of scored answers in which a choice could be read.
        """
        scored = self.answer(model, examples)
        values = {f"{self.prefix}{name}": value for name, value in self.numbers(scored).items()}
        if self.answers_file is not None:
            self._write(scored, values)
        return values

    def answer(self, model: nn.Module, examples: Sequence[Example]) -> list[Scored]:
        """The model's answers, read."""
        return self.read(completions(model, examples, self.max_new_tokens, self.batch_size))

    def read(self, answers: Sequence[Answered]) -> list[Scored]:
        """Answers, read: no model is needed."""
        match: Callable[[str, Example], Read] = MATCHERS[self.matcher]
        if self.matcher == "numeric":
            match = lambda text, example: numeric(text, example, self.absolute)  # noqa: E731
        return [Scored(a, match(a.text, a.example) if a.example.get("verifier") else None) for a in answers]

    def numbers(self, scored: Sequence[Scored]) -> dict[str, float]:
        """The metrics of read answers, without the label."""
        asked = float(len(scored))
        cut = sum(one.answered.cut for one in scored) / asked
        counted = [(one.answered.example, one.read) for one in scored if one.read is not None]
        out = {"prompts": asked, "unscored": asked - len(counted), "truncated_share": cut}
        if not counted:
            return out
        items: dict[str, list[tuple[Example, Read]]] = {}
        for example, read in counted:
            items.setdefault(str((example.get("meta") or {}).get("item", example["id"])), []).append((example, read))
        means = [sum(read.right for _, read in folds) / len(folds) for folds in items.values()]
        out["accuracy"] = sum(read.right for _, read in counted) / len(counted)
        folded = len(items) < len(counted)
        out["accuracy/low"], out["accuracy/high"] = interval(means, 2 if folded else 1)
        out["followed"] = sum(read.choice is not None for _, read in counted) / len(counted)
        if folded:
            out["vote"] = sum(map(_vote, items.values())) / len(items)
        for key in self.by:
            kinds: dict[str, list[bool]] = {}
            for example, read in counted:
                for value in values_of(example, key):
                    kinds.setdefault(value, []).append(read.right)
            out |= {f"accuracy/{key}={kind}": sum(here) / len(here) for kind, here in sorted(kinds.items())}
        if self.matcher == "label":
            out["macro_f1"] = macro_f1(confusion(scored))
        return out

    def _write(self, scored: Sequence[Scored], values: dict[str, float]) -> None:
        assert self.answers_file is not None
        rows = [
            {
                "id": one.answered.example["id"],
                "model_prediction": one.answered.text,
                "choice": one.read and one.read.choice,
                "right": one.read and one.read.right,
                "answer": one.answered.example.get("answer"),
                "meta": one.answered.example.get("meta", {}),
            }
            for one in scored
        ]
        whole = {
            "protocol": {"name": self.name, "version": self.version, "matcher": self.matcher},
            "values": values,
            "confusion": confusion(scored) if self.matcher == "label" else None,
            "answers": rows,
        }
        self.answers_file.parent.mkdir(parents=True, exist_ok=True)
        self.answers_file.write_text(json.dumps(whole, ensure_ascii=False, indent=1, default=str) + "\n")


def confusion(scored: Sequence[Scored]) -> dict[str, dict[str, int]]:
    """Gold label to what was answered instead or as well, to how often; :data:`UNREAD` where nothing could be read."""
    out: dict[str, Counter[str]] = {}
    for one in scored:
        if one.read is not None:
            gold = plain_label(one.answered.example["answer"])
            out.setdefault(gold, Counter())[one.read.choice or UNREAD] += 1
    return {gold: dict(sorted(row.items())) for gold, row in sorted(out.items())}


def macro_f1(table: dict[str, dict[str, int]]) -> float:
    """The mean F1 over the labels that occur as gold ones; an answer of another label is no label's."""
    scores = []
    for gold, row in table.items():
        right = row.get(gold, 0)
        said = sum(other.get(gold, 0) for other in table.values())
        scores.append(2 * right / (said + sum(row.values())))
    return sum(scores) / len(scores)


def _vote(folds: Sequence[tuple[Example, Read]]) -> bool:
    """Whether most folds that can be read name the gold option, by its text: letters differ between folds."""
    said = [options_of(example)[read.choice] for example, read in folds if read.choice in options_of(example)]
    first = folds[0][0]
    return bool(said) and Counter(said).most_common(1)[0][0] == options_of(first).get(first["answer"])
