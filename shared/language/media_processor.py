"""Chats with media to batches: each item becomes its special token as often as it has tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import Content, Example, LMBatch, Media, Message, Mode
from bestiary.shared.language.media_marks import mark_media
from bestiary.shared.language.processor import TextProcessor

Features = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Modality:
    """How one kind of medium goes into a prompt.

    Attributes:
        preprocess: an encoder's: raw item to its features and how many tokens it becomes.
        token: id of the special token that is repeated.
        before, after: ids of tokens around an item, or None.
        cache: keeps features by the content's key, or None.
    """

    preprocess: Callable[[Any], tuple[Features, int]]
    token: int
    before: int | None = None
    after: int | None = None
    cache: FeatureCache | None = None


@dataclass
class FeatureCache:
    """Features of the items seen last, by key, up to a size.

    Attributes:
        limit: bytes.
    """

    limit: int
    _items: OrderedDict[str, tuple[Features, int]] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def get(self, key: str | None, make: Callable[[], tuple[Features, int]]) -> tuple[Features, int]:
        """The features of a key, made if they are not there; without a key nothing is kept."""
        if key is None or self.limit <= 0:
            return make()
        if key not in self._items:
            self._items[key] = made = make()
            self._bytes += _size(made)
            while self._bytes > self.limit and len(self._items) > 1:
                self._bytes -= _size(self._items.popitem(last=False)[1])
        self._items.move_to_end(key)
        return self._items[key]


def _size(item: tuple[Features, int]) -> int:
    return sum(t.numel() * t.element_size() for t in item[0].values())


@dataclass(frozen=True)
class MediaProcessor(TextProcessor):
    """A TextProcessor whose chats may hold media.

    An item stands where its content stands in its turn. A row with media is never cut: too long a one is refused, since
    a prompt with half a clip would ask about what is not there.

    Attributes:
        modalities: by the content's type.
    """

    modalities: Mapping[str, Modality] = field(default_factory=dict)

    def __call__(self, examples: Sequence[Example], mode: Mode) -> LMBatch:
        """As a TextProcessor, and the features of all media; numbers of ``meta["classes"]`` go along as ``class/NAME``.

        Raises:
            BadDataError: as a TextProcessor; for media that the model does not take or that cannot be used, and rows
                that are too long.
        """
        read: list[Any] = []
        media: dict[str, list[tuple[int, Features]]] = {}
        for row, example in enumerate(examples):
            items = []
            for content in _media_of(example):
                features, count = self._features(content, example)
                media.setdefault(content["type"], []).append((row, features))
                items.append((self.modalities[content["type"]], count))
            read.append({**example, "items": items})
        batch = super().__call__(read, mode)
        batch["media"] = {name: _collate(found) for name, found in media.items()}
        classes = [example.get("meta", {}).get("classes") or {} for example in examples]
        for name in sorted({name for one in classes for name in one}):
            batch[f"class/{name}"] = torch.tensor([one.get(name, -1) for one in classes])  # type: ignore[literal-required]
        return batch

    def _features(self, content: Content, example: Example) -> tuple[Features, int]:
        modality = self.modalities.get(content["type"])
        if modality is None:
            raise BadDataError(f"example {example['id']!r} holds {content['type']}, which this model does not take")
        raw = (content["value"], content.get("rate"))
        try:
            if modality.cache is None:
                return modality.preprocess(raw)
            return modality.cache.get(content.get("key"), lambda: modality.preprocess(raw))
        except BadDataError as error:
            raise BadDataError(f"example {example['id']!r}: {error}") from error

    def _chat(
        self, messages: Sequence[Message], prompt: bool, thinking: bool | None, example: Example
    ) -> tuple[list[int], list[bool]]:
        ids, own = super()._chat(mark_media(messages), prompt, thinking, example)
        items: list[tuple[Modality, int]] = list(example.get("items", ()))  # type: ignore[call-overload]
        if not items:
            return ids, own
        tokens = {modality.token for modality in self.modalities.values()}
        places = [at for at, token in enumerate(ids) if token in tokens]
        if len(places) != len(items):
            raise BadDataError(
                f"example {example['id']!r} has {len(items)} media, and the chat template wrote {len(places)} places"
            )
        for at, (modality, count) in reversed(list(zip(places, items, strict=True))):
            around = [[] if token is None else [token] for token in (modality.before, modality.after)]
            new = [*around[0], *[modality.token] * count, *around[1]]
            ids[at : at + 1], own[at : at + 1] = new, [False] * len(new)
        if self.max_len is not None and len(ids) > self.max_len:
            total = sum(count for _, count in items)
            raise BadDataError(
                f"example {example['id']!r} has {len(ids)} tokens, {total} of them of media, more than max_len "
                f"{self.max_len}: raise max_len (recipe.max_len), or give shorter clips"
            )
        return ids, own


def _media_of(example: Example) -> list[Content]:
    return [c for message in example.get("messages", ()) for c in message["content"] if c["type"] != "text"]


def _collate(found: Sequence[tuple[int, Features]]) -> Media:
    """Items of all rows in one tensor a name; the last dimension is padded with zeros to the longest."""
    out: dict[str, torch.Tensor] = {}
    for name in found[0][1]:
        tensors = [features[name] for _, features in found]
        width = max(t.shape[-1] for t in tensors)
        out[name] = torch.cat([F.pad(t, (0, width - t.shape[-1])) if t.dim() > 1 else t for t in tensors])
    owner = [torch.full((len(features["counts"]),), row) for row, features in found]
    return {"owner": torch.cat(owner), **out}  # type: ignore[typeddict-item]


def scatter_media(embeds: torch.Tensor, ids: torch.Tensor, token: int, rows: torch.Tensor) -> torch.Tensor:
    """Put tokens of media where their special token stands.

    Args:
        embeds: (B, T, D) embedded ids.
        ids: (B, T).
        token: the special token's id.
        rows: (N, D) in the order of the places, row by row.

    Raises:
        BadDataError: if there are more places than tokens, or fewer.
    """
    places = ids == token
    if int(places.sum()) != len(rows):
        raise BadDataError(f"the batch has {int(places.sum())} places for media tokens, and {len(rows)} tokens")
    return embeds.masked_scatter(places[..., None], rows.to(embeds.dtype))
