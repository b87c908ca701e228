"""Every fault of a folder, in one report."""

import gzip
import json
import os

import numpy as np
import pytest

from bestiary.shared.core.errors import BadDataError, MissingDataError
from bestiary.shared.data.nnunet_folder import NnUNetFolder
from bestiary.shared.data.planning import cases
from bestiary.shared.data.planning.check import check_folder

SHAPE = (20, 18, 9)


def texts(found):
    return "\n".join(f"{kind}: {text}" for kind, text in found)


def test_a_good_folder_has_nothing_to_report(folder):
    report = check_folder(NnUNetFolder(folder()))
    assert (report.faults, report.warnings, report.cases, report.dims) == ([], [], 6, 3)
    assert sorted(report.records) == [f"c{i}" for i in range(6)]
    report.refuse()


def test_every_fault_is_in_one_report(folder, write):
    root = folder(cases=16)
    images, labels = root / "imagesTr", root / "labelsTr"
    (images / "c0_0001.nii.gz").unlink()
    (labels / "c1.nii.gz").unlink()
    write(images / "c2_0001.nii.gz", np.ones((5, 5, 5), np.float32))
    write(images / "c3_0001.nii.gz", np.ones(SHAPE, np.float32), np.diag([1, 1, 4, 1]))
    moved = np.diag([1.0, 1, 3, 1])
    moved[0, 3] = 7
    write(labels / "c4.nii.gz", np.ones(SHAPE, np.uint8), moved)
    write(labels / "c5.nii.gz", np.full(SHAPE, 7, np.uint8))
    write(labels / "c6.nii.gz", np.full(SHAPE, 0.5, np.float32))
    nan = np.ones(SHAPE, np.float32)
    nan[0, 0, 0] = np.nan
    write(images / "c7_0000.nii.gz", nan)
    whole = (images / "c8_0000.nii.gz").read_bytes()
    (images / "c8_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    write(images / "c9_0000.nii.gz", np.ones((*SHAPE, 3), np.float32))
    (images / "c10_0000.nii").write_bytes(gzip.decompress((images / "c10_0000.nii.gz").read_bytes()))
    (images / "c11_0000.nii.gz").unlink()
    (images / "c11_0000.nii.gz").mkdir()
    write(labels / "lonely.nii.gz", np.ones(SHAPE, np.uint8))
    (images / "c12_0000.nii.gz").unlink()
    write(images / "c13_0002.nii.gz", np.ones(SHAPE, np.float32))
    write(images / "unnumbered.nii.gz", np.ones(SHAPE, np.float32))
    turned = np.array([[0, 1.0, 0, 0], [-1, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    write(images / "c14_0001.nii.gz", np.ones(SHAPE, np.float32), turned)
    report = check_folder(NnUNetFolder(root))
    said = texts(report.faults)
    for kind, file, what in (
        ("pairs", "imagesTr/c0_0001.nii.gz", "is missing for case c0"),
        ("pairs", "labelsTr/c1.nii.gz", "is missing for case c1"),
        ("geometry", "imagesTr/c2_0001.nii.gz", "shape (5, 5, 5) differs from (9, 18, 20) of c2_0000"),
        ("geometry", "imagesTr/c3_0001.nii.gz", "voxel size (4, 1, 1) mm differs from (3, 1, 1) mm"),
        ("geometry", "labelsTr/c4.nii.gz", "position"),
        ("labels", "labelsTr/c5.nii.gz", "has the values 7; dataset.json allows 0 to 2"),
        ("labels", "labelsTr/c6.nii.gz", "no whole numbers (0.5)"),
        ("files", "imagesTr/c7_0000.nii.gz", "NaN"),
        ("files", "imagesTr/c8_0000.nii.gz", "cannot be read as NIfTI"),
        ("files", "imagesTr/c9_0000.nii.gz", "has 4 axes"),
        ("duplicates", "imagesTr/c10_0000", "is there as .nii and as .nii.gz"),
        ("files", "imagesTr/c11_0000.nii.gz", "is a folder"),
        ("pairs", "labelsTr/lonely.nii.gz", "label without an image"),
        ("pairs", "imagesTr/c12_0000.nii.gz", "is missing: the case has channel 0001 alone"),
        ("pairs", "imagesTr/c13_0002.nii.gz", "dataset.json names 2 channels"),
        ("pairs", "imagesTr/unnumbered.nii.gz", "is not named <case>_0000.nii.gz"),
        ("geometry", "imagesTr/c14_0001.nii.gz", "orientation"),
    ):
        assert any(k == kind and t.startswith(str(root / file)) and what in t for k, t in report.faults), (file, said)
    # c12 is not listed, and its label is then one without an image: no other case is at fault, c15 is fine.
    assert "c15" not in said
    assert "c15" in report.records
    with pytest.raises(BadDataError, match=rf"{len(report.faults)} errors") as error:
        report.refuse()
    assert "nothing was written" in str(error.value)
    assert f"{root}{os.sep}" not in str(error.value).replace(f"{root}:", "")


def test_what_may_be_meant_so_is_a_warning(folder, write):
    root = folder()
    write(root / "labelsTr" / "c0.nii.gz", np.zeros(SHAPE, np.uint8))
    write(root / "labelsTr" / "c1.nii.gz", np.ones(SHAPE, np.uint8))
    far, thin = np.diag([1, 1, 30, 1]), np.diag([1.0, 1, 3, 1])
    for channel in range(2):
        write(root / "imagesTr" / f"c2_{channel:04d}.nii.gz", np.full(SHAPE, 5, np.int16), far)
        write(root / "imagesTr" / f"c3_{channel:04d}.nii.gz", np.arange(360, dtype=np.int16).reshape(20, 18, 1), thin)
    write(
        root / "labelsTr" / "c2.nii.gz", np.eye(20, 18, dtype=np.uint8)[..., None] * np.ones((1, 1, 9), np.uint8), far
    )
    write(root / "labelsTr" / "c3.nii.gz", np.eye(20, 18, dtype=np.uint8)[..., None], thin)
    (root / "labelsTr" / "notes.txt").write_text("hello")
    (root / "imagesTr" / ".DS_Store").write_text("")
    report = check_folder(NnUNetFolder(root))
    assert report.faults == []
    said = texts(report.warnings)
    for what in ("c0.nii.gz: is empty", "c1.nii.gz: has no background", "voxels of (30, 1, 1) mm",
                 "every voxel has the value 5", "is a single slice (1, 18, 20)", "notes.txt: is not read"):  # fmt: skip
        assert what in said
    assert "DS_Store" not in said


def test_empty_labels_everywhere_are_an_error(folder, write):
    root = folder(cases=2)
    for case in ("c0", "c1"):
        write(root / "labelsTr" / f"{case}.nii.gz", np.zeros(SHAPE, np.uint8))
    assert "every label is empty" in texts(check_folder(NnUNetFolder(root)).faults)


def test_a_bad_description_does_not_hide_the_rest(folder, write):
    root = folder()
    values = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps({**values, "labels": {"background": 0, "all": [1, 2]}}))
    write(root / "labelsTr" / "c2.nii.gz", np.full(SHAPE, -1, np.int16))
    said = texts(check_folder(NnUNetFolder(root)).faults)
    assert "region-based labels are not read" in said
    assert "c2.nii.gz: has the values -1" in said
    (root / "dataset.json").write_text(json.dumps({**values, "numTraining": 9}))
    assert "numTraining is 9, and there are 6" in texts(check_folder(NnUNetFolder(root)).warnings)
    with pytest.raises(MissingDataError, match=r"dataset\.root"):
        check_folder(NnUNetFolder(root / "nowhere"))


def test_test_images_are_checked_too(folder, write):
    root = folder()
    (root / "imagesTs").mkdir()
    write(root / "imagesTs" / "t0_0000.nii.gz", np.ones(SHAPE, np.float32))
    report = check_folder(NnUNetFolder(root))
    assert "imagesTs/t0_0001.nii.gz: is missing" in texts(report.faults)
    assert "t0" not in report.records


def test_a_label_that_lies_otherwise_is_turned_and_said(folder, write):
    root = folder()
    values = np.zeros(SHAPE, np.uint8)
    values[3:9, 3:9, 2:6] = 1
    flipped = np.diag([-1.0, 1, 3, 1])
    flipped[0, 3] = 19
    write(root / "labelsTr" / "c0.nii.gz", values[::-1].copy(), flipped)
    report = check_folder(NnUNetFolder(root))
    assert report.faults == []
    assert "lies as LAS, its image as RAS" in texts(report.warnings)
    image = np.asarray(__import__("nibabel").load(root / "imagesTr" / "c0_0000.nii.gz").dataobj)
    assert report.records["c0"].foreground[0].mean == pytest.approx(image[values > 0].mean())


def test_what_was_read_is_not_read_again(folder, monkeypatch):
    root = folder()
    first = check_folder(NnUNetFolder(root))
    read = []
    monkeypatch.setattr(
        cases, "_read", lambda path, case, out, real=cases._read: read.append(case.id) or real(path, case, out)
    )
    os.utime(root / "labelsTr" / "c3.nii.gz", (1, 1))
    second = check_folder(NnUNetFolder(root))
    assert set(read) == {"c3"}
    for case, record in first.records.items():
        again = second.records[case]
        assert (again.shape, again.spacing, again.axes, again.kept) == (
            record.shape, record.spacing, record.axes, record.kept)  # fmt: skip
        np.testing.assert_array_equal(again.foreground[1].values, record.foreground[1].values)
        assert again.foreground[0].mean == record.foreground[0].mean


@pytest.mark.slow
def test_processes_report_the_same(folder):
    root = folder()
    (root / "imagesTr" / "c0_0001.nii.gz").unlink()
    assert check_folder(NnUNetFolder(root), workers=2).faults == check_folder(NnUNetFolder(root)).faults
