"""Reading, normalising and resampling volumes: the same steps for training data, held-out data and prediction.

One convention holds for every volume in bestiary: axes are (z, y, x), the reverse of nibabel's (x, y, z), as in
SimpleITK and in nnU-Net, whose patch sizes and strides are written in that order. Spacing is in the same order, in
millimetres, and ``affine`` maps an array index (z, y, x, 1) to scanner coordinates (x, y, z, 1) in millimetres.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch.nn import functional as F

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError, require

NIFTI_ENDINGS = (".nii.gz", ".nii")
ANISOTROPY = 3.0
"""Above this ratio of voxel sizes the coarsest axis is treated apart (nnU-Net's threshold)."""


@dataclass(frozen=True)
class Header:
    """What a NIfTI file says of itself: ``shape`` and ``spacing`` (mm) as (z, y, x); ``affine`` index to mm."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    affine: np.ndarray


def _open(path: Path):
    nibabel = require("nibabel", "medical")
    if not path.is_file():
        raise MissingDataError(f"{path}: there is no such file. Check the path.")
    if not path.name.endswith(NIFTI_ENDINGS):
        raise BadDataError(f"{path}: is not named like a NIfTI file ({' or '.join(NIFTI_ENDINGS)}). Convert it first.")
    try:
        return nibabel.load(path)
    except Exception as error:  # nibabel raises many kinds for a damaged file
        _unreadable(path, error)


def _unreadable(path: Path, error: Exception) -> NoReturn:
    reason = " ".join(str(error).split())[:200]
    raise BadDataError(
        f"{path}: cannot be read as NIfTI ({type(error).__name__}: {reason}). It is damaged, or cut short by a copy "
        "that did not finish: get the file again."
    ) from error


def _header(path: Path, nifti: Any, spatial_dims: int) -> Header:
    shape = tuple(int(n) for n in nifti.shape)
    while len(shape) > spatial_dims and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != spatial_dims:
        raise BadDataError(
            f"{path}: has {len(shape)} axes {shape}, and {spatial_dims} are needed. Split a series or a vector image "
            "into one file for each channel."
        )
    order = list(range(spatial_dims))[::-1]
    spacing = tuple(float(nifti.header.get_zooms()[axis]) for axis in order)
    if min(shape) < 1 or not all(np.isfinite(spacing)) or min(spacing) <= 0:
        raise BadDataError(f"{path}: shape {shape} or voxel size {spacing} mm makes no sense. Repair the header.")
    rest = list(range(spatial_dims, 4))
    return Header(shape[::-1], spacing, np.asarray(nifti.affine, dtype=np.float64)[:, order + rest])


def read_header(path: Path | str, spatial_dims: int = 3) -> Header:
    """Read shape, voxel size and affine, no voxels.

    Raises:
        MissingDataError: if there is no such file.
        BadDataError: if it cannot be read or has another number of axes.
    """
    path = Path(path)
    return _header(path, _open(path), spatial_dims)


def read_volume(path: Path | str, spatial_dims: int = 3) -> tuple[np.ndarray, Header]:
    """Read a NIfTI file.

    Returns:
        The voxels, (*S) float32 in (z, y, x) order, and the header.

    Raises:
        MissingDataError: if there is no such file.
        BadDataError: if it cannot be read, has another number of axes, or holds NaN or infinity.
    """
    path = Path(path)
    nifti = _open(path)
    header = _header(path, nifti, spatial_dims)
    kind = nifti.get_data_dtype()  # type: ignore[attr-defined]
    if kind.kind not in "iufb":
        raise BadDataError(f"{path}: holds voxels of type {kind} (complex or colour). Give one real number a voxel.")
    try:
        data = np.asarray(nifti.dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    except Exception as error:  # a truncated gzip raises EOFError, zlib.error, OSError, ...
        _unreadable(path, error)
    if not np.isfinite(data).all():
        raise BadDataError(f"{path}: holds NaN or infinite voxels. Replace them before use.")
    return np.ascontiguousarray(data.reshape(header.shape[::-1]).T), header


def write_label(path: Path | str, label: np.ndarray, header: Header) -> Path:
    """Write a label map (*S) on the grid of ``header``; the orientation is kept.

    Returns:
        The path written.
    """
    nibabel = require("nibabel", "medical")
    order = list(range(label.ndim))[::-1] + list(range(label.ndim, 4))
    kind = np.uint8 if label.max(initial=0) < 256 else np.int16
    nibabel.save(nibabel.Nifti1Image(label.T.astype(kind), header.affine[:, order]), path)
    return Path(path)


# Normalisation. A scheme is a dict, so that it can stand in a config and travel with a checkpoint:
#   {"scheme": "zscore"}                                   per image, over its non-zero voxels; zeros stay zero
#   {"scheme": "ct", "lower", "upper", "mean", "std"}      clip to [lower, upper], then (x - mean) / std
#   {"scheme": "none"}
Normalization = Mapping[str, Any]
ZSCORE: Normalization = {"scheme": "zscore"}


def check_normalization(scheme: Normalization) -> Normalization:
    """Return the scheme, or say what is wrong with it (ConfigError)."""
    needs = {"zscore": set(), "none": set(), "ct": {"lower", "upper", "mean", "std"}}
    name = scheme.get("scheme")
    if name not in needs or set(scheme) - {"scheme"} != needs[name]:
        raise ConfigError(
            f"normalisation {dict(scheme)!r}: needs 'scheme': zscore, none, or ct with lower, upper, mean and std"
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
    inside = channel != 0
    values = channel[inside].astype(np.float64)
    if values.size == 0:
        return channel
    out = np.zeros_like(channel)
    out[inside] = (values - values.mean()) / max(float(values.std()), 1e-8)
    return out


def target_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """Voxels of each axis after resampling from ``spacing`` to ``target`` (mm)."""
    return tuple(max(1, round(n * s / t)) for n, s, t in zip(shape, spacing, target, strict=True))


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
    """The axis that is more than :data:`ANISOTROPY` times as coarse as the finest, or None."""
    widest = int(np.argmax(spacing))
    return widest if spacing[widest] / min(spacing) > ANISOTROPY else None


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
