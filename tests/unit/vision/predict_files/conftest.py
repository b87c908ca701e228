"""A segmentation model that reads directions, and files for it."""

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from bestiary.shared.core.specs import DataSpec
from bestiary.shared.vision.segmentation import SegmentationModel


class Slope(nn.Module):
    """Whether the image rises or falls to the next voxel along the array's last axis: wrong where it lies wrong."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        step = nn.functional.pad(x[:, :1, ..., 1:] - x[:, :1, ..., :-1], (0, 1))
        return torch.cat([0.05 - step.abs(), step, -step], 1) * self.scale


@pytest.fixture
def make():
    """`make(axes, channels, dims, spacing, classes)`: a model of `Slope`."""

    def model(axes="RAS", channels=1, dims=3, spacing=0.0, classes=("background", "rising", "falling")):
        names = ("T1", "T2")[:channels]
        sizes = ((spacing,) * dims, (8, 8, 40)[-dims:], ((1,) * dims,))
        made = SegmentationModel(Slope(), DataSpec("seg", names, dims, channels, 3, classes, *sizes), mirror_tta=False)
        made.use_normalization([{"scheme": "none"}] * channels)
        if axes:
            made.use_axes(axes)
        return made

    return model


@pytest.fixture
def brain(need_asset):
    """A piece of the ICBM152 T1, 1 mm, lying as RAS: (x, y, z) and its affine."""
    path = next(need_asset("icbm152").glob("*t1_tal*"))
    image = nib.as_closest_canonical(nib.load(path))
    piece = image.slicer[60:90, 100:124, 80:100]
    return np.asarray(piece.dataobj, dtype=np.float32) / 100, piece.affine


@pytest.fixture
def write():
    """`write(path, data, affine)` as NIfTI; gives the path."""

    def save(path, data, affine=None, **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(np.asarray(data, np.float32), np.eye(4) if affine is None else affine, **options)
        nib.save(image, path)
        return path

    return save


@pytest.fixture
def labels():
    """`labels(path)`: the array of a NIfTI file."""
    return lambda path: np.asarray(nib.load(path).dataobj)


@pytest.fixture
def small():
    """`small(seed)`: an image of noise."""
    return lambda seed=0: np.random.default_rng(seed).normal(size=(10, 9, 8))
