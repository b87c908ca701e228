"""Splits of data sets: who is trained on, validated and tested. Named files here, or made from a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError, require

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
        try:
            text = path.read_text()
        except UnicodeDecodeError as error:
            raise BadDataError(f"{where}: is no text: {error}. Give a JSON or YAML file.") from error
    yaml = require("yaml", "zoo")
    try:
        values = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise BadDataError(f"{where}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    known = isinstance(values, dict) and not set(values) - set(SPLITS)
    if not known or not all(map(_are_ids, filter(None, values.values()))) or not values.get("train"):
        raise BadDataError(f"{where}: must map train, val and test to lists of case ids, with at least one in train")
    lists = {key: [str(item) for item in values.get(key) or []] for key in SPLITS}
    refuse_repeats(lists, where)
    return lists


def refuse_repeats(lists: Mapping[str, Sequence[str]], where: str) -> None:
    """Raise BadDataError if a case is in two lists of a split, or twice in one."""
    seen: dict[str, str] = {}
    for key, items in lists.items():
        for item in items:
            if item in seen:
                raise BadDataError(f"{where}: case {item} is in {seen[item]} and again in {key}. Keep it in one.")
            seen[item] = key


def _are_ids(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(item, str | int) for item in values)


def split_of(name: str) -> str:
    """``val`` and ``test`` for a tenth of all names each, by hash; else ``train``."""
    place = hashlib.sha256(name.encode()).digest()[0] % 10
    return {0: "test", 1: "val"}.get(place, "train")


def load_fold(file: Path, fold: int) -> dict[str, list[str]]:
    """One fold of nnU-Net's ``splits_final.json``, a list of ``{train: [ids], val: [ids]}``; the test list is empty.

    Raises:
        BadDataError: if it is no such list, or a case is in both. ConfigError: if the fold is not in it.
    """
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadDataError(f"{file}: cannot be read as JSON: {error}. Correct it, or take it away.") from error
    if not isinstance(values, list) or not values or not all(_is_fold(part) for part in values):
        raise BadDataError(
            f"{file}: must be a list of folds, {{train: [case ids], val: [case ids]}}. Correct it, or take it away."
        )
    lists = [{key: [str(item) for item in part[key]] for key in ("train", "val")} for part in values]
    if not isinstance(fold, int) or not 0 <= fold < len(lists):
        raise ConfigError(f"{file}: has the folds 0 to {len(lists) - 1}, and no fold {fold}")
    refuse_repeats(lists[fold], f"{file}: fold {fold}")
    if not lists[fold]["train"]:
        raise BadDataError(f"{file}: fold {fold}: train is empty. Give it at least one case.")
    return {**lists[fold], "test": []}


def _is_fold(part: Any) -> bool:
    return isinstance(part, dict) and all(_are_ids(part.get(key)) for key in ("train", "val"))


def k_fold(ids: Sequence[str], fold: int, folds: int, seed: int) -> dict[str, list[str]]:
    """Split cases into train and val by a seeded shuffle, nnU-Net's own with 5 folds and seed 12345.

    The test list is left empty. Source: scikit-learn's ``KFold(shuffle=True)``, which nnU-Net v2 calls: the shuffled
    cases are cut in a row, and the first folds are one longer where it does not come out even.

    Args:
        ids: all cases.
        fold: which fold is val, from 0.
        folds: how many there are.
        seed: of the shuffle.

    Raises:
        ConfigError: if the fold does not exist or there are fewer cases than folds.
    """
    if not all(isinstance(number, int) for number in (fold, folds, seed)):
        raise ConfigError(f"fold {fold!r} of {folds!r} with seed {seed!r}: all three are whole numbers")
    if not 0 <= fold < folds or folds < 2:
        raise ConfigError(f"fold {fold} of {folds} does not exist: folds are 0 to {folds - 1}, and at least 2")
    if len(ids) < folds:
        raise ConfigError(f"{len(ids)} cases cannot make {folds} folds. Give a split file, or fewer folds.")
    ordered, order = sorted(ids), np.arange(len(ids))
    np.random.RandomState(seed).shuffle(order)
    val = {int(i) for i in np.array_split(order, folds)[fold]}
    return {
        "train": [name for i, name in enumerate(ordered) if i not in val],
        "val": [name for i, name in enumerate(ordered) if i in val],
        "test": [],
    }
