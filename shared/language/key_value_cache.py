"""transformers' key-value cache behind the Cache protocol."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from bestiary.shared.core.errors import BadDataError, require


class KeyValueCache:
    """Keys and values of the tokens seen so far, for a batch of rows.

    Args:
        config: the model's config, of transformers.

    Attributes:
        layers: transformers' DynamicCache, which the model reads and grows.
    """

    def __init__(self, config: Any):
        self.layers: Any = require("transformers", "zoo").DynamicCache(config=config)

    @property
    def length(self) -> int:
        """Tokens a row has had, padding included."""
        return int(self.layers.get_seq_length())

    def clone(self) -> KeyValueCache:
        """A copy that shares no memory."""
        new = object.__new__(KeyValueCache)
        new.layers = copy.deepcopy(self.layers)
        return new

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on.

        Raises:
            ValueError: for a length that is not between 0 and the cache's.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} tokens cannot be cut to {length}")
        if length < self.length:
            self.layers.crop(length - self.length)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        self.layers.batch_select_indices(rows)

    @property
    def joinable(self) -> bool:
        """Whether rows of another cache can be put behind these: no layer keeps a window or a state."""
        plain = require("transformers.cache_utils", "zoo").DynamicLayer
        return all(type(layer) is plain for layer in self.layers.layers)

    def join(self, others: Sequence[KeyValueCache]) -> None:
        """Put the rows of others behind these; a shorter cache is padded in front, which the mask has to hide."""
        caches = [self, *others]
        width = max(cache.length for cache in caches)
        for number, layer in enumerate(self.layers.layers):
            if layer.is_initialized:
                for name in ("keys", "values"):
                    setattr(layer, name, rows_behind([getattr(c.layers.layers[number], name) for c in caches], width))

    def bytes(self) -> dict[str, int]:
        """Size in use: ``key_values``."""
        tensors = [t for layer in self.layers.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        return {"key_values": sum(t.numel() * t.element_size() for t in tensors)}

    def save(self, path: Path) -> None:
        """Write it to a safetensors file, aside and then renamed."""
        tensors = {}
        for number, layer in enumerate(self.layers.layers):
            if layer.is_initialized:
                tensors[f"{number}.keys"] = layer.keys.detach().contiguous()
                tensors[f"{number}.values"] = layer.values.detach().contiguous()
        aside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
        save_file(tensors, aside, {"format": "bestiary key-value cache"})
        os.replace(aside, path)

    @classmethod
    def load(cls, path: Path, config: Any, device: torch.device | str = "cpu") -> KeyValueCache:
        """A cache that :meth:`save` wrote.

        Args:
            path: the file.
            config: the model's config.
            device: where the tensors go.

        Raises:
            BadDataError: if the file cannot be read, or is of a model with other layers.
        """
        new = cls(config)
        wanted = config.num_hidden_layers
        try:
            with safe_open(str(path), "pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise BadDataError(f"{path} is no cache that was saved: {error}") from error
        names = {f"{number}.{part}" for number in range(wanted) for part in ("keys", "values")}
        if tensors and set(tensors) != names:
            raise BadDataError(f"{path} is the cache of another model: it has {len(tensors) // 2} layers, not {wanted}")
        for number in range(wanted if tensors else 0):
            new.layers.update(tensors[f"{number}.keys"], tensors[f"{number}.values"], number)
        return new


def rows_behind(parts: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Keys or values (B, K, S, P) of several caches as one (sum of B, K, width, P), zeros before the shorter ones."""
    return torch.cat([F.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])
