"""Masks folder against folder."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
from omegaconf import OmegaConf

from bestiary.shared.core.config import conf_dir
from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.metrics.score_folders import pair_up, score_folders

SHAPE = (8, 7, 6)


def save(path, values, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, np.eye(4) if affine is None else affine), path)


def mask(**boxes):
    out = np.zeros(SHAPE, np.uint8)
    for value, (low, high) in boxes.items():
        out[low:high, 2:5, 2:5] = int(value[1:])
    return out


@pytest.fixture
def folders(tmp_path):
    """Two cases: class 1 predicted by half in the first; class 2 missing in both files of the second."""
    save(tmp_path / "labels" / "a.nii.gz", mask(v1=(0, 4), v2=(5, 7)))
    save(tmp_path / "labels" / "b.nii.gz", mask(v1=(0, 4)))
    save(tmp_path / "masks" / "a_seg.nii.gz", mask(v1=(0, 2), v2=(5, 7)))
    save(tmp_path / "masks" / "b.nii.gz", mask(v1=(0, 4)))
    return tmp_path


def options(root, **changes):
    values = OmegaConf.load(conf_dir() / "score.yaml")
    given = {"predictions": str(root / "masks"), "labels": str(root / "labels"), **changes}
    return OmegaConf.merge(values, given)


def test_scores_by_hand(folders, capsys):
    found = score_folders(options(folders, classes="liver,spleen"))
    # a: 2 * 18 / (18 + 36) = 2/3; b: 1. Class 2: 1 in a, in neither file of b.
    assert found["dice/liver"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["dice/spleen"] == pytest.approx(1)
    # The farthest surface of a lies 2 voxels off for more than 5 % of the surface.
    assert found["hd95/liver"] == pytest.approx(1)
    assert "2 cases, empty_rule nnunet" in capsys.readouterr().out
    rows = list(csv.DictReader((folders / "masks" / "scores.csv").open()))
    assert [(row["case"], row["class"]) for row in rows] == [
        ("a", "liver"),
        ("a", "spleen"),
        ("b", "liver"),
        ("b", "spleen"),
    ]
    assert float(rows[0]["dice"]) == pytest.approx(2 / 3)
    assert rows[3]["dice"] == "nan"
    stored = json.loads((folders / "masks" / "scores.json").read_text())
    assert stored["metrics"] == found
    assert stored["protocol"]["empty_rule"] == "nnunet"
    other = score_folders(options(folders, classes="liver,spleen", empty_rule="transunet", hd95="false", nsd="false"))
    assert other["dice/spleen"] == pytest.approx(0.5)  # absent from both is 0 by that rule
    assert "hd95/liver" not in other


def test_names_come_from_dataset_json(folders):
    description = {"labels": {"background": 0, "liver": 1, "spleen": 2}}
    (folders / "dataset.json").write_text(json.dumps(description))
    out = str(folders / "out")
    assert set(score_folders(options(folders, hd95="false", nsd="false", out=out))) == {
        "dice/liver", "dice/spleen", "dice/mean"}  # fmt: skip
    assert (folders / "out" / "scores.csv").is_file()
    assert score_folders(options(folders, classes="[spleen]"))["dice/mean"] == pytest.approx(1)
    with pytest.raises(ConfigError, match="lung"):
        score_folders(options(folders, classes="lung"))
    (folders / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "all": [1, 2]}}))
    with pytest.raises(BadDataError, match=r"dataset\.json"):
        score_folders(options(folders))


def describe(folder, *names):
    (folder / "dataset.json").write_text(json.dumps({"labels": {name: value for value, name in enumerate(names)}}))


def test_predictions_that_number_their_classes_otherwise_are_joined_by_name(folders, capsys):
    """The masks are the references' own, in another order of the classes and without one of them."""
    fast = {"hd95": "false", "nsd": "false"}
    describe(folders, "background", "liver", "spleen")
    describe(folders / "masks", "background", "spleen", "liver")
    save(folders / "masks" / "a_seg.nii.gz", mask(v2=(0, 4), v1=(5, 7)))
    save(folders / "masks" / "b.nii.gz", mask(v2=(0, 4)))
    assert score_folders(options(folders, **fast)) == {"dice/liver": 1, "dice/spleen": 1, "dice/mean": 1}
    assert score_folders(options(folders, classes="spleen", **fast)) == {"dice/spleen": 1, "dice/mean": 1}
    # A class that the references do not have is background in them, as is one that the model does not have.
    describe(folders / "masks", "background", "lung", "spleen")
    save(folders / "masks" / "a_seg.nii.gz", mask(v2=(5, 7), v1=(0, 1)))
    save(folders / "masks" / "b.nii.gz", mask())
    capsys.readouterr()
    assert score_folders(options(folders, **fast)) == {"dice/spleen": 1, "dice/mean": 1}
    assert "not scored, as the predictions do not have them: liver" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"classes=liver: must name one or more of lung, spleen of .*masks"):
        score_folders(options(folders, classes="liver", **fast))
    describe(folders / "masks", "background", "Leber")
    with pytest.raises(BadDataError, match=r"no name in common.*Leber"):
        score_folders(options(folders, **fast))


