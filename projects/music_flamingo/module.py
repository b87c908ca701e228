"""Music Flamingo's LightningModule: what it adds to the base is its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bestiary.shared.core.examples import Example
from bestiary.shared.core.module import BestiaryModule
from bestiary.shared.language.causal_lm import move
from bestiary.shared.viz.curves import plot_curves

SHOWN = 6
"""Held-out questions whose answers a run prints."""


class MusicFlamingoModule(BestiaryModule):
    """Prints held-out numbers, and what the model thinks and answers."""

    @classmethod
    def report(cls, model: nn.Module, run: Any) -> list[str]:
        """Numbers and answers; the latter go to samples.jsonl, the curves of the run to curves.png.

        Args:
            model: the trained model.
            run: the :class:`~bestiary.shared.core.runs.FinishedRun`.
        """
        examples = [e for _, part in run.evaluations.values() for e in first_questions(run.source, run.split, part)]
        samples = answers(model, examples[:SHOWN])
        (run.folder / "samples.jsonl").write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
        curves = plot_curves({"loss": run.folder / "metrics.csv"}, run.folder / "curves.png")
        lines = super().report(model, run)
        for sample in samples:
            lines += [
                "",
                f"--- {sample['id']}: {sample['question']}",
                sample["answer"],
                f"(right: {sample['expected']})",
            ]
        return [*lines, "", f"curves      {curves}"]


def first_questions(source: Any, split: str, part: str | None) -> list[Example]:
    """The first held-out examples of a part that ask something."""
    held_out = source.held_out(split, part)
    found = [held_out[i] for i in range(min(SHOWN, len(held_out)))]
    return [example for example in found if question(example)]


def question(example: Example) -> str:
    """The text of the last turn."""
    return "".join(c["value"] for c in example["messages"][-1]["content"] if c["type"] == "text").strip()


def answers(model: Any, examples: Sequence[Example]) -> list[dict[str, str]]:
    """What a model answers, greedily: ``{id, question, answer, expected}`` of each example."""
    if not examples:
        return []
    batch = move(model.processor()(examples, "prompt"), next(model.parameters()).device)
    with torch.no_grad():
        texts = model.generate(batch, 1).texts
    return [
        {"id": e["id"], "question": question(e), "answer": text, "expected": str(e.get("answer", ""))}
        for e, text in zip(examples, texts, strict=True)
    ]
