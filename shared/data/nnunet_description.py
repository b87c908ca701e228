"""What dataset.json of nnU-Net's raw layout says, checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import BadDataError, MissingDataError
from bestiary.shared.data.nifti_open import NIFTI_ENDINGS


def read_dataset_json(path: Path) -> dict[str, Any]:
    """The object in a dataset.json.

    Raises:
        MissingDataError: if it is not there. BadDataError: if it is not JSON.
    """
    if not path.is_file():
        raise MissingDataError(f"{path}: is missing. It belongs to nnU-Net's raw layout; write one, or copy it.")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise BadDataError(f"{path}: is not JSON: {error}. Correct the file.") from error
    if not isinstance(values, dict):
        raise BadDataError(f"{path}: must be a JSON object, with channel_names, labels and file_ending")
    return values


def checked_description(given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """``labels`` {name: value}, ``channel_names`` [...] and ``file_ending`` of a description.

    Args:
        given: dataset.json, with the options of a config in place of its own. path: the file, for messages.

    Raises:
        BadDataError: for what is missing, and for what is not built.
    """
    channels, labels = given.get("channel_names"), given.get("labels")
    if not channels or not labels or not given.get("file_ending"):
        raise BadDataError(f"{path}: needs channel_names, labels and file_ending (nnU-Net version 2). Add them.")
    names = _channels(channels, path)
    _check_labels(labels, path)
    if given["file_ending"] not in NIFTI_ENDINGS:
        raise BadDataError(f"{path}: file_ending {given['file_ending']!r} is not read; convert the files to .nii.gz.")
    return {"labels": dict(labels), "channel_names": names, "file_ending": given["file_ending"]}


def _channels(channels: Any, path: Path) -> list[str]:
    """The names in the order of the files' numbers."""
    if isinstance(channels, Mapping):
        wanted = [str(number) for number in range(len(channels))]
        if sorted(map(str, channels)) != sorted(wanted):
            given = ", ".join(map(str, channels))
            raise BadDataError(f"{path}: channel_names must number the channels {', '.join(wanted)}, not {given}")
        by_number = {str(number): name for number, name in channels.items()}
        return [str(by_number[number]) for number in wanted]
    if not isinstance(channels, Sequence) or isinstance(channels, str):
        raise BadDataError(f'{path}: channel_names must be {{"0": name, "1": name, …}}, not {channels!r}')
    return [str(name) for name in channels]


def _check_labels(labels: Any, path: Path) -> None:
    """Raise BadDataError unless they map names to 0, 1, 2, …, and one of them is no background."""
    if not isinstance(labels, Mapping):
        raise BadDataError(f'{path}: labels must be {{"background": 0, name: 1, …}}, not {labels!r}')
    shown = ", ".join(f"{name} {value}" for name, value in labels.items())
    if any(isinstance(value, Sequence) and not isinstance(value, str) for value in labels.values()):
        raise BadDataError(
            f"{path}: labels must map each name to one number; region-based labels are not read. Give each value a "
            f"name of its own ({shown})."
        )
    if any(type(value) is not int for value in labels.values()):
        raise BadDataError(
            f"{path}: labels must map each name to one whole number, as background to 0 (nnU-Net version 2): {shown}"
        )
    if "ignore" in labels:
        raise BadDataError(
            f"{path}: has an ignore label, which is not built: it would be trained as a class of its own. "
            "Give `dataset.labels` without it once no voxel carries it."
        )
    if 0 not in labels.values():
        raise BadDataError(f"{path}: labels have no background, which is the value 0: {shown}. Add it.")
    if len(labels) < 2:
        raise BadDataError(f"{path}: labels name the background alone: there is nothing to learn. Add the classes.")
    if sorted(labels.values()) != list(range(len(labels))):
        raise BadDataError(
            f"{path}: label values must be 0 to {len(labels) - 1} without gaps: {shown}. Renumber them, here and in "
            "the label files."
        )
