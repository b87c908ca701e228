"""Opening a NIfTI file, and what its header and its length alone show to be wrong."""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from bestiary.shared.core.errors import BadDataError, MissingDataError, require

NIFTI_ENDINGS = (".nii.gz", ".nii")


def open_nifti(path: Path) -> Any:
    """A file as nibabel's image, of which the header alone is read.

    Raises:
        MissingDataError: if there is no such file.
        BadDataError: if it cannot be read, or holds no real numbers.
    """
    nibabel = require("nibabel", "medical")
    if not path.is_file():
        raise MissingDataError(f"{path}: {why_no_file(path) or 'there is no such file. Check the path.'}")
    if not path.name.endswith(NIFTI_ENDINGS):
        raise BadDataError(f"{path}: is not named like a NIfTI file ({' or '.join(NIFTI_ENDINGS)}). Convert it first.")
    try:
        # nibabel does not say why a file may not be opened.
        with _quiet(nibabel.imageglobals.logger), open(path, "rb"):
            nifti = nibabel.load(path)
            stored = _stored_voxel_size(nifti)
    except Exception as error:  # nibabel raises many kinds for a damaged file
        unreadable(path, error)
    if not stored.all():
        # nibabel would take 1 mm instead.
        raise BadDataError(f"{path}: has a voxel size of 0 mm in its header. Repair the header.")
    kind = nifti.get_data_dtype()
    if kind.kind not in "iufb":
        raise BadDataError(f"{path}: holds voxels of type {kind} (complex or colour). Give one real number a voxel.")
    return nifti


def why_no_file(path: Path) -> str | None:
    """What is there in place of a file, and what to do; None where there is nothing at all."""
    if path.is_dir():
        return "is a folder, and a NIfTI file is expected. Put the file there."
    if path.is_symlink():
        return "is a link that leads nowhere, or in a circle. Mend the link, or put the file there."
    return None


def unreadable(path: Path, error: Exception) -> NoReturn:
    """Raise BadDataError for a file that is there and whose header or voxels cannot be read."""
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        raise BadDataError(f"{path}: may not be read ({error.strerror}). Change its permissions.") from error
    reason = " ".join(str(error).split())[:200]
    raise BadDataError(
        f"{path}: cannot be read as NIfTI ({type(error).__name__}: {reason}). It is damaged, or cut short by a copy "
        "that did not finish: get the file again."
    ) from error


def refuse_cut(path: Path, nifti: Any) -> None:
    """Raise BadDataError for a file that holds fewer voxels than its header says.

    The voxels are read only where the length does not fit: a gzip file ends with the length of what it holds, if it was
    not cut and is of one piece.
    """
    voxels = nifti.dataobj
    wanted = int(voxels.offset) + math.prod(voxels.shape) * nifti.get_data_dtype().itemsize
    with open(path, "rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        if path.name.endswith(".gz"):
            handle.seek(max(size - 4, 0))
            fits = int.from_bytes(handle.read(4), "little") == wanted % 2**32
        else:
            fits = size >= wanted
    if fits:
        return
    try:
        np.asarray(voxels)
    except Exception as error:  # a truncated gzip raises EOFError, zlib.error, OSError, ...
        unreadable(path, error)


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Without what nibabel says of headers that it mends, for it does not say of which."""
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _stored_voxel_size(nifti: Any) -> np.ndarray:
    """The voxel size of each axis as it stands in the file; nibabel's own header has it mended."""
    kind = type(nifti.header)
    with nifti.file_map["image"].get_prepare_fileobj("rb") as handle:
        raw = kind(handle.read(kind.template_dtype.itemsize), check=False)
    return np.asarray(raw["pixdim"][1 : 1 + min(len(nifti.shape), 3)])