def test_named_predictions_against_values_without_names(folders):
    fast = {"hd95": "false", "nsd": "false"}
    describe(folders / "masks", "background", "spleen", "liver")
    save(folders / "masks" / "a_seg.nii.gz", mask(v2=(0, 4), v1=(5, 7)))
    save(folders / "masks" / "b.nii.gz", mask(v2=(0, 4)))
    with pytest.raises(ConfigError, match=r"labels: no dataset\.json .*dataset_json=FILE, or classes="):
        score_folders(options(folders, **fast))
    found = score_folders(options(folders, classes="liver,spleen", **fast))
    assert found == {"dice/liver": 1, "dice/spleen": 1, "dice/mean": 1}


def test_references_that_are_named_seg(tmp_path):
    for case in "ab":
        save(tmp_path / "labels" / f"{case}_seg.nii.gz", mask(v1=(0, 4)))
    save(tmp_path / "masks" / "a_seg.nii.gz", mask(v1=(0, 4)))
    save(tmp_path / "masks" / "b_seg_seg.nii.gz", mask(v1=(0, 2)))
    found = score_folders(options(tmp_path, hd95="false", nsd="false"))
    assert found["dice/1"] == pytest.approx((1 + 2 / 3) / 2)
    # Where a and a_seg are two references, each has the prediction of its own name.
    save(tmp_path / "labels" / "a.nii.gz", mask())
    save(tmp_path / "masks" / "a.nii.gz", mask())
    pairs, extra = pair_up(tmp_path / "masks", tmp_path / "labels")
    assert {case: found.name for case, (found, _) in pairs.items()} == {
        "a": "a.nii.gz", "a_seg": "a_seg.nii.gz", "b_seg": "b_seg_seg.nii.gz"}  # fmt: skip
    assert extra == []


@pytest.mark.parametrize("size", [0.04, 1.0, 5.0])
def test_grids_are_compared_in_voxels(tmp_path, size):
    """Fine grids differ where their affines are alike, and coarse ones are alike where a header was rounded."""
    save(tmp_path / "labels" / "a.nii.gz", mask(v1=(0, 4)), np.diag([size, size, size, 1]))
    fast = {"hd95": "false", "nsd": "false"}
    moved = np.diag([size, size, size, 1])
    moved[0, 3] = size / 10
    save(tmp_path / "masks" / "a.nii.gz", mask(v1=(0, 4)), moved)
    assert score_folders(options(tmp_path, **fast))["dice/1"] == 1
    moved[0, 3] = size / 2
    for wrong in (np.diag([size, size, 2 * size, 1]), np.diag([-size, size, size, 1]), moved):
        save(tmp_path / "masks" / "a.nii.gz", mask(v1=(0, 4)), wrong)
        with pytest.raises(BadDataError, match=r"(position|orientation) in the header|voxel size"):
            score_folders(options(tmp_path, **fast))


def test_a_missing_prediction_is_an_error(folders):
    (folders / "masks" / "b.nii.gz").unlink()
    save(folders / "masks" / "c.nii.gz", mask())
    with pytest.raises(MissingDataError, match=r"1 of 2 references have no prediction.*\n  b"):
        score_folders(options(folders))
    assert not (folders / "masks" / "scores.csv").exists()
    save(folders / "masks" / "b.nii.gz", mask())
    pairs, extra = pair_up(folders / "masks", folders / "labels")
    assert (sorted(pairs), extra) == (["a", "b"], ["c"])
    save(folders / "masks" / "a.nii.gz", mask())
    with pytest.raises(BadDataError, match=r"a\.nii\.gz and a_seg\.nii\.gz are both of case a"):
        score_folders(options(folders))
    with pytest.raises(MissingDataError, match="no such folder"):
        score_folders(options(folders, labels=str(folders / "nowhere")))


def test_every_case_that_does_not_fit_is_said(folders):
    save(folders / "masks" / "b.nii.gz", mask(v1=(0, 4)), np.diag([1, 1, 2, 1]))
    save(folders / "masks" / "a_seg.nii.gz", np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(BadDataError) as error:
        score_folders(options(folders, classes="liver,spleen"))
    text = str(error.value)
    assert text.startswith("2 of 2 cases")
    assert "a_seg.nii.gz: shape (3, 3, 3) differs" in text
    assert "masks/b.nii.gz: voxel size (2, 1, 1) mm differs from (1, 1, 1) mm of" in text
    save(folders / "masks" / "a_seg.nii.gz", mask(v7=(0, 2)))
    save(folders / "masks" / "b.nii.gz", np.full(SHAPE, 0.5, np.float32))
    with pytest.raises(BadDataError) as error:
        score_folders(options(folders, classes="liver,spleen"))
    assert "has the values 7, which are no class" in str(error.value)
    assert "no whole numbers" in str(error.value)


@pytest.mark.parametrize("changes", [{"empty_rule": "monai"}, {"hd95": "maybe"}, {"nsd_tolerance_mm": "wide"}])
def test_bad_options_are_said(folders, changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        score_folders(options(folders, **changes))
