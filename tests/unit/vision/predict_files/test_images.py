"""One image in, its label map out: orientation, spacing, header, and which models will do."""

import csv

import nibabel as nib
import numpy as np
import pytest
from torch import nn

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.data import preprocess as pre
from bestiary.shared.vision import predict_files as module


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA", "ARI", "LAS"])
@pytest.mark.parametrize("trained", ["RAS", "LPI", "SAR"])
def test_a_brain_gets_the_same_labels_however_it_lies(brain, tmp_path, codes, trained, make):
    data, affine = brain
    header = pre.Header(data.shape[::-1], (1.0,) * 3, affine[:, [2, 1, 0, 3]])
    # The truth comes from the model's definition, in the orientation that it was trained in.
    lying, _ = pre.reorient(np.ascontiguousarray(data.T), header, trained)
    step = np.diff(lying, axis=-1, append=0)  # a window is longer than the piece, which is padded with 0
    truth = np.where(np.abs(step) < 0.025, 0, np.where(step > 0, 1, 2))
    image = nib.Nifti1Image(data, affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(codes))
    )
    nib.save(image.as_reoriented(turn), tmp_path / "scan.nii.gz")
    written = make(trained).predict([tmp_path / "scan.nii.gz"], tmp_path / "out")
    found, given = nib.load(written[0]), nib.load(tmp_path / "scan.nii.gz")
    assert nib.aff2axcodes(found.affine) == tuple(codes)
    assert found.shape == given.shape
    np.testing.assert_allclose(found.affine, given.affine)
    back = np.asarray(nib.as_closest_canonical(found).dataobj).T
    again, _ = pre.reorient(np.ascontiguousarray(back), header, trained)
    clear = np.abs(np.abs(step) - 0.025) > 1e-4
    np.testing.assert_array_equal(again[clear], truth[clear])
    assert np.unique(truth).tolist() == [0, 1, 2]


def test_an_oblique_and_sheared_grid_keeps_its_affine(brain, tmp_path, make, write, labels):
    data, _ = brain
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0.1], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.9, 0.9, 2.5])
    affine[:3, 3] = [30, -20, 10]
    plain = labels(make("RAS").predict([write(tmp_path / "a.nii.gz", data[::-1])], tmp_path / "out")[0])
    written = make("RAS").predict([write(tmp_path / "b.nii.gz", data, affine)], tmp_path / "out")
    np.testing.assert_array_equal(labels(written[0])[::-1], plain)
    np.testing.assert_allclose(nib.load(written[0]).affine, affine, atol=1e-6)
    with open(tmp_path / "out" / "volumes.csv", newline="") as handle:
        rows = {(r["case"], r["class_name"]): r for r in csv.DictReader(handle)}
    voxel = abs(np.linalg.det(affine[:3, :3])) / 1000
    row = rows["b", "rising"]
    assert int(row["voxels"]) == (plain == 1).sum()
    assert float(row["volume_ml"]) == pytest.approx((plain == 1).sum() * voxel, rel=1e-5)


def test_resampled_to_the_training_grid_and_back_in_every_orientation(brain, tmp_path, make, write, labels):
    """Thick sagittal slices: the file's first axis is 3 mm, whichever way it lies."""
    data, _ = brain
    affine = np.diag([3.0, 1.0, 1.0, 1.0])
    one = labels(make("RAS", spacing=1.0).predict([write(tmp_path / "a.nii.gz", data, affine)], tmp_path / "out")[0])
    image = nib.load(tmp_path / "a.nii.gz")
    nib.save(image.as_reoriented(nib.orientations.axcodes2ornt(tuple("PSL"))), tmp_path / "b.nii.gz")
    found = nib.load(make("RAS", spacing=1.0).predict([tmp_path / "b.nii.gz"], tmp_path / "out")[0])
    np.testing.assert_array_equal(np.asarray(nib.as_closest_canonical(found).dataobj), one)


def test_the_header_of_the_input_is_taken_over(tmp_path, make):
    affine = np.diag([-2.0, 2, 2, 1])
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=(9, 8, 7, 1)), affine)
    image.set_qform(affine, code="scanner")
    image.set_sform(affine, code="mni")
    image.header.set_xyzt_units("mm")
    image.header["cal_max"] = 1000
    nib.save(image, tmp_path / "a.nii.gz")
    label = nib.load(make().predict([tmp_path / "a.nii.gz"], tmp_path / "out")[0])
    assert label.shape == (9, 8, 7)
    assert (int(label.header["qform_code"]), int(label.header["sform_code"])) == (1, 4)
    assert label.header.get_xyzt_units()[0] == "mm"
    assert float(label.header["cal_max"]) == 0
    assert label.get_data_dtype() == np.uint8


def test_two_dimensions_and_their_plane(tmp_path, make, write, labels):
    data = np.random.default_rng(0).normal(size=(20, 9))
    flipped = np.diag([-1.0, 1, 1, 1])
    model = make("RA", dims=2)
    plain = labels(model.predict([write(tmp_path / "a.nii.gz", data)], tmp_path / "out")[0])
    other = labels(model.predict([write(tmp_path / "b.nii.gz", data[::-1], flipped)], tmp_path / "out")[0])
    np.testing.assert_array_equal(other[::-1], plain)
    coronal = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    with pytest.raises(BadDataError, match=r"c\.nii\.gz.*RS.*another plane"):
        model.predict([write(tmp_path / "c.nii.gz", data, coronal)], tmp_path / "out")


def test_a_slice_stays_a_slice(tmp_path, make, write, small):
    """2D files of three axes, the last of one voxel: the label has the file's shape, place and thickness."""
    affine = np.diag([2.0, 2.0, 7.0, 1.0])
    affine[2, 3] = 30
    path = write(tmp_path / "a.nii.gz", small()[:, :, :1], affine)
    label = nib.load(make("RA", dims=2).predict([path], tmp_path / "out")[0])
    assert label.shape == (10, 9, 1)
    np.testing.assert_allclose(label.affine, affine)
    assert label.header.get_zooms() == (2, 2, 7)
    assert make("RA", dims=2).predict([path], tmp_path / "out") == []  # and it is known again


def test_anything_with_spec_schemes_and_infer_will_do(tmp_path, make, write, labels, small):
    """An ensemble, say: the mean of two models' logits."""

    class Mean(nn.Module):
        def __init__(self, models):
            super().__init__()
            self.models, self.spec = nn.ModuleList(models), models[0].spec

        def schemes(self):
            return self.models[0].schemes()

        def axes(self):
            return self.models[0].axes()

        def infer(self, image):
            return sum(model.infer(image) for model in self.models) / len(self.models)

    path = write(tmp_path / "a.nii.gz", small(), np.diag([-1.0, 1, 1, 1]))
    one = make().predict([path], tmp_path / "one")[0]
    many = module.predict_files(Mean([make(), make()]), [path], tmp_path / "many")[0]
    np.testing.assert_array_equal(labels(one), labels(many))
