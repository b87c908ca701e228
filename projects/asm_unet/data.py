"""The data set that ASM-UNet trains on where nobody has asked for a real one: brain tissue on the ICBM152 template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.data.assets import asset_path, get_asset
from bestiary.shared.data.augment import Augment
from bestiary.shared.data.preprocess import ZSCORE, normalize, read_volume
from bestiary.shared.data.volumes import Volume, VolumeSource
from bestiary.shared.metrics.segmentation import VolumeProtocol

CLASSES = ("background", "CSF", "GM", "WM")
SLABS = {"train": (0, 120), "val": (128, 142), "test": (150, None)}
"""Voxel rows along y of each part, the end excluded; what lies between two parts is used by none."""
FILES = {key: f"mni_icbm152_{key}_tal_nlin_sym_09a_converted.nii.gz" for key in ("t1", "gm", "wm")}


class ICBM152(VolumeSource):
    """Three tissues on one averaged brain (ICBM152 2009a, 1 mm): a check that the machinery works, and no more.

    A network is not needed here: the T1 intensity alone, looked up in a table, already gives Dice of about 0.87 (CSF),
    0.97 (GM) and 0.89 (WM), see :meth:`baselines`. Print that beside a model, and call no result on this set clinical.

    The template is exactly mirror-symmetric, so only the half with world x < 0 is used, and the parts are cut along y
    with gaps between them: train y < 120, val 128 to 141, test from 150 (voxel rows of the file). Labels: inside T1 > 0
    the largest of (1 - gm - wm, gm, wm) gives CSF 1, GM 2, WM 3; elsewhere background 0. The image is z-scored over the
    brain, the non-zero voxels of the whole template, as any other file is at prediction.

    Args:
        patch_size: voxels of a training patch, (z, y, x).
        strides: of each level of the network.
        kernel_sizes: of each level; empty is 3 everywhere.
        downsample: averages blocks of this many voxels along each axis, after the parts are cut.
        augment: what is done to training patches.
        oversample: see :class:`VolumeSource`.
        cache_mb: see :class:`VolumeSource`.

    Source: Fonov et al., NeuroImage 54 (2011); files from nilearn (asset ``icbm152``).
    """

    def __init__(
        self,
        patch_size: Sequence[int] = (32, 32, 32),
        strides: Sequence[Sequence[int]] = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
        kernel_sizes: Sequence[Sequence[int]] = (),
        downsample: int = 1,
        augment: Augment | None = None,
        oversample: float = 0.33,
        cache_mb: float = 4000,
    ) -> None:
        if downsample < 1:
            raise ConfigError(f"downsample must be 1 or more, not {downsample}")
        self.downsample = int(downsample)
        super().__init__(
            class_names=CLASSES,
            modalities=("T1",),
            spacing=(float(downsample),) * 3,
            patch_size=patch_size,
            strides=strides,
            kernel_sizes=kernel_sizes,
            augment=augment,
            oversample=oversample,
            cache_mb=cache_mb,
        )

    @property
    def revision(self) -> str:  # type: ignore[override]
        """Package and version of the files, and the voxel size."""
        asset = get_asset("icbm152")
        return f"{asset.package}-{asset.version}" + (f"/{self.downsample}mm" if self.downsample > 1 else "")

    def check(self) -> None:
        """Raise MissingDataError, with the command that fetches the files, where they are not there."""
        asset_path("icbm152")

    def case_ids(self, split: str) -> list[str]:
        """One case a part."""
        return [f"icbm152_{split}"]

    def _raw(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The three files, (z, y, x): T1 in 0 to 255, gm and wm as probabilities; and the affine."""
        folder = asset_path("icbm152")
        read = {key: read_volume(folder / name) for key, name in FILES.items()}
        arrays = {"t1": read["t1"][0], "gm": read["gm"][0] / 255, "wm": read["wm"][0] / 255}
        return arrays, read["t1"][1].affine

    def _box(self, split: str, shape: Sequence[int], affine: np.ndarray) -> tuple[slice, slice, slice]:
        """The voxels of a part, as slices of (z, y, x)."""
        world_x = affine[0, 2] * np.arange(shape[2]) + affine[0, 3]
        left = np.flatnonzero(world_x < 0)
        first, last = SLABS[split]
        rows = range(shape[1])[first:last]
        n = self.downsample
        # Whole blocks only: a block must not reach over the border of its part.
        return (
            slice(0, shape[0] // n * n),
            slice(rows.start, rows.start + len(rows) // n * n),
            slice(int(left[0]), int(left[0]) + len(left) // n * n),
        )

    def positions(self, split: str) -> np.ndarray:
        """Voxels of the files that a part rests on: (n, 3) indices (z, y, x), from the cut itself."""
        arrays, affine = self._raw()
        shape = arrays["t1"].shape
        box = self._box(split, shape, affine)
        axes = np.meshgrid(*(np.arange(n, dtype=np.int16) for n in shape), indexing="ij", copy=False)
        return np.stack([axis[box].ravel() for axis in axes], axis=1)

    def _part(self, split: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The arrays of one part, with the normalised image, at the voxel size asked for; and the part's affine."""
        arrays, affine = self._raw()
        arrays["image"] = normalize(arrays["t1"], ZSCORE)
        box = self._box(split, arrays["t1"].shape, affine)
        n = self.downsample
        out = {key: block_mean(array[box], n) for key, array in arrays.items()}
        affine = affine.copy()
        affine[:3, 3] += affine[:3, :3] @ ([edge.start + (n - 1) / 2 for edge in box])
        affine[:3, :3] *= n
        return out, affine

    def load_case(self, case_id: str) -> Volume:
        """See :class:`VolumeSource`."""
        split = case_id.removeprefix("icbm152_")
        arrays, affine = self._part(split)
        meta: dict[str, Any] = {"file": FILES["t1"], "part": split}
        return Volume(case_id, arrays["image"][None], _tissue(arrays), affine, self.spacing, meta)

    def baselines(self, split: str = "test", protocol: VolumeProtocol | None = None) -> dict[str, dict[str, float]]:
        """What needs no network: each T1 intensity gets the tissue it most often is in the train part.

        Args:
            split: the part that is scored.
            protocol: how; the default protocol where None.

        Returns:
            ``{"intensity lookup": {metric: value}}`` with the protocol's keys.
        """
        train, _ = self._part("train")
        table = np.zeros((256, len(CLASSES)), dtype=np.int64)
        np.add.at(table, (_bins(train["t1"]), _tissue(train)), 1)
        guess = table.argmax(1)
        held_out, _ = self._part(split)
        protocol = protocol or VolumeProtocol(class_names=CLASSES)
        pair = (guess[_bins(held_out["t1"])], _tissue(held_out), self.spacing)
        return {"intensity lookup": protocol.score([pair], CLASSES)}


def _bins(t1: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(t1), 0, 255).astype(np.int64)


def _tissue(arrays: dict[str, np.ndarray]) -> np.ndarray:
    gm, wm = arrays["gm"], arrays["wm"]
    label = 1 + np.argmax(np.stack([1 - gm - wm, gm, wm]), axis=0)
    return np.where(arrays["t1"] > 0, label, 0).astype(np.int16)


def block_mean(array: np.ndarray, n: int) -> np.ndarray:
    """The mean of each block of n by n by n voxels; the array's edges are multiples of n."""
    if n == 1:
        return np.ascontiguousarray(array)
    z, y, x = (size // n for size in array.shape)
    return array.reshape(z, n, y, n, x, n).mean(axis=(1, 3, 5), dtype=np.float64).astype(np.float32)
