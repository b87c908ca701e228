"""A small folder in nnU-Net's raw layout: two channels, two classes, six cases of 3 mm slices."""

import json

import nibabel as nib
import numpy as np
import pytest

SHAPE = (20, 18, 9)  # x, y, z


def save(path, array, affine=None):
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 3.0, 1.0]) if affine is None else affine), path)


@pytest.fixture
def write():
    """Write one volume."""
    return save


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`folder()` writes the set and returns its path."""
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path / "data"))
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{name}", raising=False)

    def make(name="Dataset007_Tiny", cases=6, channels=("CT", "T2"), empty_edge=0):
        root = tmp_path / name
        for part in ("imagesTr", "labelsTr"):
            (root / part).mkdir(parents=True)
        rng = np.random.default_rng(0)
        for number in range(cases):
            label = np.zeros(SHAPE, np.uint8)
            label[3:9, 3:9, 2:6] = 1
            label[11:16, 11:16, 2 : 4 + number % 3] = 2
            for channel in range(len(channels)):
                image = (rng.normal(60, 15, SHAPE) + 30 * label).round().astype(np.int16)
                if empty_edge:
                    image[:empty_edge] = 0
                save(root / "imagesTr" / f"c{number}_{channel:04d}.nii.gz", image)
            save(root / "labelsTr" / f"c{number}.nii.gz", label)
        description = {
            "channel_names": {str(i): name for i, name in enumerate(channels)},
            "labels": {"background": 0, "liver": 1, "spleen": 2},
            "numTraining": cases,
            "file_ending": ".nii.gz",
        }
        (root / "dataset.json").write_text(json.dumps(description))
        return root

    return make
