"""Nemotron-H's LightningModule: what it adds to the base is its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from bestiary.shared.core.examples import Example
from bestiary.shared.core.module import BestiaryModule
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.language.causal_lm import move
from bestiary.shared.viz.curves import plot_curves

PROMPT_TOKENS, NEW_TOKENS = 64, 160
"""Tokens of a held-out document that are given, and tokens that are written."""

PROMPTS = 3
"""Held-out documents that are continued; one more text is written from nothing."""


class NemotronHModule(BestiaryModule):
    """Prints held-out numbers, and how the model goes on with held-out documents."""

    @classmethod
    def report(cls, model: nn.Module, run: Any) -> list[str]:
        """Numbers and continuations; the latter go to samples.jsonl, the curves of the run to curves.png.

        Args:
            model: the trained model.
            run: the :class:`~bestiary.shared.core.runs.FinishedRun`.
        """
        samples = continuations(model, run.source.held_out(run.split))
        (run.folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
        curves = plot_curves({"loss": run.folder / "metrics.csv"}, run.folder / "curves.png")
        lines = super().report(model, run)
        for sample in samples:
            lines += ["", f"--- {sample['id']}, written from | on", f"{sample['prompt']}|{sample['continuation']}"]
        return [*lines, "", f"curves      {curves}"]


def continuations(model: Any, held_out: Sequence[Example]) -> list[dict[str, str]]:
    """What the model writes from nothing, and after the first tokens of the first held-out documents.

    Every prompt opens with the end-of-text token, as every document does in training.

    Args:
        model: a causal language model.
        held_out: text examples.

    Returns:
        ``{id, prompt, continuation}`` of each.
    """
    tokenizer = model.backbone.tokenizer
    prompts: list[Example] = [{"id": "from nothing", "tokens": np.array([tokenizer.eos_id])}]
    for example in (held_out[i] for i in range(min(PROMPTS, len(held_out)))):
        if "text" in example:
            ids = tokenizer.encode(example["text"])[:PROMPT_TOKENS]
            prompts.append({"id": example["id"], "tokens": np.array([tokenizer.eos_id, *ids])})
    batch = move(model.processor()(prompts, "prompt"), next(model.parameters()).device)
    with torch.no_grad():
        texts = model.generate(batch, 1, Sampling(NEW_TOKENS, temperature=0.8, top_p=0.95)).texts
    return [
        {"id": prompt["id"], "prompt": tokenizer.decode(prompt["tokens"].tolist()), "continuation": text}
        for prompt, text in zip(prompts, texts, strict=True)
    ]
