"""Text and chat examples to batches of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import IGNORE_INDEX, Example, LMBatch, Mode, text_message


@dataclass(frozen=True)
class TextProcessor:
    """The only place that knows tokenizer and template.

    Attributes:
        tokenizer: with encode, chat, pad_id, eos_id.
        max_len: longest row in tokens, or None. Text rows are cut at the end, prompts at the beginning.
    """

    tokenizer: Any
    max_len: int | None = None

    def __call__(self, examples: Sequence[Example], mode: Mode) -> LMBatch:
        """Tokenise and pad: right for training and scoring, left for prompts.

        Raises:
            BadDataError: for an example that is neither text nor chat, or leaves no token to learn.
        """
        rows = [self.row(example, mode) for example in examples]
        width = max(len(ids) for ids, _ in rows)
        left = mode == "prompt"
        shape = (len(rows), width)
        input_ids = torch.full(shape, self.tokenizer.pad_id)
        labels = torch.full(shape, IGNORE_INDEX)
        mask = torch.zeros(shape, dtype=torch.long)
        for index, (ids, own) in enumerate(rows):
            at = slice(width - len(ids), width) if left else slice(0, len(ids))
            row = torch.tensor(ids)
            input_ids[index, at] = row
            labels[index, at] = torch.where(torch.tensor(own), row, IGNORE_INDEX)
            mask[index, at] = 1
        return {
            "ids": [example["id"] for example in examples],
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "labels": labels,
            "seq_idx": None,
            "media": {},
        }

    def row(self, example: Example, mode: Mode) -> tuple[list[int], list[bool]]:
        """Token ids of one example, and which of them carry loss."""
        if "text" in example:
            ids = self.tokenizer.encode(example["text"])
            if mode != "prompt":
                ids = [*ids, self.tokenizer.eos_id]
            own = [True] * len(ids)
        elif "messages" in example:
            messages = list(example["messages"])
            if mode != "prompt" and "answer" in example:
                messages.append(text_message("assistant", example["answer"]))
            ids, own = self.tokenizer.chat(messages, add_generation_prompt=mode == "prompt")
        else:
            raise BadDataError(f"example {example.get('id')!r} is neither text nor chat")
        if self.max_len is not None and len(ids) > self.max_len:
            ids, own = (
                (ids[-self.max_len :], own[-self.max_len :])
                if mode == "prompt"
                else (
                    ids[: self.max_len],
                    own[: self.max_len],
                )
            )
        # The first token is never predicted, so a row needs one that carries loss after it.
        if mode == "train" and not any(own[1:]):
            raise BadDataError(f"example {example['id']!r} has no token to learn within max_len {self.max_len}")
        if not ids:
            raise BadDataError(f"example {example['id']!r} is empty")
        return ids, own
