"""Text, chat and packed token examples to batches of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import IGNORE_INDEX, Example, LMBatch, Message, Mode, text_message


class Row(NamedTuple):
    """One row before padding.

    Attributes:
        ids: token ids.
        own: which of them carry loss.
        documents: which document of the row each token belongs to, rising from 0; None where the row is one text.
    """

    ids: list[int]
    own: list[bool]
    documents: list[int] | None = None


@dataclass(frozen=True)
class TextProcessor:
    """The only place that knows tokenizer and template.

    A row with ``documents`` is several texts that must not see each other: its positions begin anew with each, and
    ``seq_idx`` tells the model. The first token of a document after the row's first carries loss only if it is the
    end-of-text token: that the text before has ended can be told from that text alone, what comes next cannot.

    Attributes:
        tokenizer: with encode, chat, pad_id, eos_id.
        max_len: longest row in tokens, or None. Text rows are cut at the end, prompts at the beginning.
    """

    tokenizer: Any
    max_len: int | None = None

    def __call__(self, examples: Sequence[Example], mode: Mode) -> LMBatch:
        """Tokenise and pad: right for training and scoring, left for prompts.

        Raises:
            BadDataError: for an example that is neither text nor chat nor tokens, or leaves no token to learn.
        """
        rows = [self.row(example, mode) for example in examples]
        width = max(len(row.ids) for row in rows)
        left = mode == "prompt"
        shape = (len(rows), width)
        input_ids = torch.full(shape, self.tokenizer.pad_id)
        labels = torch.full(shape, IGNORE_INDEX)
        mask = torch.zeros(shape, dtype=torch.long)
        for index, (ids, own, _) in enumerate(rows):
            at = slice(width - len(ids), width) if left else slice(0, len(ids))
            row = torch.tensor(ids)
            input_ids[index, at] = row
            labels[index, at] = torch.where(torch.tensor(own), row, IGNORE_INDEX)
            mask[index, at] = 1
        position = (mask.cumsum(1) - 1).clamp(min=0)
        seq_idx = self._pack(rows, position)
        return {
            "ids": [example["id"] for example in examples],
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": position,
            "labels": labels,
            "seq_idx": seq_idx,
            "media": {},
        }

    def _pack(self, rows: Sequence[Row], position: torch.Tensor) -> torch.Tensor | None:
        """``seq_idx`` (B, T) int32, or None if no row has documents; restarts the positions (B, T) of those that do.

        Padding counts to the last document: it comes after it, and the attention mask keeps it out.
        """
        if all(row.documents is None for row in rows):
            return None
        seq_idx = torch.zeros(position.shape, dtype=torch.int32)
        for index, row in enumerate(rows):
            if row.documents is None:
                continue
            documents = torch.tensor(row.documents, dtype=torch.int32)
            seq_idx[index, : len(documents)] = documents
            seq_idx[index, len(documents) :] = documents[-1]
            first = torch.searchsorted(documents, documents)  # where each token's document begins
            position[index, : len(documents)] -= first
        return seq_idx

    def row(self, example: Example, mode: Mode) -> Row:
        """Token ids of one example, which of them carry loss, and the documents of a packed row."""
        if "tokens" in example:
            return self._token_row(example, mode)
        if "text" in example:
            ids = self.tokenizer.encode(example["text"])
            if mode != "prompt":
                ids = [*ids, self.tokenizer.eos_id]
            own = [True] * len(ids)
        elif "messages" in example:
            messages = list(example["messages"])
            if mode != "prompt" and "answer" in example:
                messages.append(text_message("assistant", example["answer"]))
            thinking = example.get("meta", {}).get("thinking")  # None leaves it to the template
            ids, own = self._chat(messages, mode == "prompt", thinking, example)
        else:
            raise BadDataError(f"example {example.get('id')!r} is neither text nor chat nor tokens")
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
        return Row(ids, own)

    def _chat(
        self, messages: Sequence[Message], prompt: bool, thinking: bool | None, example: Example
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a chat, and which of them the assistant wrote; a processor of media does more here."""
        return self.tokenizer.chat(messages, prompt, thinking)

    def _token_row(self, example: Example, mode: Mode) -> Row:
        key, own_key = example.get("meta", {}).get("tokenizer"), getattr(self.tokenizer, "key", None)
        if key is not None and key != own_key:
            raise BadDataError(
                f"example {example['id']!r} was tokenised with {key}, and the model reads {own_key}: give the data set "
                "the backbone's tokenizer (dataset.tokenizer)"
            )
        ids = [int(i) for i in example["tokens"]]
        documents = [int(d) for d in example["documents"]] if "documents" in example else None
        if not ids:
            raise BadDataError(f"example {example['id']!r} is empty")
        if mode == "prompt":  # one text to go on with
            ids = ids[-self.max_len :] if self.max_len else ids
            return Row(ids, [True] * len(ids))
        if self.max_len is not None and len(ids) > self.max_len:
            raise BadDataError(
                f"example {example['id']!r} has {len(ids)} tokens, more than max_len {self.max_len}: "
                "set the data set's window or the stage's max_len"
            )
        own = [True] * len(ids)
        if documents is not None:
            for at in range(1, len(ids)):
                own[at] = documents[at] == documents[at - 1] or ids[at] == self.tokenizer.eos_id
        if mode == "train" and not any(own[1:]):
            raise BadDataError(f"example {example['id']!r} has no token to learn")
        return Row(ids, own, documents)
