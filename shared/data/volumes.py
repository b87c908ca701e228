"""Segmentation data: whole volumes in memory, training patches cut from them as a pure function of (seed, stage, k)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import IGNORE_INDEX, Example, check_example
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream, derive_seed
from bestiary.shared.data.augment import Augment
from bestiary.shared.data.preprocess import ZSCORE, Header, Normalization, axis_codes

POSITIONS_PER_CLASS = 10_000
"""Foreground voxels kept of each class and case, to centre patches on (nnU-Net's number)."""


@dataclass
class Volume:
    """One preprocessed case.

    Attributes:
        id: unique within the source.
        image: (C, *S) float32, normalised.
        label: (*S) integers below num_classes; in training, IGNORE_INDEX where a voxel carries no loss.
        affine: (4, 4) array index (z, y, x, 1) to mm.
        spacing: mm of each axis of the array.
        meta: what is worth reporting. ``source_label`` (1, *S0) int64 and ``source_spacing`` are here where the case
            was resampled: scores are then taken on that grid. ``region``, slices of the array, where only a part of a
            held-out case is scored.
        positions: (n, d) sampled voxels of each foreground class that occurs; filled by :class:`VolumeSource`.
    """

    id: str
    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray
    spacing: tuple[float, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    positions: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        arrays = [self.image, self.label, *self.positions.values(), self.meta.get("source_label")]
        return sum(array.nbytes for array in arrays if array is not None)

    def example(self) -> Example:
        """The whole volume as an Example."""
        return check_example(
            {
                "id": self.id,
                "meta": {"spacing": self.spacing, **self.meta},
                "image": torch.from_numpy(self.image),
                "label": torch.from_numpy(self.label.astype(np.int64))[None],
                "affine": self.affine,
            }
        )


class VolumeSource:
    """Base of segmentation data sources: a subclass says which cases there are and reads one.

    A subclass gives ``revision``, ``check()``, :meth:`case_ids`, :meth:`load_case`, and where they differ
    :meth:`normalization` and :meth:`axes`. Nothing is read before the first case is asked for.

    Args:
        class_names: one name a class, background first.
        modalities: names of the image channels.
        spacing: voxel size in mm, in array order (z, y, x).
        patch_size: voxels of a training patch, in array order; its length is the number of spatial dimensions.
        strides: of each level of the network, in array order.
        kernel_sizes: of each level; empty is 3 everywhere.
        augment: what is done to training patches; None for nothing.
        oversample: share of each global batch that is centred on foreground: the last ``round`` of it (nnU-Net: 0.33).
            A global batch of 1 has none.
        cache_mb: volumes are kept in memory up to this many 10^6 bytes, in each process.
    """

    revision: str = ""

    def __init__(
        self,
        *,
        class_names: Sequence[str],
        modalities: Sequence[str],
        spacing: Sequence[float],
        patch_size: Sequence[int],
        strides: Sequence[Sequence[int]] = (),
        kernel_sizes: Sequence[Sequence[int]] = (),
        augment: Augment | None = None,
        oversample: float = 0.33,
        cache_mb: float = 4000,
    ) -> None:
        self.patch_size = tuple(int(n) for n in patch_size)
        self.class_names = tuple(class_names)
        self.modalities = tuple(modalities)
        self.spacing = tuple(float(s) for s in spacing)
        self.strides, self.kernel_sizes = strides, kernel_sizes
        self.augment = augment or Augment(groups=())
        if not 0 <= oversample <= 1:
            raise ConfigError(f"oversample is a share between 0 and 1, not {oversample}")
        self.oversample = oversample
        self.cache_mb = cache_mb
        self._cache: OrderedDict[str, Volume] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker reads its own volumes: pickling gigabytes would take longer than reading.
        return {**self.__dict__, "_cache": OrderedDict()}

    def case_ids(self, split: str) -> list[str]:
        """Ids of the ``train``, ``val`` or ``test`` cases, in a fixed order."""
        raise NotImplementedError

    def load_case(self, case_id: str) -> Volume:
        """Read and preprocess one case."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise MissingDataError or BadDataError before anything else is done."""
        raise NotImplementedError

    def normalization(self) -> tuple[Normalization, ...]:
        """What is done to the intensities of each channel; a model repeats it on what it is asked to predict."""
        return (ZSCORE,) * len(self.modalities)

    def axes(self) -> str:
        """Axis codes in which every case is loaded (``RAS``, see :mod:`bestiary.shared.data.preprocess`).

        A model brings what it is asked to predict to the same. Here they are those of the first training case.
        """
        volume = self.case(self.case_ids("train")[0])
        return axis_codes(Header(volume.label.shape, volume.spacing, volume.affine))

    def spec(self) -> DataSpec:
        """The spec, from the options alone."""
        return DataSpec(
            task="seg",
            modalities=self.modalities,
            spatial_dims=len(self.patch_size),
            in_channels=len(self.modalities),
            num_classes=len(self.class_names),
            class_names=self.class_names,
            spacing=self.spacing,
            patch_size=self.patch_size,
            strides=self.strides,  # type: ignore[arg-type]
            kernel_sizes=self.kernel_sizes,  # type: ignore[arg-type]
        )

    def case(self, case_id: str) -> Volume:
        """One case, from memory where it is there."""
        if case_id in self._cache:
            self._cache.move_to_end(case_id)
            return self._cache[case_id]
        volume = self.load_case(case_id)
        self._accept(volume)
        self._cache[case_id] = volume
        while len(self._cache) > 1 and sum(v.nbytes for v in self._cache.values()) > self.cache_mb * 1e6:
            self._cache.popitem(last=False)
        return volume

    def _accept(self, volume: Volume) -> None:
        classes, channels, dims = len(self.class_names), len(self.modalities), len(self.patch_size)
        if volume.image.shape != (channels, *volume.label.shape) or volume.label.ndim != dims:
            raise BadDataError(
                f"case {volume.id!r}: image {volume.image.shape} and label {volume.label.shape} do not fit "
                f"{channels} channels in {dims}D"
            )
        low, high = int(volume.label.min()), int(volume.label.max())
        if low == IGNORE_INDEX:
            low = int(volume.label[volume.label != IGNORE_INDEX].min(initial=0))
        if low < 0 or high >= classes:
            raise BadDataError(
                f"case {volume.id!r}: label values run from {low} to {high}; there are {classes} classes"
            )
        for index in range(1, high + 1):
            found = np.argwhere(volume.label == index)
            if len(found) > POSITIONS_PER_CLASS:
                rng = np.random.default_rng(derive_seed("positions", volume.id, index))
                found = found[np.sort(rng.choice(len(found), POSITIONS_PER_CLASS, replace=False))]
            if len(found):
                volume.positions[index] = found.astype(np.int16)

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """Patch k of a stream, augmented: a pure function of its arguments and the data.

        Returns:
            An Example with image (C, *patch_size), label (1, *patch_size); ``meta`` tells case, corner (voxel of the
            patch's first corner before augmentation) and whether it was centred on foreground.
        """
        self._no_parts(part)
        ids = self.case_ids("train")
        if not ids:
            raise BadDataError("the train split is empty: give it at least one case")
        volume = self.case(ids[stream.shuffled(k, len(ids))])
        forced = is_oversampled(k, stream.global_batch, self.oversample)
        corner = self._corner(volume, stream.rng(k), forced)

        def read(size: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
            start = [c - (s - p) // 2 for c, s, p in zip(corner, size, self.patch_size, strict=True)]
            return crop_or_pad(volume.image, start, size), crop_or_pad(volume.label, start, size)

        image, label = self.augment(read, self.patch_size, stream.rng(k, "augment"))
        meta = {"case": volume.id, "corner": tuple(corner), "foreground": forced, "spacing": volume.spacing}
        return check_example(
            {"id": f"{volume.id}/{k}", "meta": meta, "image": image, "label": label, "affine": volume.affine}
        )

    def _corner(self, volume: Volume, rng: np.random.Generator, forced: bool) -> list[int]:
        """First corner of the patch. It lies in the volume where that is larger, else the volume is centred in it."""
        low, high = [], []
        for size, patch in zip(volume.label.shape, self.patch_size, strict=True):
            short = max(patch - size, 0)
            low.append(-(short // 2))
            high.append(max(size - patch, -(short // 2)))
        if forced and volume.positions:
            classes = sorted(volume.positions)
            found = volume.positions[classes[rng.integers(len(classes))]]
            voxel = found[rng.integers(len(found))]
            wanted = [int(v) - p // 2 for v, p in zip(voxel, self.patch_size, strict=True)]
            return [min(max(w, a), b) for w, a, b in zip(wanted, low, high, strict=True)]
        return [int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True)]

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """The whole volumes of ``val`` or ``test``, read one by one as they are asked for."""
        self._no_parts(part)
        if split not in ("train", "val", "test"):
            raise ConfigError(f"there is no split {split!r}; there are train, val and test")
        return LazyExamples(self.case_ids(split), lambda case_id: self.case(case_id).example())

    @staticmethod
    def _no_parts(part: str | None) -> None:
        if part is not None:
            raise ConfigError(f"a segmentation data set has no parts; part={part!r} was asked for")


class LazyExamples(Sequence[Example]):
    """Examples that are read when they are asked for.

    Args:
        ids: their ids, in order.
        read: reads one.
    """

    def __init__(self, ids: Sequence[str], read: Callable[[str], Example]) -> None:
        self.ids, self._read = list(ids), read

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> LazyExamples: ...
    def __getitem__(self, index: int | slice) -> Example | LazyExamples:
        if isinstance(index, slice):
            return LazyExamples(self.ids[index], self._read)
        return self._read(self.ids[index])


def is_oversampled(k: int, global_batch: int, share: float) -> bool:
    """Whether sample k is centred on foreground: the last places of each global batch are (nnU-Net's rule)."""
    return k % global_batch >= round(global_batch * (1 - share))


def crop_or_pad(array: np.ndarray, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Cut a box out of the last axes of an array; what lies outside the array is 0.

    Args:
        array: (..., *S).
        start: first voxel of the box; may be negative.
        size: edges of the box.

    Returns:
        (..., *size), a view where the box lies inside.
    """
    lead = array.ndim - len(size)
    shape = array.shape[lead:]
    inner = [slice(max(a, 0), max(min(a + n, s), 0)) for a, n, s in zip(start, size, shape, strict=True)]
    cut = array[(slice(None),) * lead + tuple(inner)]
    pads = []
    for a, n, got in zip(start, size, cut.shape[lead:], strict=True):
        before = min(max(-a, 0), n - got)
        pads.append((before, n - got - before))
    if not any(before or after for before, after in pads):
        return cut
    return np.pad(cut, [(0, 0)] * lead + pads)


def rescaled(affine: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The affine of a grid that covers the same field with voxels ``factors`` times as large."""
    dims = len(factors)
    out = affine.copy()
    out[:3, :dims] = affine[:3, :dims] * factors
    out[:3, 3] += affine[:3, :dims] @ ((factors - 1) / 2)
    return out
