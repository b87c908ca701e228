import nibabel as nib
import numpy as np
import pytest
import torch

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.data import preprocess as pre

AFFINE = np.array([[-0.5, 0, 0, 10], [0, 0.6, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1.0]])


def test_volumes_are_read_zyx_and_labels_written_back(tmp_path):
    data = np.arange(24).reshape(2, 3, 4).astype(np.int16)
    nib.save(nib.Nifti1Image(data, AFFINE), tmp_path / "a.nii.gz")
    array, header = pre.read_volume(tmp_path / "a.nii.gz")
    assert array.shape == header.shape == (4, 3, 2)
    assert header.spacing == pytest.approx((3.0, 0.6, 0.5))
    assert array[3, 1, 0] == data[0, 1, 3]
    np.testing.assert_allclose(header.affine @ [3, 1, 0, 1], AFFINE @ [0, 1, 3, 1])
    pre.write_label(tmp_path / "b.nii.gz", array.astype(np.int64), header)
    back = nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(np.asarray(back.dataobj), data)
    np.testing.assert_allclose(back.affine, AFFINE, atol=1e-6)


def test_two_dimensional_files(tmp_path):
    nib.save(nib.Nifti1Image(np.ones((2, 3, 1), np.float32), np.eye(4)), tmp_path / "a.nii")
    array, header = pre.read_volume(tmp_path / "a.nii", 2)
    assert array.shape == (3, 2)
    pre.write_label(tmp_path / "b.nii", array.astype(np.int64), header)
    assert nib.load(tmp_path / "b.nii").shape == (2, 3)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(MissingDataError, match="none"):
        pre.read_volume(tmp_path / "none.nii")
    (tmp_path / "text.nii.gz").write_text("hello")
    with pytest.raises(BadDataError, match="text"):
        pre.read_volume(tmp_path / "text.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 2), np.float32), np.eye(4)), tmp_path / "four.nii")
    with pytest.raises(BadDataError, match="4 axes"):
        pre.read_header(tmp_path / "four.nii")
    nib.save(nib.Nifti1Image(np.full((2, 2, 2), np.nan, np.float32), np.eye(4)), tmp_path / "nan.nii")
    with pytest.raises(BadDataError, match="NaN"):
        pre.read_volume(tmp_path / "nan.nii")
    noise = np.random.default_rng(0).normal(size=(30, 30, 30))
    nib.save(nib.Nifti1Image(noise, np.eye(4)), tmp_path / "cut.nii.gz")
    whole = (tmp_path / "cut.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadDataError, match="cut"):
        pre.read_volume(tmp_path / "cut.nii.gz")


def test_normalisation():
    out = pre.normalize(np.array([0.0, 1.0, 3.0]), pre.ZSCORE)
    np.testing.assert_allclose(out, [0, -1, 1])
    ct = {"scheme": "ct", "lower": -10, "upper": 10, "mean": 2, "std": 4}
    np.testing.assert_allclose(pre.normalize(np.array([-50.0, 6.0, 50.0]), ct), [-3, 1, 2])
    np.testing.assert_array_equal(pre.normalize(np.zeros(3), pre.ZSCORE), np.zeros(3))
    with pytest.raises(ConfigError):
        pre.normalize(np.zeros(3), {"scheme": "ct", "mean": 1})


def test_resampling_keeps_the_field_of_view():
    ramp = np.broadcast_to(np.arange(16.0)[:, None, None], (16, 4, 4))[None]
    half = pre.resample_image(ramp, (8, 4, 4))
    assert half.shape == (1, 8, 4, 4)
    np.testing.assert_allclose(half[0, 2:-2, 0, 0], np.arange(8)[2:-2] * 2 + 0.5, atol=0.05)
    label = (np.arange(16) >= 8).astype(np.int16)[:, None, None] * np.ones((1, 4, 4), np.int16) * 5
    fine = pre.resample_label(label, (32, 4, 4))
    assert sorted(np.unique(fine)) == [0, 5]
    assert (fine == 5).sum() == 16 * 16
    assert fine.dtype == np.int16


def test_thick_slices_are_repeated_and_not_blended():
    assert pre.coarse_axis((5.0, 1.0, 1.0)) == 0
    assert pre.coarse_axis((3.0, 1.0, 1.0)) is None
    image = np.random.default_rng(0).normal(size=(1, 3, 4, 4))
    out = pre.resample_image(image, (6, 4, 4), coarse_axis=0)
    np.testing.assert_allclose(out[0, 0], image[0, 0], atol=1e-6)
    np.testing.assert_allclose(out[0, 1], image[0, 0], atol=1e-6)


def test_shapes_and_tolerance():
    assert pre.target_shape((10, 10), (1.0, 2.0), (2.0, 1.0)) == (5, 20)
    assert not pre.needs_resampling((1.0, 1.009), (1.0, 1.0))
    assert pre.needs_resampling((1.0, 1.02), (1.0, 1.0))
    assert not pre.needs_resampling((3.0, 1.0), (0.0, 0.0))


def test_argmax_on_another_grid_equals_interpolating_all_at_once():
    logits = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.interpolate(logits[None], size=(8, 7, 6), mode="trilinear")[0].argmax(0)
    assert torch.equal(pre.resampled_argmax(logits, (8, 7, 6)), want)
    assert torch.equal(pre.resampled_argmax(logits, (4, 5, 6)), logits.argmax(0))


@pytest.mark.parametrize("dtype", [np.complex64, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])])
def test_voxels_that_are_no_real_numbers_are_refused_by_name(tmp_path, dtype):
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), dtype), AFFINE), tmp_path / "a.nii.gz")
    with pytest.raises(BadDataError, match="complex or colour"):
        pre.read_volume(tmp_path / "a.nii.gz")


