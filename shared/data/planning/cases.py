"""One case of a folder: read once, checked, and described for the fingerprint; what was read is kept."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.core.errors import UserError
from bestiary.shared.data import preprocess as pre
from bestiary.shared.data.assets import data_root
from bestiary.shared.data.nnunet_layout import file_fault, grid_fault, in_mm
from bestiary.shared.data.planning.intensities import Intensities

FORMAT = 1
FAR_APART_MM = 20.0
"""Voxels larger than this are worth a warning."""


@dataclass(frozen=True)
class CaseFiles:
    """Where a case lies: one image a channel, and the label or None. ``top`` is the largest label, None if unknown."""

    id: str
    images: tuple[Path, ...]
    label: Path | None
    dims: int
    top: int | None


@dataclass(frozen=True)
class CaseRecord:
    """What the fingerprint takes from a case.

    Attributes:
        shape: voxels after cropping to what is not zero in some channel, (z, y, x).
        spacing: mm, in the same order.
        axes: codes of the file's axes (x, y, z), as ``RAS``.
        kept: share of the voxels that cropping leaves.
        foreground: of each channel; empty where the label is.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    axes: str
    kept: float
    foreground: tuple[Intensities, ...]


@dataclass
class Examined:
    """A case's faults as (kind, text), warnings as texts, and its record if it has a label and no fault."""

    id: str
    faults: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    record: CaseRecord | None = None


def describe(images: Sequence[np.ndarray], label: np.ndarray, header: pre.Header) -> CaseRecord:
    """The record of a case from its voxels."""
    some = np.zeros(label.shape, dtype=bool)
    for channel in images:
        some |= channel != 0
    shape = tuple(part.stop - part.start for part in pre.box_around(some)) if some.any() else label.shape
    inside = label > 0
    foreground = tuple(Intensities.of(channel[inside]) for channel in images) if inside.any() else ()
    kept = float(np.prod(shape) / np.prod(label.shape))
    return CaseRecord(shape, header.spacing, pre.axis_codes(header), kept, foreground)


def examine(case: CaseFiles) -> Examined:
    """Read every file of a case and say all that is wrong with it; a case that was fine and did not change is not read.

    Raises:
        Nothing of a file: what cannot be read is a fault.
    """
    out = Examined(case.id)
    stored = None if case.top is None else store_of((*case.images, case.label), case.top, case.dims)
    if stored is not None and (known := load_record(stored)) is not None:
        out.record, out.warnings = known
        return out
    read = [_read(path, case, out) for path in case.images]
    label = None if case.label is None else _read(case.label, case, out)
    first = next((item for item in read if item is not None), None)
    for path, item in zip(case.images, read, strict=True):
        if item is None:
            continue
        if item is not first and first is not None:
            _compare(path, item[1], case.images[0], first[1], out)
        _image_warnings(path, item, case.dims, out)
    if label is not None and case.label is not None:
        if first is not None:
            label = _onto(case.label, label, first[1], out)
        _check_label(case.label, label[0], case.top, out)
    if case.label is not None and label is not None and first is not None and not out.faults:
        out.record = describe([item[0] for item in read if item is not None], label[0], first[1])
        if stored is not None:
            save_record(stored, out.record, out.warnings)
    return out


def _read(path: Path, case: CaseFiles, out: Examined) -> tuple[np.ndarray, pre.Header] | None:
    if fault := file_fault(path, case.id):
        out.faults.append(("files" if os.path.lexists(path) else "pairs", fault))
        return None
    try:
        return pre.read_volume(path, case.dims)
    except UserError as error:
        out.faults.append(("files", str(error)))
        return None


def _compare(path: Path, got: pre.Header, other: Path, want: pre.Header, out: Examined) -> None:
    if fault := grid_fault(path, got, other, want):
        out.faults.append(("geometry", fault))


def _onto(
    path: Path, label: tuple[np.ndarray, pre.Header], want: pre.Header, out: Examined
) -> tuple[np.ndarray, pre.Header]:
    """The label in the image's orientation, after its grid was compared with the image's."""
    codes = pre.axis_codes(want)
    if pre.axis_codes(label[1]) != codes and label[1].affine.shape == want.affine.shape:
        try:
            turned = pre.reorient(*label, codes)
        except UserError:
            turned = label
        out.warnings.append(("geometry", f"{path}: lies as {pre.axis_codes(label[1])}, its image as {codes}"))
        label = turned
    _compare(path, label[1], Path("its image"), want, out)
    return label


