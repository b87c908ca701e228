"""CausalLM: a language backbone as a Model of the contract."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import Batch, Example, LMBatch, text_message
from bestiary.shared.core.protocols import LanguageBackbone, Output, Rollout, Sampling
from bestiary.shared.language.generate import Generation
from bestiary.shared.language.processor import TextProcessor


class CausalLM(nn.Module):
    """Text in, text out.

    Args:
        backbone: the language model.
        max_new_tokens: the default length of an answer.
    """

    tasks = ("text", "chat")

    def __init__(self, backbone: LanguageBackbone, max_new_tokens: int = 64):
        super().__init__()
        self.backbone: Any = backbone
        self.max_new_tokens = max_new_tokens

    def processor(self, max_len: int | None = None) -> TextProcessor:
        """Examples to batches, with this backbone's tokenizer."""
        return TextProcessor(self.backbone.tokenizer, max_len)

    def embed(self, batch: Batch) -> torch.Tensor:
        """The embedded prompts (B, T, D)."""
        return self.backbone.embed(batch["input_ids"])  # type: ignore[typeddict-item]

    def forward(self, batch: Batch) -> Output:
        """Logits (B, T, V) of a batch, and what the backbone adds in training (multi-token logits, router balance)."""
        lm: LMBatch = batch  # type: ignore[assignment]
        logits, hidden, _ = self.backbone(self.embed(batch), lm["attention_mask"], lm["position_ids"], lm["seq_idx"])
        backbone: Any = self.backbone
        aux_logits, aux_losses = backbone.take_aux() if hasattr(backbone, "take_aux") else ([], {})
        return Output(logits, aux_logits=aux_logits, hidden=hidden, aux_losses=aux_losses)

    def wrap_policy(self) -> set[type[nn.Module]]:
        """The backbone's layers."""
        return self.backbone.layer_classes()

    def generate(self, batch: Batch, n: int = 1, sampling: Sampling | None = None, **options: Any) -> Rollout:
        """Complete left-padded prompts, n times each.

        Args:
            batch: prompts (mode ``prompt``).
            n: completions per prompt.
            sampling: greedy, ``max_new_tokens`` long, when None.
            **options: those of :class:`~bestiary.shared.language.generate.Generation`: ``think``, ``prefill_chunk``, …
        """
        return self.generation(batch, n, sampling, **options).rollout()

    def generation(self, batch: Batch, n: int = 1, sampling: Sampling | None = None, **options: Any) -> Generation:
        """The same, not yet run: its ``stream()`` gives the text as it comes."""
        return Generation(self.backbone, batch, n, sampling or Sampling(self.max_new_tokens), **options)

    def predict(self, inputs: Sequence[Path | str], out_dir: Path) -> list[Path]:
        """Answer the prompts of .txt files (one a line) or .jsonl files ({"prompt": …}), into answers.jsonl.

        Raises:
            BadDataError: for a file that is not there, empty, or not of these kinds.
        """
        prompts = [prompt for path in inputs for prompt in read_prompts(Path(path))]
        file = out_dir / "answers.jsonl"
        out_dir.mkdir(parents=True, exist_ok=True)
        processor = self.processor()
        with open(file, "w") as handle:
            for start in range(0, len(prompts), 16):
                chunk = prompts[start : start + 16]
                examples: list[Example] = [
                    {"id": str(start + i), "messages": [text_message("user", text)]} for i, text in enumerate(chunk)
                ]
                device = next(self.parameters()).device
                batch = move(processor(examples, "prompt"), device)
                for prompt, text in zip(chunk, self.generate(batch).texts, strict=True):
                    handle.write(json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False) + "\n")
        return [file]


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text or jsonl file."""
    if not path.is_file():
        raise BadDataError(f"{path}: there is no such file")
    try:
        lines = [line for line in path.read_text().split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path} is not UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        try:
            lines = [json.loads(line)["prompt"] for line in lines]
            for line in lines:
                if not isinstance(line, str):
                    raise TypeError(f"{line!r} is no text")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BadDataError(f'{path}: every line must be JSON like {{"prompt": "…"}} ({error!r})') from error
    elif path.suffix != ".txt":
        raise BadDataError(f"{path}: prompts come from .txt (one a line) or .jsonl")
    if not lines:
        raise BadDataError(f"{path} has no prompt in it")
    return lines


def move(batch: Any, device: torch.device) -> Any:
    """A batch's tensors on a device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {k: move(v, device) for k, v in batch.items()}
    return batch