CODES = ["RAS", "LPS", "PIR", "SLA", "ARI", "IPR"]


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("affine", [AFFINE, AFFINE[:, [1, 2, 0, 3]]])
def test_reorienting_is_nibabels(codes, affine):
    import nibabel.orientations as orient

    image = nib.Nifti1Image(np.arange(24.0).reshape(2, 3, 4), affine)
    turn = orient.ornt_transform(orient.io_orientation(affine), orient.axcodes2ornt(tuple(codes)))
    want = image.as_reoriented(turn)
    header = pre.Header((4, 3, 2), tuple(float(z) for z in image.header.get_zooms()[::-1]), affine[:, [2, 1, 0, 3]])
    array = np.asarray(image.dataobj).T
    found, placed = pre.reorient(array, header, codes)
    np.testing.assert_array_equal(found, np.asarray(want.dataobj).T)
    np.testing.assert_allclose(placed.affine[:, [2, 1, 0, 3]], want.affine)
    assert placed.spacing == pytest.approx(tuple(want.header.get_zooms()[::-1]))
    assert pre.axis_codes(placed) == codes
    back, again = pre.reorient(found, placed, pre.axis_codes(header))
    np.testing.assert_array_equal(back, array)
    np.testing.assert_allclose(again.affine, header.affine)
    channels, _ = pre.reorient(np.stack([array, -array]), header, codes)
    np.testing.assert_array_equal(channels[1], -found)


def test_codes_of_another_space_are_refused():
    header = pre.Header((4, 3, 2), (1.0, 1.0, 1.0), np.eye(4)[:, [2, 1, 0, 3]])
    for codes in ("RAR", "RA", "XYZ"):
        with pytest.raises(ConfigError, match="cannot be brought"):
            pre.reorient(np.zeros((4, 3, 2)), header, codes)


def test_an_affine_that_places_nothing_is_bad(tmp_path):
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.float32), np.eye(4))
    image.header["srow_y"] = 0
    image.header["sform_code"] = 2
    nib.save(nib.Nifti1Image(np.zeros((3, 4, 5), np.float32), None, image.header), tmp_path / "a.nii.gz")
    with pytest.raises(BadDataError, match=r"a\.nii\.gz.*affine"):
        pre.read_header(tmp_path / "a.nii.gz")


def test_the_whole_is_scaled_by_the_box_of_what_is_not_zero():
    image = np.zeros((4, 6), np.float32)
    image[1:3, 2:5] = [[1, 0, 5], [7, 9, 2]]  # a zero within counts
    found = pre.normalize(image, {"scheme": "zscore_whole"})
    box = image[1:3, 2:5]
    np.testing.assert_allclose(found, (image - box.mean()) / box.std(), rtol=1e-5)
    np.testing.assert_array_equal(pre.normalize(np.zeros((2, 2)), {"scheme": "zscore_whole"}), 0)


def test_to_zero_and_one():
    found = pre.normalize(np.array([[-3.0, 1.0], [5.0, -1.0]]), {"scheme": "minmax"})
    np.testing.assert_allclose(found, [[0, 0.5], [1, 0.25]])
    np.testing.assert_array_equal(pre.normalize(np.full((2, 2), 4.0), {"scheme": "minmax"}), 0)
    np.testing.assert_allclose(pre.normalize(np.array([[0.0, 255.0]]), pre.NAMED_CHANNELS["rgb_to_0_1"]), [[0, 1]])


def test_two_equally_coarse_axes_are_not_treated_apart():
    assert pre.coarse_axis((0.5, 2.0, 2.0)) is None
    assert pre.coarse_axis((2.0, 0.5, 2.5)) == 2


def test_a_target_of_nought_keeps_the_axis():
    assert pre.target_shape((10, 11, 12), (3, 1, 1), (0, 0.5, 2)) == (10, 22, 6)


def test_grids_are_compared_at_their_corners_in_voxels():
    affine = np.array([[0, 0, 0.5, 3], [0, 2.0, 0, -7], [4.0, 0, 0, 5], [0, 0, 0, 1]])
    one = pre.Header((20, 30, 101), (4.0, 2.0, 0.5), affine)
    wider, moved = affine.copy(), affine.copy()
    wider[0, 2] = 0.51  # after 100.5 voxels of 0.5 mm, at the last one's far face, 1.005 mm
    moved[1, 3] += 1
    assert pre.voxels_apart(pre.Header(one.shape, one.spacing, wider), one) == pytest.approx(2.01)
    assert pre.voxels_apart(pre.Header(one.shape, one.spacing, moved), one) == pytest.approx(0.5)
    assert pre.voxels_apart(one, one) == pytest.approx(0, abs=1e-9)
