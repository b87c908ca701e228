"""Two brains with many labelled structures: a network learns one side and is tested on the other, mirrored.

They are what comes nearest to a fine-grained task among the volumes that anyone can have offline. Each is one brain, so
a score says how well structures carry over to the other side of the same head, and nothing about other people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from bestiary.projects.asm_unet.data import block_mean
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import IGNORE_INDEX
from bestiary.shared.data.assets import asset_path, get_asset
from bestiary.shared.data.augment import Augment
from bestiary.shared.data.preprocess import ZSCORE, normalize, read_volume
from bestiary.shared.data.volumes import Volume, VolumeSource
from bestiary.shared.metrics.segmentation import VolumeProtocol

ASSET = "mricron_data"
SHIFTS = 8
"""Mirror planes that the baseline tries on either side of the midline, in steps of half a voxel of the file."""


class Hemispheres(VolumeSource):
    """Base: the left side is ``train`` but for a slab of it, the slab is ``val``, the right side mirrored ``test``.

    Both sides bear the same classes, and blocks of ``downsample`` voxels are counted from the midline, so that left and
    right lie alike. The slab and a margin before and behind it are seen in training, but their labels are held back
    (:data:`~bestiary.shared.core.examples.IGNORE_INDEX`). The network sees the whole left side when it is validated,
    and is scored in the slab alone (``region`` of the example's meta). A class that a block of voxels takes is the one
    that most of them have. The image is z-scored over the non-zero voxels of the whole head. Volumes are cut to the box
    that holds the structures and a margin.

    Do not mirror patches along x when training: no test voxel looks like that.

    Args:
        patch_size: voxels of a training patch, (z, y, x).
        strides: of each level of the network.
        kernel_sizes: of each level; empty is 3 everywhere.
        downsample: averages blocks of this many voxels along each axis.
        augment: what is done to training patches.
        oversample: see :class:`VolumeSource`.
        cache_mb: see :class:`VolumeSource`.
    """

    name: ClassVar[str]
    image_file: ClassVar[str]
    label_file: ClassVar[str]
    voxel_mm: ClassVar[float]
    midline: ClassVar[tuple[int, int]]
    """The last x index of the left side and the first of the right."""
    box: ClassVar[tuple[tuple[int, int], tuple[int, int], int]]
    """Range of z, range of y, and how many voxels from the midline outwards."""
    slab: ClassVar[tuple[int, int]]
    """Range of y of the validation slab."""
    margin: ClassVar[int]
    """Rows before and behind the slab whose labels nobody uses."""

    def __init__(
        self,
        patch_size: Sequence[int],
        strides: Sequence[Sequence[int]],
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
            class_names=("background", *self.structures().values()),
            modalities=("T1",),
            spacing=(self.voxel_mm * downsample,) * 3,
            patch_size=patch_size,
            strides=strides,
            kernel_sizes=kernel_sizes,
            augment=augment,
            oversample=oversample,
            cache_mb=cache_mb,
        )

    @classmethod
    def structures(cls) -> Mapping[tuple[int, int], str]:
        """Values in the file, of the left and of the right side, to the name of the structure."""
        raise NotImplementedError

    @property
    def revision(self) -> str:  # type: ignore[override]
        """Package and version of the files, the brain, and the voxel size."""
        asset = get_asset(ASSET)
        return f"{asset.package}-{asset.version}/{self.name}/{self.voxel_mm * self.downsample:g}mm"

    def check(self) -> None:
        """Raise MissingDataError, with the command that fetches the files, where they are not there."""
        asset_path(ASSET)

    def case_ids(self, split: str) -> list[str]:
        """One case a part."""
        return [f"{self.name}_{split}"]

    @cached_property
    def _files(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """T1 as in the file, classes, both (z, y, x), and the affine."""
        folder = asset_path(ASSET)
        t1, header = read_volume(folder / self.image_file)
        values = np.rint(read_volume(folder / self.label_file)[0]).astype(np.int64)
        table = np.zeros(int(values.max()) + 1, dtype=np.int16)
        for number, pair in enumerate(self.structures(), start=1):
            table[[value for value in pair if value < len(table)]] = number
        return t1, table[values], header.affine

    def __getstate__(self) -> dict[str, Any]:
        """Without the volumes: a loader's worker reads its own."""
        return {key: value for key, value in super().__getstate__().items() if key != "_files"}

    def _cut(self, split: str) -> tuple[slice, slice, slice]:
        """The voxels of a side, as slices of the file's (z, y, x); whole blocks, counted from the midline along x."""
        n, (z, y, width) = self.downsample, self.box
        width = width // n * n
        left, right = self.midline
        x = slice(right, right + width) if split == "test" else slice(left + 1 - width, left + 1)
        return slice(z[0], z[0] + (z[1] - z[0]) // n * n), slice(y[0], y[0] + (y[1] - y[0]) // n * n), x

    def _rows(self) -> tuple[slice, slice]:
        """Along y of the left side's array: the blocks whole in the slab, and all that touch it or its margin."""
        n, start = self.downsample, self.box[1][0]
        low, high = (edge - start for edge in self.slab)
        return slice(-(-low // n), high // n), slice((low - self.margin) // n, -(-(high + self.margin) // n))

    def positions(self, split: str) -> np.ndarray:
        """Voxels of the files whose labels a part rests on: (n, 3) indices (z, y, x)."""
        cut, n = self._cut(split), self.downsample
        inner, outer = self._rows()
        blocks = np.arange((cut[1].stop - cut[1].start) // n)
        if split == "val":
            blocks = blocks[inner]
        elif split == "train":
            blocks = np.delete(blocks, np.arange(outer.start, outer.stop))
        y = cut[1].start + (blocks[:, None] * n + np.arange(n)).ravel()
        ranges = [np.arange(cut[0].start, cut[0].stop), y, np.arange(cut[2].start, cut[2].stop)]
        return np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.int16)

    def load_case(self, case_id: str) -> Volume:
        """See :class:`VolumeSource`. The affine of the mirrored side tells where its voxels are in the head."""
        split = case_id.removeprefix(f"{self.name}_")
        t1, label, affine = self._files
        cut, n = self._cut(split), self.downsample
        image, label = block_mean(normalize(t1, ZSCORE)[cut], n), block_majority(label[cut], n)
        affine = affine.copy()
        affine[:3, 3] += affine[:3, :3] @ ([edge.start + (n - 1) / 2 for edge in cut])
        affine[:3, :3] *= n
        meta: dict[str, Any] = {"file": self.image_file, "part": split}
        inner, outer = self._rows()
        if split == "train":
            label[:, outer] = IGNORE_INDEX
        elif split == "val":
            meta["region"] = (slice(None), inner, slice(None))
        else:
            image, label = (np.ascontiguousarray(array[..., ::-1]) for array in (image, label))
            affine[:3, 3] += affine[:3, 2] * (image.shape[2] - 1)
            affine[:3, 2] *= -1
        return Volume(case_id, image[None], label, affine, self.spacing, meta)

    def mirrored_left(self) -> tuple[np.ndarray, float]:
        """The left side's labels laid over the right side, and the correlation of the two sides' images.

        The mirror plane is the one, near the midline, about which the images agree best: labels have no say in it.

        Returns:
            Class numbers on the grid of the test case, and the correlation over voxels above zero on both sides.
        """
        t1, label, _ = self._files
        z, y, x = self._cut("test")
        best: tuple[float, np.ndarray] = (-1.0, label[:0, :0, :0])
        for twice in range(sum(self.midline) - SHIFTS, sum(self.midline) + SHIFTS + 1):
            other = twice - np.arange(x.start, x.stop)
            there = (other >= 0) & (other <= self.midline[0])
            left = np.where(there, t1[z, y][..., np.clip(other, 0, None)], 0)
            both = (left > 0) & (t1[z, y, x] > 0)
            r = float(np.corrcoef(left[both], t1[z, y, x][both])[0, 1])
            if r > best[0]:
                best = r, np.where(there, label[z, y][..., np.clip(other, 0, None)], 0)
        return block_majority(best[1], self.downsample)[..., ::-1], best[0]

    def baselines(self, split: str = "test", protocol: VolumeProtocol | None = None) -> dict[str, dict[str, float]]:
        """What needs no network: the left side's labels, mirrored onto the right; see :meth:`mirrored_left`.

        Args:
            split: the part that is scored; there is a baseline for ``test`` alone.
            protocol: how; the default protocol where None.

        Returns:
            ``{"mirrored left side": {metric: value}}`` with the protocol's keys.
        """
        if split != "test":
            return {}
        protocol = protocol or VolumeProtocol(class_names=self.class_names)
        truth = self.case(self.case_ids("test")[0]).label
        return {
            "mirrored left side": protocol.score(
                [(self.mirrored_left()[0].copy(), truth, self.spacing)], self.class_names
            )
        }


def block_majority(label: np.ndarray, n: int) -> np.ndarray:
    """The class that most voxels of each block of n by n by n have; the one met first where two have as many."""
    if n == 1:
        return np.ascontiguousarray(label)
    z, y, x = (size // n for size in label.shape)
    blocks = label.reshape(z, n, y, n, x, n).transpose(0, 2, 4, 1, 3, 5).reshape(z, y, x, n**3)
    votes, winner = np.zeros((z, y, x), dtype=np.int16), np.zeros((z, y, x), dtype=label.dtype)
    for candidate in np.moveaxis(blocks, -1, 0):
        found = (blocks == candidate[..., None]).sum(-1, dtype=np.int16)
        winner = np.where(found > votes, candidate, winner)
        votes = np.maximum(votes, found)
    return winner


class Colin27(Hemispheres):
    """Colin27, one man's head averaged over 27 scans, with AAL's parcellation: 54 structures on either side.

    T1 at 1 mm. Left and right halves of a structure are one class; the eight vermis labels lie on the midline, belong
    to neither side, and are background. The two sides are really different: mirroring the left labels onto the right
    gives a mean Dice of about 0.72 at best (see :meth:`baselines`), and T1 correlates at 0.82.

    Source: Holmes et al., J. Comput. Assist. Tomogr. 22 (1998); Tzourio-Mazoyer et al., NeuroImage 15 (2002); files
    from Debian's mricron-data (asset ``mricron_data``).
    """

    name = "colin27"
    image_file, label_file = "ch2.nii.gz", "aal.nii.gz"
    voxel_mm = 1.0
    midline = (90, 91)
    box = ((4, 162), (15, 207), 80)
    slab = (111, 120)
    margin = 3

    @classmethod
    def structures(cls) -> Mapping[tuple[int, int], str]:
        """AAL numbers left and right structures 1, 2, 3, 4 … in this order."""
        return {(2 * i + 1, 2 * i + 2): name for i, name in enumerate(AAL)}


class INIA19(Hemispheres):
    """INIA19, the mean head of 19 rhesus macaques, with NeuroMaps labels: the 134 structures of 200 voxels and more.

    T1 at 0.5 mm, brain only. Structures are named by their number in the file (left; the right one is larger by 1000),
    for the names do not come with it. The smallest fill a fortieth of a cubic centimetre.

    The two sides are nearly mirror images: about the best plane, T1 correlates at 0.96 and the left labels score a Dice
    of 0.85 on the right. No voxel is the same, but a network that has learnt the left side by heart is rewarded. Read
    scores beside :meth:`baselines`, and prefer Colin27 for conclusions.

    Source: Rohlfing et al., Front. Neuroinform. 6:27 (2012); files from Debian's mricron-data.
    """

    name = "inia19"
    image_file, label_file = "inia19-t1-brain.nii.gz", "inia19-NeuroMaps.nii.gz"
    voxel_mm = 0.5
    midline = (83, 84)
    box = ((0, 118), (16, 176), 66)
    slab = (44, 52)
    margin = 2

    @classmethod
    def structures(cls) -> Mapping[tuple[int, int], str]:
        """The pairs that have at least 200 voxels on both sides."""
        return {(value, value + 1000): f"NeuroMaps {value}" for value in NEUROMAPS}


# fmt: off
AAL = (
    "Precentral", "Frontal_Sup", "Frontal_Sup_Orb", "Frontal_Mid", "Frontal_Mid_Orb", "Frontal_Inf_Oper",
    "Frontal_Inf_Tri", "Frontal_Inf_Orb", "Rolandic_Oper", "Supp_Motor_Area", "Olfactory", "Frontal_Sup_Medial",
    "Frontal_Med_Orb", "Rectus", "Insula", "Cingulum_Ant", "Cingulum_Mid", "Cingulum_Post", "Hippocampus",
    "ParaHippocampal", "Amygdala", "Calcarine", "Cuneus", "Lingual", "Occipital_Sup", "Occipital_Mid", "Occipital_Inf",
    "Fusiform", "Postcentral", "Parietal_Sup", "Parietal_Inf", "SupraMarginal", "Angular", "Precuneus",
    "Paracentral_Lobule", "Caudate", "Putamen", "Pallidum", "Thalamus", "Heschl", "Temporal_Sup", "Temporal_Pole_Sup",
    "Temporal_Mid", "Temporal_Pole_Mid", "Temporal_Inf", "Cerebelum_Crus1", "Cerebelum_Crus2", "Cerebelum_3",
    "Cerebelum_4_5", "Cerebelum_6", "Cerebelum_7b", "Cerebelum_8", "Cerebelum_9", "Cerebelum_10",
)
"""AAL's names, as its file spells them, without the side."""

NEUROMAPS = (
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 14, 25, 30, 33, 37, 42, 45, 47, 51, 54, 55, 58, 63, 65, 69, 70, 71, 73, 74, 76, 81,
    82, 87, 89, 90, 91, 92, 95, 96, 97, 98, 99, 100, 101, 105, 106, 107, 109, 111, 118, 119, 124, 125, 126, 128, 130,
    139, 140, 147, 148, 149, 150, 151, 153, 162, 166, 170, 180, 188, 189, 191, 192, 193, 196, 197, 201, 209, 213, 214,
    215, 216, 217, 220, 221, 225, 226, 227, 228, 229, 230, 231, 235, 237, 240, 242, 244, 245, 246, 247, 252, 253, 256,
    257, 260, 261, 292, 295, 325, 383, 386, 416, 420, 446, 450, 451, 453, 454, 457, 458, 459, 461, 463, 479, 482, 489,
    490, 491, 496, 497, 500, 504, 505, 513, 589,
)
# fmt: on
