"""The tutorial's LightningModule: what it adds to the base is its report."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from bestiary.shared.core.module import BestiaryModule
from bestiary.shared.language.causal_lm import move
from bestiary.shared.viz.curves import plot_curves


class ExampleModule(BestiaryModule):
    """Prints held-out numbers, and a few answers."""

    @classmethod
    def report(cls, model: nn.Module, run: Any) -> list[str]:
        """Numbers, and what the model answers to the first held-out prompts; they go to samples.jsonl too."""
        samples = sample_answers(model, run)
        (run.folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
        curves = plot_curves({"loss": run.folder / "metrics.csv"}, run.folder / "curves.png")
        lines = super().report(model, run)
        return lines + ["", *(f"  {s['prompt']} -> {s['answer']}" for s in samples), "", f"curves      {curves}"]


def sample_answers(model: nn.Module, run: Any, count: int = 4) -> list[dict[str, str]]:
    """What a model answers to the first held-out chats of a run."""
    for protocol, part in run.evaluations.values():
        examples = [e for e in run.source.held_out(run.split, part)[:count] if "messages" in e]
        if not examples:
            continue
        if hasattr(protocol, "play"):  # in an environment, turn by turn
            answers = [" / ".join(group.rows[0].turns) for group in protocol.play(model, examples)]
        elif not hasattr(protocol, "max_new_tokens"):  # it asks for no answers (a reward model gives scores)
            continue
        else:
            with torch.no_grad():
                device = next(model.parameters()).device
                batch = move(model.processor()(examples, "prompt"), device)  # type: ignore[operator]
                answers = model.generate(batch, 1).texts  # type: ignore[operator]
        return [
            {"prompt": e["messages"][-1]["content"][0]["value"], "answer": answer, "expected": e.get("answer", "")}
            for e, answer in zip(examples, answers, strict=True)
        ]
    return []
