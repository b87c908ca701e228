"""Examples and batches: the two dicts that travel from a file to a loss.

An *Example* is free of any model: a data source makes it, a processor reads it. A *Batch* is what a model
takes; only a processor makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import torch

from bestiary.shared.core.errors import BadDataError, ConfigError

IGNORE_INDEX = -100
"""The label value of tokens, and of voxels, that carry no loss."""

Mode = Literal["train", "prompt", "eval"]


class Content(TypedDict):
    """One piece of a chat message; ``rate`` (Hz) goes with audio, ``fps`` with video.

    ``key`` names what the value holds: two pieces with one key hold the same, so features may be kept by it.
    """

    type: Literal["text", "image", "audio", "video"]
    value: Any
    rate: NotRequired[int]
    fps: NotRequired[float]
    key: NotRequired[str]


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: list[Content]


class Example(TypedDict, total=False):
    """One training or evaluation example; exactly one of ``image``, ``text``, ``messages`` and ``tokens`` is present.

    Keys:
        id: unique within its source.
        meta: anything worth reporting (file, spacing, original shape, ...).
        image: (C, *S) float32. label: (1, *S) int64, absent for prediction. affine: (4, 4) voxel to mm.
        text: plain text.
        tokens: (T,) integers, a row that is tokenised already; ``meta["tokenizer"]`` is the key of its tokenizer.
        documents: (T,) integers, rising from 0: which document of the row each token of ``tokens`` belongs to. A model
            sees nothing of one document while it reads another. Absent where the row is one text.
        messages: the chat, without its final answer when ``answer`` is given.
        answer: the reference answer. verifier: the name of the verifier that scores an answer.
    """

    id: str
    meta: dict[str, Any]
    image: torch.Tensor
    label: torch.Tensor
    affine: Any
    text: str
    tokens: np.ndarray
    documents: np.ndarray
    messages: list[Message]
    answer: str
    verifier: str


class SegBatch(TypedDict):
    """``image`` (B, C, *S) float32, ``label`` (B, 1, *S) int64 where known, ``ids``."""

    ids: list[str]
    image: torch.Tensor
    label: NotRequired[torch.Tensor]


class Media(TypedDict):
    """Features of one modality: ``owner`` (n,) the row of each item, ``counts`` (n,) its tokens.

    Items of a row stand in the order in which they are read. An encoder may add tensors of its own with one entry an
    item: windows of audio have their real ``lengths`` and the number of the ``window`` in its clip.
    """

    features: torch.Tensor
    owner: torch.Tensor
    counts: torch.Tensor


class LMBatch(TypedDict):
    """A batch of a language model.

    ``input_ids``, ``attention_mask``, ``position_ids`` (B, T) int64; ``labels`` (B, T) int64 aligned with
    ``input_ids`` (the loss shifts, nobody else), :data:`IGNORE_INDEX` where there is no loss; ``seq_idx``
    (B, T) int32 for packed rows or None; ``media`` by modality. Training pads right, prompts pad left.
    """

    ids: list[str]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    seq_idx: torch.Tensor | None
    media: dict[str, Media]


Batch = SegBatch | LMBatch


def text_message(role: str, text: str) -> Message:
    """A message that is text alone."""
    return {"role": role, "content": [{"type": "text", "value": text}]}  # type: ignore[typeddict-item]


def check_example(example: Example) -> Example:
    """Return the example unchanged, or say what is wrong with it.

    Raises:
        BadDataError: if it has no id, or not exactly one of image, text, messages and tokens, or shapes that disagree.
    """
    name = example.get("id")
    if not name:
        raise BadDataError("an example has no id")
    kinds = [key for key in ("image", "text", "messages", "tokens") if key in example]
    if len(kinds) != 1:
        wanted = "exactly one of image, text, messages and tokens"
        raise BadDataError(f"example {name!r} needs {wanted}, has {kinds or 'none'}")
    if kinds == ["tokens"] and "documents" in example and example["documents"].shape != example["tokens"].shape:
        shapes = f"documents {example['documents'].shape} do not fit tokens {example['tokens'].shape}"
        raise BadDataError(f"example {name!r}: {shapes}")
    if kinds == ["image"] and "label" in example:
        image, label = example["image"], example["label"]
        if label.shape[0] != 1 or label.shape[1:] != image.shape[1:]:
            raise BadDataError(f"example {name!r}: label {tuple(label.shape)} does not fit image {tuple(image.shape)}")
    return example


def batch_size(batch: Batch) -> int:
    """Rows of a batch."""
    return len(batch["ids"])


def select_rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """The named rows of a batch, in the order given; media items follow their owners.

    Args:
        batch: a seg or lm batch.
        rows: row numbers.
    """
    index = torch.as_tensor(list(rows), dtype=torch.long)
    out: dict[str, Any] = {}
    for key, value in batch.items():
        if key == "ids":
            out[key] = [batch["ids"][r] for r in rows]
        elif key == "media":
            out[key] = {name: _select_media(media, index) for name, media in batch["media"].items()}  # type: ignore
        else:
            out[key] = value[index.to(value.device)] if isinstance(value, torch.Tensor) else value
    return out  # type: ignore[return-value]


def split_rows(batch: Batch, size: int | None) -> list[Batch]:
    """A batch in consecutive parts of at most ``size`` rows; None leaves it whole.

    Args:
        batch: a seg or lm batch.
        size: rows of a part.

    Raises:
        ConfigError: for parts of no rows.
    """
    rows = batch_size(batch)
    if size is not None and size < 1:
        raise ConfigError(f"micro_batch must be 1 or more, or null for the whole step, not {size}")
    if size is None or rows <= size:
        return [batch]
    return [select_rows(batch, range(start, min(start + size, rows))) for start in range(0, rows, size)]


def _select_media(media: Media, rows: torch.Tensor) -> Media:
    items, owners = [], []
    for new, row in enumerate(rows.tolist()):
        here = (media["owner"] == row).nonzero()[:, 0]
        items.append(here)
        owners.append(torch.full_like(here, new))
    index = torch.cat(items)
    rest = {name: value[index] for name, value in media.items() if name != "owner"}  # type: ignore[index]
    return {"owner": torch.cat(owners), **rest}  # type: ignore[typeddict-item]
