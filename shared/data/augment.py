"""nnU-Net's augmentation for segmentation patches, through MONAI's transforms.

Every sample has its own generator, so a sample's augmentation depends on nothing but its number. A transform that is
not drawn costs nothing: the patch is read with a margin only where it will be rotated or scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from bestiary.shared.core.errors import ConfigError, require

GROUPS = ("spatial", "noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "mirror")
CHEAP_GROUPS = ("noise", "brightness", "contrast", "mirror")
"""What a laptop can afford on every patch."""


class Augment:
    """nnU-Net's default augmentation (v2.5): probabilities and ranges are options, and groups can be left out.

    Where an image has several channels, blur and low resolution take each with probability one half, and each channel
    draws its own strength. Rotation turns about every axis, or, for anisotropic patches (longest edge more than 3
    times the first) and for 2D, in the plane only and by any angle. Labels are resampled with nearest neighbours; what
    lies outside the volume is 0.

    Differs from nnU-Net: gamma is uniform in its range, where nnU-Net draws below and above 1 with equal probability;
    low-resolution images are enlarged linearly; the bounds of the patch's position ignore the margin of a rotation.

    Args:
        groups: which of :data:`GROUPS` to apply; ``strength`` scales the probability of all of them but mirror.
        strength: factor on the probabilities, 1 for nnU-Net's.
        rotation_p: probability of a rotation.
        rotation_deg: largest angle about each axis in degrees, for patches that are about as thick as they are wide.
        scaling_p: probability of a change of size, the same for all axes.
        scaling: range of the sampling grid's factor: above 1 more is seen, and smaller.
        noise_p: probability of Gaussian noise.
        noise_range: range of its standard deviation (nnU-Net calls the number a variance and uses it so).
        blur_p: probability of a Gaussian blur. blur_sigma: its range in voxels.
        brightness_p: probability that values are multiplied. brightness: range of the factor.
        contrast_p: probability that the distance to the mean is multiplied. contrast: range of the factor; the result
            is clipped to the range before.
        low_resolution_p: probability of a lower resolution. low_resolution: range of the factor on the number of
            voxels along an axis.
        gamma_inverted_p: probability of a gamma curve on the negative image.
        gamma_p: probability of a gamma curve. gamma: range of the exponent; mean and deviation are kept.
        mirror_axes: spatial axes that are flipped with probability one half; None is all of them.

    Paper: arXiv:1809.10486 and the nnU-Net v2.5 defaults.
    """

    def __init__(
        self,
        groups: Sequence[str] = GROUPS,
        strength: float = 1.0,
        rotation_p: float = 0.2,
        rotation_deg: float = 30.0,
        scaling_p: float = 0.2,
        scaling: Sequence[float] = (0.7, 1.4),
        noise_p: float = 0.1,
        noise_range: Sequence[float] = (0.0, 0.1),
        blur_p: float = 0.2,
        blur_sigma: Sequence[float] = (0.5, 1.0),
        brightness_p: float = 0.15,
        brightness: Sequence[float] = (0.75, 1.25),
        contrast_p: float = 0.15,
        contrast: Sequence[float] = (0.75, 1.25),
        low_resolution_p: float = 0.25,
        low_resolution: Sequence[float] = (0.5, 1.0),
        gamma_inverted_p: float = 0.1,
        gamma_p: float = 0.3,
        gamma: Sequence[float] = (0.7, 1.5),
        mirror_axes: Sequence[int] | None = None,
    ) -> None:
        unknown = sorted(set(groups) - set(GROUPS))
        if unknown:
            raise ConfigError(f"augmentation groups {unknown} do not exist; there are {', '.join(GROUPS)}")
        self.groups = tuple(groups)
        self.strength = float(strength)
        self.rotation_p, self.rotation_deg = rotation_p, rotation_deg
        self.scaling_p, self.scaling = scaling_p, _range("scaling", scaling)
        self.mirror_axes = None if mirror_axes is None else tuple(mirror_axes)
        blur, factor = _range("blur_sigma", blur_sigma), _range("low_resolution", low_resolution)
        curve, noise = _range("gamma", gamma), _range("noise_range", noise_range)
        scale = tuple(f - 1 for f in _range("brightness", brightness))
        spread = tuple(f - 1 for f in _range("contrast", contrast))
        if noise[0] != 0:
            raise ConfigError(f"noise_range must begin at 0, not {noise[0]}")
        # (group, probability, probability of a channel, MONAI's transform, its arguments), in nnU-Net's order.
        self._intensity: list[tuple[str, float, float, str, dict[str, Any]]] = [
            ("noise", noise_p, 1.0, "RandGaussianNoised", {"std": noise[1], "sample_std": True}),
            ("blur", blur_p, 0.5, "RandGaussianSmoothd", {"sigma_x": blur, "sigma_y": blur, "sigma_z": blur}),
            ("brightness", brightness_p, 1.0, "RandScaleIntensityd", {"factors": scale}),
            (
                "contrast",
                contrast_p,
                1.0,
                "RandScaleIntensityFixedMeand",
                {"factors": spread, "fixed_mean": True, "preserve_range": True},
            ),
            ("low_resolution", low_resolution_p, 0.5, "RandSimulateLowResolutiond", {"zoom_range": factor}),
            ("gamma", gamma_inverted_p, 1.0, "RandAdjustContrastd", _gamma(curve, invert=True)),
            ("gamma", gamma_p, 1.0, "RandAdjustContrastd", _gamma(curve, invert=False)),
        ]

    def __call__(
        self,
        read: Callable[[tuple[int, ...]], tuple[np.ndarray, np.ndarray]],
        patch: Sequence[int],
        rng: np.random.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a patch and augment it.

        Args:
            read: gives image (C, *size) and label (*size) around the patch's centre for a size whose edges are odd
                or even as the patch's are.
            patch: the patch's size.
            rng: the sample's own generator.

        Returns:
            image (C, *patch) float32 and label (1, *patch) int64.
        """
        patch = tuple(patch)
        matrix = self._draw_matrix(patch, rng)
        image_np, label_np = read(_margin(matrix, patch) if matrix is not None else patch)
        image = torch.from_numpy(np.array(image_np, dtype=np.float32))
        label = torch.from_numpy(np.array(label_np, dtype=np.int64))[None]
        if matrix is not None:
            image, label = _resample(image, label, matrix, patch)
        image = self._change_intensity(image, _flat(patch), rng)
        if "mirror" in self.groups:
            axes = range(len(patch)) if self.mirror_axes is None else self.mirror_axes
            flipped = [axis + 1 for axis in axes if rng.random() < 0.5]
            if flipped:
                image, label = image.flip(flipped), label.flip(flipped)
        return image.contiguous(), label.contiguous()

    def _draw_matrix(self, patch: tuple[int, ...], rng: np.random.Generator) -> np.ndarray | None:
        """A (d, d) matrix from an offset in the patch to an offset in the volume, or None where nothing is drawn."""
        if "spatial" not in self.groups:
            return None
        turn = rng.random() < self.rotation_p * self.strength
        size = rng.random() < self.scaling_p * self.strength
        dims, matrix = len(patch), np.eye(len(patch))
        in_plane = dims == 2 or _flat(patch)
        if turn:
            limit = math.radians(self.rotation_deg)
            if in_plane:
                plane = patch[-2:]
                # nnU-Net turns elongated planes by little, since most of the patch would leave the image.
                limit = math.pi if dims == 3 or max(plane) / min(plane) <= 1.5 else math.radians(15)
                planes = [(dims - 2, dims - 1)]
            else:
                planes = [(1, 2), (0, 2), (0, 1)]
            for a, b in planes:
                angle = rng.uniform(-limit, limit)
                step = np.eye(dims)
                step[a, a] = step[b, b] = math.cos(angle)
                step[a, b], step[b, a] = -math.sin(angle), math.sin(angle)
                matrix = step @ matrix
        if size:
            factor = rng.uniform(*self.scaling)
            scale = np.full(dims, factor)
            if dims == 3 and in_plane:
                scale[0] = 1.0
            matrix = np.diag(scale) @ matrix
        return matrix if turn or size else None

    def _change_intensity(self, image: torch.Tensor, flat: bool, rng: np.random.Generator) -> torch.Tensor:
        image = image.clone()
        for group, p, p_channel, name, arguments in self._intensity:
            if group not in self.groups or rng.random() >= p * self.strength:
                continue
            transforms = require("monai.transforms", "medical")
            for c in range(image.shape[0]):
                if p_channel < 1 and rng.random() >= p_channel:
                    continue
                # An anisotropic patch loses resolution in its planes only: they stand in the channel's place.
                planes = flat and group == "low_resolution"
                if group == "low_resolution":
                    mode = "bilinear" if planes or image.ndim == 3 else "trilinear"
                    arguments = {**arguments, "upsample_mode": mode}
                transform = getattr(transforms, name)(keys="image", prob=1.0, **arguments)
                transform.set_random_state(seed=int(rng.integers(2**31)))
                values = image[c] if planes else image[c : c + 1]
                image[c] = torch.as_tensor(transform({"image": values})["image"]).reshape(image.shape[1:])
        return image


