"""Reading, normalising and resampling volumes: the same steps for training data, held-out data and prediction.

One convention holds for every volume in bestiary: axes are (z, y, x), the reverse of nibabel's (x, y, z), as in
SimpleITK and in nnU-Net, whose patch sizes and strides are written in that order. Spacing is in the same order, in
millimetres, and ``affine`` maps an array index (z, y, x, 1) to scanner coordinates (x, y, z, 1) in millimetres.

How a volume lies in the patient is told by nibabel's axis codes, for the file's axes: ``RAS`` runs to the right, to the
front and up. A volume may be brought to other codes: axes are exchanged and flipped, no voxel is interpolated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from bestiary.shared.core.errors import BadDataError, ConfigError, require
from bestiary.shared.data.nifti_open import open_nifti, refuse_cut, unreadable

ANISOTROPY = 3.0
"""Above this ratio of voxel sizes the coarsest axis is treated apart (nnU-Net's threshold)."""
MOST_VOXELS = 2**31
"""A grid to resample to that is larger is taken for an error in a header (a body of 2 m at 0.5 mm has less)."""


@dataclass(frozen=True)
class Header:
    """What a NIfTI file says of itself: ``shape`` and ``spacing`` (mm) as (z, y, x); ``affine`` index to mm."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    affine: np.ndarray


def _header(path: Path, nifti: Any, spatial_dims: int) -> Header:
    shape = tuple(int(n) for n in nifti.shape)
    while len(shape) > spatial_dims and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != spatial_dims:
        many = " Split a series or a vector image into one file for each channel." if len(shape) > spatial_dims else ""
        raise BadDataError(f"{path}: has {len(shape)} axes {shape}, and {spatial_dims} are needed.{many}")
    order = list(range(spatial_dims))[::-1]
    spacing = tuple(float(nifti.header.get_zooms()[axis]) for axis in order)
    if min(shape) < 1 or not all(np.isfinite(spacing)) or min(spacing) <= 0:
        raise BadDataError(f"{path}: shape {shape} or voxel size {spacing} mm makes no sense. Repair the header.")
    affine = np.asarray(nifti.affine, dtype=np.float64)[:, [*order, *range(spatial_dims, 4)]]
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :spatial_dims]) < spatial_dims:
        raise BadDataError(f"{path}: its affine does not place the voxels in space. Repair the header.")
    return Header(shape[::-1], spacing, affine)


def read_header(path: Path | str, spatial_dims: int = 3, axes: str | None = None) -> Header:
    """Read shape, voxel size and affine; voxels only where the file's length does not fit them.

    Args:
        path: the file.
        spatial_dims: how many axes it must have.
        axes: the axis codes to describe it in; None for the file's own.

    Raises:
        MissingDataError: if there is no such file.
        BadDataError: if it cannot be read, has another number of axes, or does not lie in the plane of ``axes``.
    """
    path = Path(path)
    nifti = open_nifti(path)
    header = _header(path, nifti, spatial_dims)
    refuse_cut(path, nifti)
    return header if axes is None else _named(path, header, axes)


def read_volume(path: Path | str, spatial_dims: int = 3, axes: str | None = None) -> tuple[np.ndarray, Header]:
    """Read a NIfTI file.

    Args:
        path: the file.
        spatial_dims: how many axes it must have.
        axes: the axis codes to bring it to; None leaves it as it lies.

    Returns:
        The voxels, (*S) float32 in (z, y, x) order, and the header.

    Raises:
        MissingDataError: if there is no such file.
        BadDataError: if it cannot be read, has another number of axes, does not lie in the plane of ``axes``, or holds
            NaN or infinity.
    """
    path = Path(path)
    nifti = open_nifti(path)
    header = _header(path, nifti, spatial_dims)
    if axes is not None:
        _named(path, header, axes)  # before the voxels are read
    try:
        data = np.asarray(nifti.dataobj, dtype=np.float32)
    except Exception as error:  # a truncated gzip raises EOFError, zlib.error, OSError, ...
        unreadable(path, error)
    if not np.isfinite(data).all():
        raise BadDataError(f"{path}: holds NaN or infinite voxels. Replace them before use.")
    array = np.ascontiguousarray(data.reshape(header.shape[::-1]).T)
    return (array, header) if axes is None else reorient(array, header, axes)


def write_label(
    path: Path | str, label: np.ndarray, header: Header, like: Path | str | None = None, note: str = ""
) -> Path:
    """Write a label map on the grid of ``header``; the orientation is kept.

    Args:
        path: the file to write.
        label: (*S) integers.
        header: its grid.
        like: a file on that very grid whose header (units, the codes and fields that place it) is taken over, and, of
            a plane, whether it is written as one of a single slice.
        note: up to 79 ASCII characters for the header's description.

    Returns:
        The path written.
    """
    nibabel = require("nibabel", "medical")
    order = list(range(label.ndim))[::-1] + list(range(label.ndim, 4))
    kind = np.uint8 if label.max(initial=0) < 256 else np.int16
    own, voxels = None, label.T.astype(kind)
    if like is not None:
        own = open_nifti(Path(like)).header.copy()
        if voxels.ndim == 2 and len(own.get_data_shape()) > 2:
            voxels = voxels[..., None]
        own.set_data_dtype(kind)
        own["cal_min"] = own["cal_max"] = 0  # the window of the image's grey values
    image = nibabel.Nifti1Image(voxels, header.affine[:, order], own)
    image.header["descrip"] = note
    nibabel.save(image, path)
    return Path(path)


def write_map(path: Path | str, values: np.ndarray, affine: np.ndarray) -> Path:
    """Write real numbers (*S) as a NIfTI file of float32.

    Args:
        path: the file.
        values: (*S) in array order.
        affine: (4, 4) array index (z, y, x, 1) to mm.
    """
    nibabel = require("nibabel", "medical")
    order = list(range(values.ndim))[::-1] + list(range(values.ndim, 4))
    nibabel.save(nibabel.Nifti1Image(values.T.astype(np.float32), np.asarray(affine)[:, order]), path)
    return Path(path)


def voxels_apart(one: Header, other: Header) -> float:
    """How far the corners of two grids of one shape lie apart at most, along an axis and in voxels of ``other``."""
    missing = 3 - len(one.shape)
    corners = np.array([*itertools.product(*((-0.5, n - 0.5) for n in one.shape), *[(0.0,)] * missing, (1.0,))])
    moved = corners @ (np.linalg.pinv(other.affine) @ one.affine - np.eye(4)).T
    return float(np.abs(moved).max())


def axis_codes(header: Header) -> str:
    """The codes of the file's axes (x, y, z), such as ``RAS``; an oblique grid has those of the closest axes."""
    orientations = require("nibabel.orientations", "medical")
    order = list(range(len(header.shape)))[::-1]
    codes = orientations.ornt2axcodes(orientations.io_orientation(header.affine[:, [*order, -1]]))
    return "".join(str(code) for code in codes)


def are_codes(codes: Any, dims: int) -> bool:
    """Whether this is a text of axis codes for ``dims`` axes, no two of the same direction or its opposite."""
    if not isinstance(codes, str) or len(codes) != dims:
        return False
    return len({pair for pair in ("LR", "PA", "IS") for code in codes if code in pair}) == dims


def reorient(array: np.ndarray, header: Header, axes: str) -> tuple[np.ndarray, Header]:
    """Exchange and flip axes until they carry the codes ``axes``; every voxel keeps its place in the patient.

    Args:
        array: (..., *S): what comes before the spatial axes stays where it is.
        header: its grid.
        axes: the codes wanted, of the file's axes (x, y, z).

    Returns:
        The array in its new order, contiguous, and its header.

    Raises:
        ConfigError: if the codes span other axes than the volume, as those of another plane do in 2D.
    """
    dims, lead = len(header.shape), array.ndim - len(header.shape)
    new, steps = _turned(header, axes)
    if steps is None:
        return array, header
    source, flipped = steps
    array = array.transpose(*range(lead), *(lead + axis for axis in source))
    array = np.flip(array, tuple(lead + axis for axis in range(dims) if flipped[axis]))
    return np.ascontiguousarray(array), new


def _turned(header: Header, axes: str) -> tuple[Header, tuple[list[int], list[bool]] | None]:
    """The header in other codes; and for each new array axis, which old one it is and whether it is flipped."""
    opposite = dict(zip("LRPAIS", "RLAPSI", strict=True))
    have, want = axis_codes(header)[::-1], axes[::-1]  # of the array's axes (z, y, x)
    if have == want:
        return header, None
    source = [next((i for i, code in enumerate(have) if code in (w, opposite.get(w))), -1) for w in want]
    if sorted(source) != list(range(len(have))):
        raise ConfigError(f"a volume with axes {have[::-1]} cannot be brought to {axes}")
    flipped = [have[i] != w for i, w in zip(source, want, strict=True)]
    affine = header.affine.copy()
    for new, (old, flip) in enumerate(zip(source, flipped, strict=True)):
        affine[:3, new] = -header.affine[:3, old] if flip else header.affine[:3, old]
        if flip:
            affine[:3, 3] += header.affine[:3, old] * (header.shape[old] - 1)
    shape, spacing = tuple(header.shape[i] for i in source), tuple(header.spacing[i] for i in source)
    return Header(shape, spacing, affine), (source, flipped)


def _named(path: Path, header: Header, axes: str) -> Header:
    try:
        return _turned(header, axes)[0]
    except ConfigError as error:
        raise BadDataError(f"{path}: {error}: it lies in another plane. Give images of the plane trained on.") from None


# Normalisation. A scheme is a dict, so that it can stand in a config and travel with a checkpoint:
#   {"scheme": "zscore"}                                   per image, over its non-zero voxels; zeros stay zero
#   {"scheme": "zscore_whole"}                             per image, over the box around its non-zero voxels
#   {"scheme": "minmax"}                                   per image, to 0 ... 1
#   {"scheme": "ct", "lower", "upper", "mean", "std"}      clip to [lower, upper], then (x - mean) / std
#   {"scheme": "none"}
Normalization = Mapping[str, Any]
ZSCORE: Normalization = {"scheme": "zscore"}
ZSCORE_WHOLE: Normalization = {"scheme": "zscore_whole"}
MINMAX: Normalization = {"scheme": "minmax"}
UNCHANGED: Normalization = {"scheme": "none"}
BYTES: Normalization = {"scheme": "ct", "lower": 0.0, "upper": 255.0, "mean": 0.0, "std": 255.0}
NAMED_CHANNELS = {"nonorm": UNCHANGED, "rescale_to_0_1": MINMAX, "rgb_to_0_1": BYTES}
"""Channel names of dataset.json, in lower case, that stand for a normalisation (nnU-Net's)."""


def check_normalization(scheme: Normalization) -> Normalization:
    """Return the scheme, or say what is wrong with it (ConfigError)."""
    plain = ("zscore", "zscore_whole", "minmax", "none")
    needs = {**{name: set() for name in plain}, "ct": {"lower", "upper", "mean", "std"}}
    name = scheme.get("scheme")
    if name not in needs or set(scheme) - {"scheme"} != needs[name]:
        raise ConfigError(
            f"normalisation {dict(scheme)!r}: needs 'scheme': {', '.join(plain)}, or ct with lower, upper, mean and std"
        )
    return scheme


def normalize(channel: np.ndarray, scheme: Normalization) -> np.ndarray:
    """Normalise one channel.

    Args:
        channel: (*S) voxels.
        scheme: see above.

    Returns:
        (*S) float32.
    """
    name = check_normalization(scheme)["scheme"]
    channel = channel.astype(np.float32, copy=False)
    if name == "none":
        return channel
    if name == "ct":
        clipped = np.clip(channel, scheme["lower"], scheme["upper"])
        return ((clipped - scheme["mean"]) / max(float(scheme["std"]), 1e-8)).astype(np.float32)
    if name == "minmax":
        low, high = float(channel.min()), float(channel.max())
        return (channel - low) / max(high - low, 1e-8)
    inside = channel != 0
    if not inside.any():
        return channel
    if name == "zscore_whole":
        part = channel[box_around(inside)].astype(np.float64)
        return ((channel - part.mean()) / max(float(part.std()), 1e-8)).astype(np.float32)
    values = channel[inside].astype(np.float64)
    out = np.zeros_like(channel)
    out[inside] = (values - values.mean()) / max(float(values.std()), 1e-8)
    return out


def box_around(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds all of a mask (*S), which must not be empty."""
    axes = range(mask.ndim)
    ends = [np.flatnonzero(mask.any(axis=tuple(a for a in axes if a != axis))) for axis in axes]
    return tuple(slice(int(found[0]), int(found[-1]) + 1) for found in ends)


def target_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """Voxels of each axis after resampling from ``spacing`` to ``target`` (mm, 0 keeps the axis as it is).

    Raises:
        BadDataError: if they are more than any image has.
    """
    found = tuple(max(1, round(n * s / (t or s))) for n, s, t in zip(shape, spacing, target, strict=True))
    if math.prod(found) > MOST_VOXELS:
        sizes = " to ".join(f"({', '.join(f'{s:.4g}' for s in each)})" for each in (spacing, target))
        raise BadDataError(
            f"resampling {tuple(shape)} voxels from {sizes} mm would give {math.prod(found):.1e} voxels. Is the voxel "
            "size in the header right?"
        )
    return found


def check_grid(path: Path, header: Header, target: Sequence[float]) -> None:
    """Raise BadDataError, which names the file, where :func:`target_shape` does."""
    if needs_resampling(header.spacing, target):
        try:
            target_shape(header.shape, header.spacing, target)
        except BadDataError as error:
            raise BadDataError(f"{path}: {error}") from None


def needs_resampling(spacing: Sequence[float], target: Sequence[float]) -> bool:
    """Whether any axis differs by more than 1 %; a target of 0 stands for the file's own grid."""
    return any(t > 0 and abs(s / t - 1) > 0.01 for s, t in zip(spacing, target, strict=True))


def resample_image(image: np.ndarray, shape: Sequence[int], coarse_axis: int | None = None) -> np.ndarray:
    """Resample channels with cubic splines, the coarse axis with nearest neighbours as nnU-Net does.

    Args:
        image: (C, *S).
        shape: the new spatial shape.
        coarse_axis: see :func:`coarse_axis`.

    Returns:
        (C, *shape) float32.
    """
    return np.stack([_zoom(c, shape, 3, coarse_axis) for c in image]).astype(np.float32)


def resample_label(label: np.ndarray, shape: Sequence[int], coarse_axis: int | None = None) -> np.ndarray:
    """Resample a label map: each class is interpolated linearly and the largest wins.

    Args:
        label: (*S) integers.
        shape: the new shape.
        coarse_axis: see :func:`coarse_axis`.

    Returns:
        (*shape), the dtype of ``label``.
    """
    best = np.zeros(tuple(shape), dtype=np.float32)
    out = np.zeros(tuple(shape), dtype=label.dtype)
    for value in np.unique(label):
        share = _zoom((label == value).astype(np.float32), shape, 1, coarse_axis)
        out[share > best] = value
        np.maximum(best, share, out=best)
    return out


def coarse_axis(spacing: Sequence[float]) -> int | None:
    """The axis that is more than :data:`ANISOTROPY` times as coarse as the finest; None, too, where two are."""
    widest = int(np.argmax(spacing))
    alone = sum(size == max(spacing) for size in spacing) == 1
    return widest if alone and spacing[widest] / min(spacing) > ANISOTROPY else None


def _zoom(array: np.ndarray, shape: Sequence[int], order: int, apart: int | None) -> np.ndarray:
    ndimage = require("scipy.ndimage", "medical")
    factors = [n / o for n, o in zip(shape, array.shape, strict=True)]
    steps = [(factors, order)]
    if apart is not None:
        # Splines across thick slices ring; so the slices are resized in their planes, then repeated or dropped.
        plane = [1.0 if axis == apart else f for axis, f in enumerate(factors)]
        steps = [(plane, order), ([f if axis == apart else 1.0 for axis, f in enumerate(factors)], 0)]
    for factor, degree in steps:
        if any(f != 1.0 for f in factor):
            array = ndimage.zoom(array, factor, order=degree, mode="nearest", grid_mode=True)
    return array


def resampled_argmax(logits: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The winning class on another grid: logits are interpolated linearly, one class at a time to save memory.

    Args:
        logits: (num_classes, *S).
        shape: the grid wanted, covering the same field of view.

    Returns:
        (*shape) int64.
    """
    if tuple(shape) == tuple(logits.shape[1:]):
        return logits.argmax(0)
    mode = {2: "bilinear", 3: "trilinear"}[len(shape)]
    best = torch.full(tuple(shape), -torch.inf, device=logits.device)
    out = torch.zeros(tuple(shape), dtype=torch.int64, device=logits.device)
    for index, one in enumerate(logits.float()):
        value = F.interpolate(one[None, None], size=tuple(shape), mode=mode, align_corners=False)[0, 0]
        out = torch.where(value > best, index, out)
        best = torch.maximum(best, value)
    return out
