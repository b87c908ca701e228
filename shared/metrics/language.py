"""Protocols for language models: bits per byte, and answers by exact match."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bestiary.shared.core.examples import Example
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.language.causal_lm import move


class BitsPerByte:
    """Compression of held-out text: total negative log-likelihood in bits over total UTF-8 bytes.

    A text is cut into windows of ``window`` tokens that do not overlap. Each begins behind an end-of-text token, so
    every token is predicted, the first of a window from nothing else: a shorter window scores worse.

    Args:
        window: tokens a window.
        batch_size: windows at once.
        label: appended to the names of the numbers (``bits_per_byte/LABEL``), where several texts are scored apart.
    """

    name = "bits_per_byte"
    version = "1"

    def __init__(self, window: int = 256, batch_size: int = 16, label: str | None = None):
        self.window, self.batch_size = window, batch_size
        self.suffix = f"/{label}" if label else ""

    def __call__(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """``bits_per_byte`` and the ``bytes`` it rests on."""
        tokenizer: Any = model.backbone.tokenizer  # type: ignore[union-attr]
        device = next(model.parameters()).device
        windows, total_bytes, bits = [], 0, 0.0
        for example in examples:
            ids = tokenizer.encode(example["text"])
            total_bytes += len(example["text"].encode())
            windows += [[tokenizer.eos_id, *ids[i : i + self.window]] for i in range(0, len(ids), self.window)]
        for start in range(0, len(windows), self.batch_size):
            rows = windows[start : start + self.batch_size]
            width = max(len(r) for r in rows)
            ids = torch.tensor([r + [tokenizer.pad_id] * (width - len(r)) for r in rows])
            mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
            batch = {
                "ids": [""] * len(rows),
                "input_ids": ids,
                "attention_mask": mask,
                "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
                "labels": ids,
                "seq_idx": None,
                "media": {},
            }
            logits = model(move(batch, device)).logits.float().cpu()
            losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            bits += float((losses.double() * mask[:, 1:].flatten()).sum()) / math.log(2)
        return {
            f"bits_per_byte{self.suffix}": bits / max(total_bytes, 1),
            f"bytes{self.suffix}": float(total_bytes),
        }


class ExactMatch:
    """Share of chat prompts whose greedy answer equals the reference, white space at the ends aside.

    Args:
        max_new_tokens: longest answer.
        batch_size: prompts at once.
    """

    name = "exact_match"
    version = "1"

    def __init__(self, max_new_tokens: int = 32, batch_size: int = 32):
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def __call__(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """``exact_match`` between 0 and 1, and the number of prompts."""
        process: Any = model.processor()  # type: ignore[operator]
        device = next(model.parameters()).device
        right = 0
        for start in range(0, len(examples), self.batch_size):
            chunk = list(examples[start : start + self.batch_size])
            batch = move(process(chunk, "prompt"), device)
            rollout = model.generate(batch, 1, Sampling(self.max_new_tokens))  # type: ignore[operator]
            right += sum(
                text.strip() == example["answer"].strip() for text, example in zip(rollout.texts, chunk, strict=True)
            )
        return {"exact_match": right / len(examples), "prompts": float(len(examples))}
