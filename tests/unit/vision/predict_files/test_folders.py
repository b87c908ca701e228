"""Folders of images: their names, several channels, and what is wrong with some of them."""

import csv
import itertools
import json

import nibabel as nib
import numpy as np
import pytest

from bestiary.shared.core.errors import BadDataError, MissingDataError, UserError
from bestiary.shared.vision import predict_files as module
from bestiary.shared.vision.predict_files import PartlyPredicted


def test_a_folder_with_all_sorts_of_names(tmp_path, make, write, small):
    names = ["脑 扫描.nii.gz", "a,b.nii", "c d $x$.nii.gz", "snitt_åäö.nii.gz", "plain_0000.nii.gz"]
    for number, name in enumerate(names):
        write(tmp_path / "in" / name, small(number))
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / ".hidden.nii.gz").write_text("no image")
    lines = []
    written = module.predict_files(make(), [tmp_path / "in"], tmp_path / "deep" / "out", say=lines.append)
    stems = sorted(["脑 扫描", "a,b", "c d $x$", "snitt_åäö", "plain"])
    assert sorted(p.name for p in written if p.name.endswith("_seg.nii.gz")) == [f"{s}_seg.nii.gz" for s in stems]
    assert all((tmp_path / "deep" / "out" / f"{s}_overlay.png").stat().st_size > 1000 for s in stems)
    assert len(lines) == 5
    with open(tmp_path / "deep" / "out" / "volumes.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert {row["case"] for row in rows} == set(stems)
    assert len(rows) == 10
    # Nothing that was written aside is left.
    assert not [p for p in (tmp_path / "deep" / "out").iterdir() if p.name.startswith(".")]


def test_bad_files_cost_the_others_nothing(tmp_path, make, write, small):
    folder = tmp_path / "in"
    write(folder / "a.nii.gz", small())
    write(folder / "series.nii.gz", np.zeros((4, 4, 4, 5)))
    write(folder / "z.nii.gz", small(1))
    noise = write(folder / "cut.nii.gz", np.random.default_rng(0).normal(size=(30, 30, 30)))
    noise.write_bytes(noise.read_bytes()[: noise.stat().st_size // 2])
    lines = []
    with pytest.raises(PartlyPredicted) as error:
        module.predict_files(make(), [folder, tmp_path / "none.nii.gz"], tmp_path / "out", say=lines.append)
    text = str(error.value)
    assert "3 of 5 images were not predicted" in text
    for word in (
        "series.nii.gz: has 4 axes (4, 4, 4, 5), and 3 are needed",
        "cut short",
        "none.nii.gz: there is no such",
    ):
        assert word in text
    assert error.value.exit_code == 2
    assert [p.name for p in error.value.written] == [
        "a_seg.nii.gz",
        "a_overlay.png",
        "z_seg.nii.gz",
        "z_overlay.png",
        "volumes.csv",
    ]
    # What headers tell is said before the first image is predicted.
    assert [line.split(":")[0] for line in lines[:2]] == ["not predicted"] * 2
    # The bad one mended, the same call does what is left, and no more.
    write(folder / "cut.nii.gz", small(2))
    (folder / "series.nii.gz").unlink()
    lines.clear()
    again = module.predict_files(make(), [folder], tmp_path / "out", say=lines.append)
    assert [p.name for p in again] == ["cut_seg.nii.gz", "cut_overlay.png", "volumes.csv"]
    assert sum("done before" in line for line in lines) == 2


def test_one_bad_file_alone_is_its_own_error(tmp_path, make):
    with pytest.raises(MissingDataError, match=r"none\.nii"):
        make().predict([tmp_path / "none.nii"], tmp_path / "out")
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(BadDataError, match=r"a\.png.*NIfTI"):
        make().predict([tmp_path / "a.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_and_twice_the_same_name(tmp_path, make, write, small):
    good = write(tmp_path / "good.nii.gz", small())
    with pytest.raises(UserError, match="nothing"):
        make().predict([], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no \.nii"):
        make().predict([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(UserError, match="rename"):
        make().predict([good, write(tmp_path / "b" / "good.nii", small())], tmp_path / "out")
    with pytest.raises(UserError, match="another folder"):
        make().predict([tmp_path / "b"], tmp_path / "b")
    with pytest.raises(UserError, match=r"good\.nii\.gz/out: cannot be written \(Not a directory\).*out="):
        make().predict([good], good / "out")


def test_a_folder_of_several_channels(tmp_path, make, write, labels, small):
    for case, channel in itertools.product("ab", range(2)):
        write(tmp_path / "in" / f"{case}_{channel:04d}.nii.gz", small(channel))
    # A channel that lies otherwise is on the same grid all the same.
    image = nib.load(tmp_path / "in" / "b_0001.nii.gz")
    nib.save(image.as_reoriented(nib.orientations.axcodes2ornt(tuple("PSL"))), tmp_path / "in" / "b_0001.nii.gz")
    written = make(channels=2, axes="RAS").predict([tmp_path / "in"], tmp_path / "out")
    assert [p.name for p in written][::2] == ["a_seg.nii.gz", "b_seg.nii.gz", "volumes.csv"]
    np.testing.assert_array_equal(labels(written[0]), labels(written[2]))
    with pytest.raises(PartlyPredicted, match=r"a_0001\.nii\.gz lies beside it, and this model takes 1 channel"):
        make().predict([tmp_path / "in"], tmp_path / "one")
    (tmp_path / "in" / "b_0001.nii.gz").unlink()
    with pytest.raises(PartlyPredicted, match=r"b_0001\.nii\.gz: there is no such file"):
        make(channels=2).predict([tmp_path / "in"], tmp_path / "again")


def test_the_values_are_named_beside_the_labels(tmp_path, make, write, small):
    path = write(tmp_path / "a.nii.gz", small())
    make().predict([path], tmp_path / "out")
    named = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert named["labels"] == {"background": 0, "rising": 1, "falling": 2}
    make().predict([write(tmp_path / "b.nii.gz", small(1))], tmp_path / "out")
    other = make(classes=("background", "falling", "rising"))
    with pytest.raises(UserError, match=r"dataset\.json: names other values.*another out="):
        other.predict([write(tmp_path / "c.nii.gz", small(2))], tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "c_seg.nii.gz").exists()
