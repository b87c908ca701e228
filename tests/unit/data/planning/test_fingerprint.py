"""Fingerprints against numpy on the voxels themselves."""

import nibabel as nib
import numpy as np
import pytest

from bestiary.shared.data.nnunet_folder import NnUNetFolder
from bestiary.shared.data.planning.cases import CaseFiles, examine
from bestiary.shared.data.planning.check import check_folder
from bestiary.shared.data.planning.fingerprint import fingerprint, normalizations
from bestiary.shared.data.planning.intensities import DISTINCT, Intensities, statistics


def of(root):
    report = check_folder(NnUNetFolder(root))
    return fingerprint(report.records, report.dims)


def test_statistics_are_those_of_equally_many_draws_from_each_case():
    rng = np.random.default_rng(0)
    few, many = rng.integers(-100, 300, 500), rng.integers(200, 900, 50_000)
    found = statistics([Intensities.of(few), Intensities.of(many)])
    draws = np.concatenate([np.repeat(few, 100), many])  # each case as often as the other
    assert found["mean"] == pytest.approx(draws.mean())
    assert found["std"] == pytest.approx(draws.std())
    assert (found["min"], found["max"]) == (draws.min(), draws.max())
    for key, percent in (("percentile_00_5", 0.5), ("median", 50), ("percentile_99_5", 99.5)):
        assert found[key] == pytest.approx(np.percentile(draws, percent), abs=1)


def test_many_distinct_values_are_kept_as_quantiles():
    voxels = np.random.default_rng(1).normal(5, 2, 3 * DISTINCT)
    kept = Intensities.of(voxels)
    assert len(kept.values) <= DISTINCT
    found = statistics([Intensities.from_arrays(*kept.to_arrays())])
    assert found["std"] == pytest.approx(voxels.std())
    assert (found["min"], found["max"]) == (voxels.min(), voxels.max())
    for key, percent in (("percentile_00_5", 0.5), ("median", 50), ("percentile_99_5", 99.5)):
        # A 50 000th of the voxels is 0.003 where the density is that of the 0.5 percentile.
        assert found[key] == pytest.approx(np.percentile(voxels, percent), abs=4e-3)


def test_a_fingerprint_of_files(folder):
    root = folder(empty_edge=4)
    found = of(root)
    assert found.axes == "RAS"
    assert set(found.spacings) == {(3.0, 1.0, 1.0)}
    assert set(found.shapes) == {(9, 18, 16)}  # z, y, x without the four empty columns
    assert found.kept == pytest.approx(0.8)
    voxels = []
    for case in range(6):
        image, label = (np.asarray(nib.load(root / p).dataobj) for p in (f"imagesTr/c{case}_0001.nii.gz",
                                                                       f"labelsTr/c{case}.nii.gz"))  # fmt: skip
        voxels.append(image[label > 0])
    assert found.foreground[1]["mean"] == pytest.approx(np.mean([v.mean() for v in voxels]))
    assert found.foreground[1]["max"] == max(v.max() for v in voxels)


def test_each_channel_has_its_normalisation(folder):
    whole = of(folder("a"))
    names = ["ct", "T2"]
    ct, other = normalizations(names, whole)
    assert ct == {
        "scheme": "ct",
        "lower": whole.foreground[0]["percentile_00_5"],
        "upper": whole.foreground[0]["percentile_99_5"],
        "mean": whole.foreground[0]["mean"],
        "std": whole.foreground[0]["std"],
    }
    assert other == {"scheme": "zscore_whole"}
    # More than a quarter is cut away: only what is not zero counts.
    assert normalizations(["MR", "noNorm"], of(folder("b", empty_edge=8))) == ({"scheme": "zscore"}, {"scheme": "none"})
    assert normalizations(["rescale_to_0_1"], whole) == ({"scheme": "minmax"},)


def test_mixed_orientations_are_brought_to_those_of_the_first_case(folder, write):
    root = folder()
    affine = np.array([[0, 0, 1.0, 0], [0, 1.0, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
    for part, names in (("imagesTr", ("c5_0000", "c5_0001")), ("labelsTr", ("c5",))):
        for name in names:
            old = np.asarray(nib.load(root / part / f"{name}.nii.gz").dataobj)
            write(root / part / f"{name}.nii.gz", old.transpose(2, 1, 0).copy(), affine)
    report = check_folder(NnUNetFolder(root))
    assert report.faults == []
    assert "orientations are mixed (RAS 5, SAR 1 cases)" in report.warnings[0][1]
    found = fingerprint(report.records, 3)
    assert set(found.spacings) == {(3.0, 1.0, 1.0)}
    assert set(found.shapes) == {(9, 18, 20)}


def test_flat_images_are_one_thick_slice(folder, write):
    root = folder(cases=3)
    for case in range(3):
        for name in (f"imagesTr/c{case}_0000", f"imagesTr/c{case}_0001", f"labelsTr/c{case}"):
            old = np.asarray(nib.load(root / f"{name}.nii.gz").dataobj)
            write(root / f"{name}.nii.gz", old[:, :, 3], np.diag([0.5, 0.7, 1, 1]))
    report = check_folder(NnUNetFolder(root))
    assert (report.dims, report.faults, report.warnings) == (2, [], [])
    found = fingerprint(report.records, report.dims)
    assert found.spacings[0] == pytest.approx((999 * 0.7, 0.7, 0.5))
    assert found.shapes[0] == (1, 18, 20)


def test_a_single_slice_is_kept_apart_in_2d_and_in_3d(folder, write):
    root = folder(cases=3)
    for path in root.rglob("*.nii.gz"):
        write(path, np.asarray(nib.load(path).dataobj)[:, :, 3:4].copy(), np.diag([0.5, 0.7, 1, 1]))
    images, label = tuple(sorted((root / "imagesTr").glob("c0_*"))), root / "labelsTr" / "c0.nii.gz"
    records = [examine(CaseFiles("c0", images, label, dims, 2)).record for dims in (2, 3)]
    assert [record and len(record.shape) for record in records] == [2, 3]
