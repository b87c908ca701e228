"""Files of nnU-Net's raw layout that do not fit together, by their names and headers: before a voxel is read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bestiary.shared.core.errors import BadDataError, MissingDataError
from bestiary.shared.data import preprocess as pre
from bestiary.shared.data.nifti_open import NIFTI_ENDINGS, why_no_file

_IMAGE = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})(?P<ending>\.nii(?:\.gz)?)")
_LABEL = re.compile(r"(?P<case>.+?)(?P<ending>\.nii(?:\.gz)?)")
SAME_PLACE = 0.25
"""Voxels that the corners of two grids may lie apart, at training as at prediction and scoring: headers are rounded."""

Found = list[tuple[str, str]]
"""Pairs (kind, text); a text begins with the file."""


def file_fault(path: Path, case: str) -> str | None:
    """What is wrong with a case's file that should be there, as a sentence; None where it is."""
    if path.is_file():
        return None
    return f"{path}: {why_no_file(path) or f'is missing for case {case}. Add it, or drop the case.'}"


def check_case(case: str, images: Sequence[Path], label: Path, spacing: Sequence[float], axes: str) -> None:
    """Check that a case's files are there and lie on one grid, by their headers.

    Args:
        case: its name. images, label: its files.
        spacing: mm that it will be resampled to, 0 for its own. axes: the codes it will be brought to.

    Raises:
        MissingDataError: for what is not there. BadDataError: for what is there and wrong.
    """
    for path in (*images, label):
        if fault := file_fault(path, case):
            raise MissingDataError(fault)
    dims = len(spacing)
    want = pre.read_header(label, dims, axes)
    pre.check_grid(label, want, spacing)
    for path in images:
        check_same_grid(path, pre.read_header(path, dims, axes), label, want)


def check_same_grid(path: Path, header: pre.Header, other: Path, wanted: pre.Header) -> None:
    """Raise BadDataError where a file has another shape than the other one, or lies elsewhere."""
    if fault := grid_fault(path, header, other, wanted):
        raise BadDataError(fault)


def grid_fault(path: Path, header: pre.Header, other: Path, wanted: pre.Header) -> str | None:
    """What keeps two files from lying on one grid, in a sentence; None where they do."""
    if header.shape != wanted.shape:
        found = f"shape {header.shape} differs from {wanted.shape}"
    elif pre.voxels_apart(header, wanted) <= SAME_PLACE:
        return None
    elif not np.allclose(header.spacing, wanted.spacing, rtol=1e-3, atol=1e-4):
        found = f"voxel size {in_mm(header.spacing)} differs from {in_mm(wanted.spacing)}"
    else:
        moved = replace(header, affine=np.concatenate([header.affine[:, :3], wanted.affine[:, 3:]], axis=1))
        what = "orientation" if pre.voxels_apart(moved, wanted) > SAME_PLACE else "position"
        found = f"{what} in the header differs from that"
    return f"{path}: {found} of {other if other.name == path.name else other.name}. Put both on one grid."


def in_mm(spacing: Sequence[float]) -> str:
    """A voxel size as it is printed."""
    return f"({', '.join(f'{s:.4g}' for s in spacing)}) mm"


def names_in(folder: Path) -> list[str]:
    """Names in a folder, sorted, without hidden ones: copies from a Mac bring ``._case_0000.nii.gz``."""
    return sorted(name for name in os.listdir(folder) if not name.startswith(".")) if folder.is_dir() else []


def image_names(folder: Path) -> list[re.Match[str]]:
    """Names of images as matches with ``case``, ``channel`` and ``ending``."""
    return [match for match in map(_IMAGE.fullmatch, names_in(folder)) if match]


def cases_of(root: Path) -> set[str]:
    """Training cases of which any channel is there."""
    return {match["case"] for match in image_names(root / "imagesTr")}


