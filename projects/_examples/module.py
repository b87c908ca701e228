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
        examples = list(run.source.held_out("test", "chat"))[:4]
        with torch.no_grad():
            batch = move(model.processor()(examples, "prompt"), next(model.parameters()).device)  # type: ignore[operator]
            texts = model.generate(batch, 1).texts  # type: ignore[operator]
        samples = [
            {"prompt": e["messages"][-1]["content"][0]["value"], "answer": t, "expected": e["answer"]}
            for e, t in zip(examples, texts, strict=True)
        ]
        (run.folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
        curves = plot_curves({"loss": run.folder / "metrics.csv"}, run.folder / "curves.png")
        lines = super().report(model, run)
        return lines + ["", *(f"  {s['prompt']} -> {s['answer']}" for s in samples), "", f"curves      {curves}"]
