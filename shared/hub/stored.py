"""Weights of a checkpoint folder, a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from bestiary.shared.core.errors import BadDataError, MissingDataError


def stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a checkpoint folder, one shard open at a time.

    Raises:
        MissingDataError: if a file is not there.
        BadDataError: if one cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadDataError(f"{index} is no index of weights: {error!r}") from error
    else:
        files = ["model.safetensors"]
    for name in files:
        file = folder / name
        if not file.is_file():
            raise MissingDataError(f"{folder} has no {name}: the checkpoint is not whole")
        try:
            with safe_open(file, "pt") as handle:
                for key in handle.keys():  # noqa: SIM118
                    yield key, handle.get_tensor(key)
        except SafetensorError as error:
            raise BadDataError(f"{file} cannot be read: {error}") from error
