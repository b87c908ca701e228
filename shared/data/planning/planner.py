"""nnU-Net's experiment planning: target spacing, patch, batch and network from a fingerprint.

Everything follows nnU-Net version 2 (arXiv:1809.10486; residual encoders: arXiv:2404.09556), and a test holds the plans
equal to those of its own planner. Axes are in array order (z, y, x); nnU-Net puts the coarsest axis first while it
plans, and so do we, but what is returned is in the order of the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bestiary.shared.core.errors import BadDataError, ConfigError, UserError
from bestiary.shared.data.planning.topology import Topology, feature_map_size, topology
from bestiary.shared.data.preprocess import ANISOTROPY

BASE_FEATURES = 32
MAX_FEATURES = {2: 512, 3: 320}
START = {2: 2048**2, 3: 256**3}
"""Pixels or voxels of the patch that the search begins with."""
REFERENCE_BATCH = {2: 12, 3: 2}
"""The batch that the reference sizes of a preset stand for."""
LOWRES_SHARE = 0.25
"""A patch that holds less of the median image than this calls for a low-resolution configuration too."""


@dataclass(frozen=True)
class Preset:
    """The constants of one of nnU-Net's planners.

    Attributes:
        reference: feature map size (see :func:`feature_map_size`) that fills ``memory_gb``, by dimensions.
        memory_gb: of the GPU that ``reference`` was measured on, and the default target.
        residual: a residual encoder.
        blocks: convolutions (or residual blocks) of an encoder level, the last repeated.
        decoder_convs: convolutions of a decoder level.
        covered: a batch holds no more than this share of the data set's voxels.
        name: nnU-Net's name of it.
    """

    reference: dict[int, float]
    memory_gb: float
    residual: bool = False
    blocks: tuple[int, ...] = (2,)
    decoder_convs: int = 2
    covered: float = 0.05
    name: str = "ExperimentPlanner"


_RESIDUAL = {"residual": True, "blocks": (1, 3, 4, 6), "decoder_convs": 1, "covered": 1.0}
PRESETS = {
    "default": Preset({2: 85e6, 3: 560e6}, 8),
    "resenc_m": Preset({2: 135e6, 3: 680e6}, 8, name="nnUNetPlannerResEncM", **_RESIDUAL),
    "resenc_l": Preset({2: 380e6, 3: 2100e6}, 24, name="nnUNetPlannerResEncL", **_RESIDUAL),
}


@dataclass(frozen=True)
class Configuration:
    """One network for the data set; lists are in array order and fine to coarse, as in a DataSpec.

    Attributes:
        spacing: mm. patch_size: voxels. median_shape: voxels of the median case at that spacing.
        batch_size: patches of a step.
        strides: of each level. kernel_sizes: of each level. features: channels of each level.
        convs: convolutions, or residual blocks, of each encoder level. decoder_convs: of each decoder level.
        residual: whether the encoder is residual.
        batch_dice: whether nnU-Net takes Dice over the batch (true in 2D, and in 3D beside a low-resolution net).
    """

    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    median_shape: tuple[float, ...]
    batch_size: int
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    features: tuple[int, ...]
    convs: tuple[int, ...]
    decoder_convs: tuple[int, ...]
    residual: bool = False
    batch_dice: bool = False


@dataclass(frozen=True)
class Outcome:
    """What planning gives: configurations by name, ``3d_lowres`` only where nnU-Net would make it."""

    configurations: dict[str, Configuration]
    slice_axis: int
    notes: list[str] = field(default_factory=list)


def target_spacing(spacings: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """The spacing to resample to: the median, and along a coarse axis with few slices the 10th percentile.

    Args:
        spacings: (n, d) mm. shapes: (n, d) voxels after cropping.
    """
    target, size = np.percentile(spacings, 50, 0), np.percentile(shapes, 50, 0)
    coarse = int(np.argmax(target))
    others = [axis for axis in range(len(target)) if axis != coarse]
    widest = max(target[axis] for axis in others)
    few = size[coarse] * ANISOTROPY < min(size[axis] for axis in others)
    if target[coarse] > ANISOTROPY * widest and few:
        finer = np.percentile(spacings[:, coarse], 10)
        target[coarse] = widest + 1e-5 if finer < widest else finer
    return target


@dataclass(frozen=True)
class Planner:
    """Plans for one data set.

    Args:
        num_classes: entries of dataset.json's ``labels``, background included.
        preset: which of nnU-Net's planners.
        memory_gb: GPU memory to fill; None is the preset's.
        min_batch: smallest batch (nnU-Net: 2; the official code of arXiv:2508.07237: 4).
    """

    num_classes: int
    preset: Preset = PRESETS["default"]
    memory_gb: float | None = None
    min_batch: int = 2

    def __post_init__(self) -> None:
        if self.min_batch < 1 or (self.memory_gb is not None and self.memory_gb <= 0):
            raise ConfigError(
                f"min_batch {self.min_batch} must be 1 or more, and gpu_memory_gb {self.memory_gb} over 0"
            )

    def plan(self, spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]]) -> Outcome:
        """Plan.

        Args:
            spacings: mm of each case, (z, y, x). shapes: voxels of each case after cropping to its non-zero part; a
                first axis of 1 everywhere means 2D data.

        Raises:
            UserError: if no patch fits the memory, or the images are too small for a network.
        """
        every, sizes = np.array(spacings, dtype=np.float64), np.array(shapes, dtype=np.float64)
        spacing = target_spacing(every, sizes)
        # The coarsest axis comes first while planning: slices of a 2D network lie across it.
        first = int(np.argmax(spacing))
        order = [first, *(axis for axis in range(3) if axis != first)]
        resampled = [
            [round(s / t * n) for s, t, n in zip(row, spacing, size, strict=True)]
            for row, size in zip(every, sizes, strict=True)
        ]
        median = np.median(np.array(resampled), 0)[order]
        spacing = spacing[order]
        voxels = float(np.prod(median)) * len(every)
        found: dict[str, Configuration] = {}
        notes = []
        if median[0] != 1:
            full = self.configuration(spacing, median, voxels)
            low = self._lowres(full, median, len(every))
            found["3d_fullres"] = _restored(replace(full, batch_dice=low is not None), order)
            if low is not None:
                found["3d_lowres"] = _restored(low, order)
                notes.append("nnU-Net would also train a low-resolution net and a cascade here; bestiary has none")
        try:
            flat = self.configuration(spacing[1:], median[1:], voxels)
            found["2d"] = replace(flat, batch_dice=True)
        except UserError as error:
            if not found:
                raise
            notes.append(f"no 2d configuration: {error}")
        return Outcome(found, first, notes)

    def configuration(self, spacing: np.ndarray, median: np.ndarray, voxels: float) -> Configuration:
        """One configuration in the planner's own axis order.

        Args:
            spacing: (d,) mm. median: (d,) voxels of the median case. voxels: of the whole data set.
        """
        dims = len(spacing)
        memory = self.preset.memory_gb if self.memory_gb is None else self.memory_gb
        reference, batch = self.preset.reference[dims] * (memory / self.preset.memory_gb), REFERENCE_BATCH[dims]
        # A cube of the start size in mm, or what the median image has of it.
        ratio = 1 / spacing
        start = [round(n) for n in ratio * (START[dims] / np.prod(ratio)) ** (1 / dims)]
        shape = topology(spacing, [min(n, m) for n, m in zip(start, median, strict=True)])
        if len(shape.strides) < 2:
            raise BadDataError(
                f"images of {[float(n) for n in median]} voxels at {[float(round(s, 4)) for s in spacing]} mm are too "
                "small for a U-Net: no axis can be halved"
            )
        estimate = self._estimate(shape)
        # The references of the plain nets in 2D are for 12 patches, and two of them must fit.
        share = 1.0 if self.preset.residual else 2 / batch
        while estimate * share > reference:
            shape = self._smaller(shape, spacing, median)
            estimate = self._estimate(shape)
        fits = round(reference / estimate * batch)
        covers = round(voxels * self.preset.covered / np.prod(shape.patch_size, dtype=np.float64))
        levels = len(shape.strides)
        return Configuration(
            spacing=tuple(float(s) for s in spacing),
            patch_size=shape.patch_size,
            median_shape=tuple(float(n) for n in median),
            batch_size=max(min(fits, covers), self.min_batch),
            strides=shape.strides,
            kernel_sizes=shape.kernel_sizes,
            features=self._features(levels, dims),
            convs=self._convs(levels),
            decoder_convs=(self.preset.decoder_convs,) * (levels - 1),
            residual=self.preset.residual,
        )

    def _smaller(self, shape: Topology, spacing: np.ndarray, median: np.ndarray) -> Topology:
        """One step down along the axis that has most of the median image."""
        axis = int(np.argsort([p / m for p, m in zip(shape.patch_size, median, strict=True)])[-1])
        # The step is that of the smaller patch: 256 goes to 224 and not to 192 where 224 is divisible enough.
        trial = list(shape.patch_size)
        trial[axis] -= shape.divisor[axis]
        step = topology(spacing, trial).divisor[axis]
        patch = list(shape.patch_size)
        patch[axis] -= step
        smaller = topology(spacing, patch) if min(patch) > 0 else None
        if smaller is None or len(smaller.strides) < 2:
            raise ConfigError(f"no patch fits into {self.memory_gb or self.preset.memory_gb:g} GB: raise gpu_memory_gb")
        return smaller

    def _estimate(self, shape: Topology) -> int:
        levels, dims = len(shape.strides), len(shape.patch_size)
        return feature_map_size(
            shape.patch_size,
            shape.strides,
            self._features(levels, dims),
            self._convs(levels),
            (self.preset.decoder_convs,) * (levels - 1),
            self.num_classes,
            self.preset.residual,
        )

    def _features(self, levels: int, dims: int) -> tuple[int, ...]:
        return tuple(min(BASE_FEATURES * 2**level, MAX_FEATURES[dims]) for level in range(levels))

    def _convs(self, levels: int) -> tuple[int, ...]:
        blocks = self.preset.blocks
        return (*blocks, *[blocks[-1]] * levels)[:levels]

    def _lowres(self, full: Configuration, median: np.ndarray, cases: int) -> Configuration | None:
        """The low-resolution configuration, where the patch sees little of the image and it would help."""
        fine = np.array(full.spacing)
        spacing, low = fine.copy(), None
        voxels, patch = float(np.prod(median)), float(np.prod(full.patch_size))
        while patch / voxels < LOWRES_SHARE:
            # First the finer axes, until no axis is more than twice as coarse as another; then all.
            behind = spacing.max() / spacing > 2
            spacing[behind if behind.any() else slice(None)] *= 1.03
            voxels = float(np.prod(fine / spacing * median))
            shape = np.array([round(n) for n in fine / spacing * median], dtype=np.float64)
            low = self.configuration(spacing, shape, voxels * cases)
            patch = float(np.prod(low.patch_size))
        return None if float(np.prod(median)) / voxels < 2 else low


def _restored(found: Configuration, order: Sequence[int]) -> Configuration:
    """From the planner's axis order to that of the files."""
    back = [int(i) for i in np.argsort(order)]

    def put(values: Sequence) -> tuple:
        return tuple(values[i] for i in back)

    return replace(
        found,
        spacing=put(found.spacing),
        patch_size=put(found.patch_size),
        median_shape=put(found.median_shape),
        strides=tuple(put(level) for level in found.strides),
        kernel_sizes=tuple(put(level) for level in found.kernel_sizes),
    )