def layout_faults(root: Path, ending: str, channels: int) -> tuple[Found, Found]:
    """Names that do not fit together: faults, and warnings. Files of listed cases are looked at one by one later.

    Args:
        root: the folder. ending, channels: of the files, as dataset.json says.
    """
    faults: Found = []
    warnings: Found = []
    cases: dict[str, set[str]] = {}
    for part in ("Tr", "Ts"):
        folder, seen = root / f"images{part}", {}
        for name in names_in(folder):
            match = _IMAGE.fullmatch(name)
            if match is None:
                _stray(folder / name, "<case>_0000" + ending, faults, warnings)
                continue
            seen.setdefault(match["case"], {}).setdefault(match["channel"], []).append(match["ending"])
        for case, found in seen.items():
            faults += _image_names(folder, case, found, ending, channels)
        _label_names(root / f"labels{part}", part, set(seen), ending, faults, warnings)
        cases[part] = set(seen)
    for case in sorted(cases["Tr"] & cases["Ts"]):
        text = f"{root / 'imagesTs' / case}: is a training case too (imagesTr). Rename one, or take it away."
        faults.append(("duplicates", text))
    return faults, warnings


def _image_names(
    folder: Path, case: str, found: dict[str, list[str]], ending: str, channels: int
) -> Iterator[tuple[str, str]]:
    for channel, endings in found.items():
        name = f"{case}_{channel}"
        if len(endings) > 1:
            yield "duplicates", f"{folder / name}: is there as {' and as '.join(endings)}. Keep one."
        elif endings[0] != ending:
            yield "pairs", f"{folder / name}{endings[0]}: dataset.json says that files end in {ending}. Convert it."
        if int(channel) >= channels:
            yield (
                "pairs",
                f"{folder / name}{endings[0]}: dataset.json names {channels} channels (0000 to {channels - 1:04d}).",
            )
    if "0000" not in found:
        yield "pairs", f"{folder / f'{case}_0000{ending}'}: is missing: the case has channel {', '.join(found)} alone."


def _label_names(folder: Path, part: str, cases: set[str], ending: str, faults: Found, warnings: Found) -> None:
    seen: dict[str, list[str]] = {}
    for name in names_in(folder):
        match = _LABEL.fullmatch(name)
        if match is None:
            _stray(folder / name, "<case>" + ending, faults, warnings)
        else:
            seen.setdefault(match["case"], []).append(match["ending"])
    for case, endings in seen.items():
        if len(endings) > 1:
            faults.append(("duplicates", f"{folder / case}: is there as {' and as '.join(endings)}. Keep one."))
        elif endings[0] != ending:
            text = f"{folder / case}{endings[0]}: dataset.json says that files end in {ending}. Convert it."
            faults.append(("pairs", text))
        if case not in cases:
            text = f"{folder / case}{endings[0]}: is a label without an image {case}_0000{ending} in images{part}."
            faults.append(("pairs", text))


def _stray(path: Path, pattern: str, faults: Found, warnings: Found) -> None:
    if path.name.endswith(NIFTI_ENDINGS):
        faults.append(("pairs", f"{path}: is not named {pattern}. Rename it, or take it away."))
    else:
        warnings.append(("pairs", f"{path}: is not read"))


def refuse_ambiguous(
    root: Path, listing: Mapping[str, Sequence[str]], lists: dict[str, list[str]]
) -> dict[str, list[str]]:
    """Return a split's lists, unless a name in them stands for two images, of which one may be trained on.

    Args:
        root: the folder. listing: the cases of ``imagesTr`` (Tr) and ``imagesTs`` (Ts). lists: the split.

    Raises:
        BadDataError: naming the first such case.
    """
    both = set(listing["Tr"]) & set(listing["Ts"])
    named = [case for cases in lists.values() for case in cases if case in both]
    if named:
        raise BadDataError(
            f"{root / 'imagesTs' / named[0]}: is a training case too (imagesTr), with {len(named)} such names in all. "
            "Rename one, or take it away."
        )
    return lists
