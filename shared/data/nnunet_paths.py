"""Where nnU-Net keeps things: its environment variables, and names such as ``Dataset027_ACDC`` or ``27``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bestiary.shared.core.errors import ConfigError

_NAME = re.compile(r"Dataset\d{3}_.+")


def nnunet_folder_of(kind: str) -> Path | None:
    """The folder of ``$nnUNet_raw``, ``$nnUNet_preprocessed`` or ``$nnUNet_results``; None where it is not set."""
    value = os.environ.get(f"nnUNet_{kind}")
    return Path(value).expanduser() if value else None


def resolve_root(root: str | Path | int) -> Path:
    """A data set's folder: a path, or nnU-Net's name or number of one in ``$nnUNet_raw``.

    What is not found is returned as it is; :func:`explain_missing` says then what was looked for.

    Raises:
        ConfigError: if a number stands for two data sets.
    """
    path, raw = Path(str(root)).expanduser(), nnunet_folder_of("raw")
    if path.is_dir() or raw is None or not _is_name(root):
        return path
    number = int(str(root)) if str(root).isdecimal() else None
    found = [name for name in _datasets(raw) if name == str(root) or int(name[7:10]) == number]
    if len(found) > 1:
        raise ConfigError(f"dataset.root={root} stands for {' and '.join(found)} in {raw}: give the name")
    return raw / found[0] if found else path


def explain_missing(root: Path) -> str:
    """What else was looked for where a root is not there, as a sentence; empty where it is a plain path."""
    if not _is_name(root):
        return ""
    raw = nnunet_folder_of("raw")
    if raw is None:
        return "nnUNet_raw is not set, so a name or number of nnU-Net means nothing here."
    names = _datasets(raw)
    return f"$nnUNet_raw ({raw}) has {', '.join(names) if names else 'no Dataset…'}."


def beside(root: Path, name: str) -> Path | None:
    """A file of nnU-Net's that lies in a data set's folder, or in that of its name in ``$nnUNet_preprocessed``."""
    base = nnunet_folder_of("preprocessed")
    places = [root / name] + ([base / root.name / name] if base is not None else [])
    return next((place for place in places if place.is_file()), None)


def _is_name(root: str | Path | int) -> bool:
    return str(root).isdecimal() or _NAME.fullmatch(str(root)) is not None


def _datasets(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if _NAME.fullmatch(p.name)) if folder.is_dir() else []
