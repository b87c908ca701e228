"""Splits of data sets: who is trained on, validated and tested. Named files here, or made from a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError, require
from bestiary.shared.core.streams import derive_seed

SPLITS = ("train", "val", "test")


def named_splits() -> list[str]:
    """Names of the splits that come with bestiary."""
    return sorted(entry.name[:-5] for entry in files(__name__).iterdir() if entry.name.endswith(".yaml"))


def load_split(split: str | Path) -> dict[str, list[str]]:
    """A split by name or from a file.

    Args:
        split: one of :func:`named_splits`, or a JSON or YAML file ``{train: [ids], val: [ids], test: [ids]}``.

    Returns:
        The three lists; one that the file lacks is empty.

    Raises:
        MissingDataError: if there is no such name or file.
        BadDataError: if it is no such mapping, or a case is in two lists.
    """
    name = str(split)
    if name in named_splits():
        text, where = (files(__name__) / f"{name}.yaml").read_text(), f"split {name}"
    else:
        path, where = Path(split).expanduser(), name
        if not path.is_file():
            raise MissingDataError(
                f"{name}: there is no such split file, and the named splits are {', '.join(named_splits())}. "
                "Give one of them, or a JSON or YAML file with train, val and test."
            )
        text = path.read_text()
    yaml = require("yaml", "zoo")
    try:
        values = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise BadDataError(f"{where}: cannot be read: {error}") from error
    if not isinstance(values, dict) or set(values) - set(SPLITS) or not values.get("train"):
        raise BadDataError(f"{where}: must map train, val and test to lists of case ids, with at least one in train")
    lists = {key: [str(item) for item in values.get(key) or []] for key in SPLITS}
    seen: dict[str, str] = {}
    for key, items in lists.items():
        for item in items:
            if item in seen:
                raise BadDataError(f"{where}: case {item} is in {seen[item]} and again in {key}. Keep it in one.")
            seen[item] = key
    return lists


def split_of(name: str) -> str:
    """``val`` and ``test`` for a tenth of all names each, by hash; else ``train``."""
    place = hashlib.sha256(name.encode()).digest()[0] % 10
    return {0: "test", 1: "val"}.get(place, "train")


def k_fold(ids: Sequence[str], fold: int, folds: int, seed: int) -> dict[str, list[str]]:
    """Split cases into train and val by a seeded shuffle; the test list is left empty.

    Args:
        ids: all cases.
        fold: which fold is val, from 0.
        folds: how many there are.
        seed: of the shuffle.

    Raises:
        ConfigError: if the fold does not exist or there are fewer cases than folds.
    """
    if not 0 <= fold < folds or folds < 2:
        raise ConfigError(f"fold {fold} of {folds} does not exist: folds are 0 to {folds - 1}, and at least 2")
    if len(ids) < folds:
        raise ConfigError(f"{len(ids)} cases cannot make {folds} folds. Give a split file, or fewer folds.")
    order = np.random.default_rng(derive_seed("k_fold", seed)).permutation(len(ids))
    val = {int(i) for i in order[fold::folds]}
    ordered = sorted(ids)
    return {
        "train": [name for i, name in enumerate(ordered) if i not in val],
        "val": [name for i, name in enumerate(ordered) if i in val],
        "test": [],
    }