def _check_label(path: Path, values: np.ndarray, top: int | None, out: Examined) -> None:
    whole = np.rint(values)
    if np.abs(values - whole).max() > 1e-3:
        broken = np.unique(values[np.abs(values - whole) > 1e-3])[:5]
        shown = ", ".join(f"{v:g}" for v in broken)
        out.faults.append(("labels", f"{path}: has values that are no whole numbers ({shown}). Was it interpolated?"))
        return
    present = [int(v) for v in np.unique(whole)]
    wrong = [v for v in present if v < 0 or (top is not None and v > top)]
    if wrong:
        shown = ", ".join(map(str, wrong[:10])) + (" …" if len(wrong) > 10 else "")
        allowed = f"0 to {top}" if top is not None else "0 or more"
        out.faults.append(("labels", f"{path}: has the values {shown}; dataset.json allows {allowed}. Correct either."))
    elif present == [0]:
        out.warnings.append(("labels", f"{path}: is empty (background alone)"))
    elif 0 not in present:
        out.warnings.append(("labels", f"{path}: has no background voxel"))


def _image_warnings(path: Path, item: tuple[np.ndarray, pre.Header], dims: int, out: Examined) -> None:
    array, header = item
    if array.min() == array.max():
        out.warnings.append(("images", f"{path}: every voxel has the value {array.flat[0]:g}"))
    if dims == 3 and min(header.shape) == 1:
        out.warnings.append(("images", f"{path}: is a single slice {header.shape}"))
    if max(header.spacing) > FAR_APART_MM:
        out.warnings.append(("images", f"{path}: has voxels of {in_mm(header.spacing)}"))


# The store: a file a case, named by what its files are.


def store_of(paths: Sequence[Path | None], top: int | None, dims: int) -> Path | None:
    """Where the record of these files is kept; None where one of them is not there.

    Args:
        paths: of a case. top: the largest label that it was examined with; None for a record of a case that was not.
        dims: spatial axes that it was read with: a file of one slice is read in 2D and in 3D.
    """
    lines = [f"record {FORMAT}, labels to {top}, {dims} axes"]
    for path in paths:
        if path is None or not path.is_file():
            return None
        state = path.stat()
        lines.append(f"{path.resolve()}:{state.st_size}:{state.st_mtime_ns}")
    key = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]
    return data_root() / "cache" / "fingerprints" / f"{key}.npz"


def save_record(file: Path, record: CaseRecord, warnings: Sequence[tuple[str, str]] = ()) -> None:
    """Keep a record, aside and then renamed; where that cannot be, the case is read again another time."""
    arrays: dict[str, Any] = {
        "shape": np.array(record.shape),
        "spacing": np.array(record.spacing),
        "kept": np.array(record.kept),
    }
    arrays |= {
        "axes": np.array(record.axes),
        "warnings": np.array([list(w) for w in warnings], dtype=str).reshape(-1, 2),
    }
    for number, found in enumerate(record.foreground):
        arrays[f"numbers{number}"], arrays[f"table{number}"] = found.to_arrays()
    aside = file.with_suffix(f".{os.getpid()}.npz")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(aside, **arrays)
        aside.rename(file)
    except OSError:
        with suppress(OSError):
            aside.unlink()


def load_record(file: Path) -> tuple[CaseRecord, list[tuple[str, str]]] | None:
    """A kept record with its warnings; None where there is none, or a damaged one."""
    if not file.is_file():
        return None
    try:
        with np.load(file) as arrays:
            n = sum(name.startswith("numbers") for name in arrays.files)
            record = CaseRecord(
                tuple(int(v) for v in arrays["shape"]),
                tuple(float(v) for v in arrays["spacing"]),
                str(arrays["axes"]),
                float(arrays["kept"]),
                tuple(Intensities.from_arrays(arrays[f"numbers{i}"], arrays[f"table{i}"]) for i in range(n)),
            )
            return record, [(str(kind), str(text)) for kind, text in arrays["warnings"]]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