def _gamma(curve: tuple[float, float], invert: bool) -> dict[str, Any]:
    return {"gamma": curve, "invert_image": invert, "retain_stats": True}


def _range(name: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2 or values[0] > values[1]:
        raise ConfigError(f"{name} must be two numbers, the smaller first, not {list(values)}")
    return float(values[0]), float(values[1])


def _flat(patch: Sequence[int]) -> bool:
    return len(patch) == 3 and max(patch) / patch[0] > 3


def _margin(matrix: np.ndarray, patch: tuple[int, ...]) -> tuple[int, ...]:
    """The size that has every voxel which the turned patch touches, odd or even as the patch is."""
    reach = np.abs(matrix) @ ((np.array(patch) - 1) / 2)
    needed = np.ceil(2 * reach + 1 - 1e-9).astype(int) + 1
    return tuple(int(n + (n - p) % 2) for n, p in zip(needed, patch, strict=True))


def _resample(
    image: torch.Tensor, label: torch.Tensor, matrix: np.ndarray, patch: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    transforms = require("monai.transforms", "medical")
    affine = np.eye(len(patch) + 1)
    affine[:-1, :-1] = matrix
    transform = transforms.Affined(
        keys=("image", "label"),
        affine=affine,
        spatial_size=patch,
        mode=("bilinear", "nearest"),
        padding_mode="zeros",
    )
    done = transform({"image": image, "label": label.float()})
    return torch.as_tensor(done["image"]).as_subclass(torch.Tensor), (
        torch.as_tensor(done["label"]).as_subclass(torch.Tensor).round().long()
    )
