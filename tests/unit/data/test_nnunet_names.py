"""nnU-Net's environment variables, its names of data sets, and its folds."""

import json

import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.data.nnunet_folder import NnUNetFolder
from bestiary.shared.data.nnunet_paths import explain_missing, resolve_root
from bestiary.shared.data.splits import k_fold, load_fold

# splits_final.json as nnunetv2 2.8.1 writes it (generate_crossval_split, seed 12345): its five val lists.
NNUNET_FOLDS = [
    ["case000", "case003", "case008"],
    ["case007", "case010", "case011"],
    ["case006", "case009"],
    ["case001", "case004"],
    ["case002", "case005"],
]


@pytest.fixture
def raw(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    for name in ("Dataset027_ACDC", "Dataset003_Liver", "Dataset030_A", "Dataset030_B", "notes"):
        (tmp_path / "raw" / name).mkdir(parents=True)
    return tmp_path / "raw"


@pytest.mark.parametrize("root", ["Dataset027_ACDC", "27", 27, "027"])
def test_a_name_or_number_is_found(raw, root):
    assert resolve_root(root) == raw / "Dataset027_ACDC"
    assert NnUNetFolder(root).root == raw / "Dataset027_ACDC"


def test_a_path_is_a_path(raw, tmp_path, monkeypatch):
    assert resolve_root(tmp_path / "27") == tmp_path / "27"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "27").mkdir()
    assert str(resolve_root("27")) == "27"  # what is there comes first


def test_what_is_not_there_or_not_one_is_said(raw, monkeypatch):
    with pytest.raises(ConfigError, match="Dataset030_A and Dataset030_B"):
        resolve_root(30)
    with pytest.raises(MissingDataError, match="Dataset003_Liver, Dataset027_ACDC, Dataset030_A"):
        NnUNetFolder(99).check()
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(MissingDataError, match="nnUNet_raw is not set"):
        NnUNetFolder("Dataset027_ACDC").check()
    assert explain_missing(raw / "somewhere") == ""


def test_the_folds_are_nnunets():
    ids = [f"case{i:03d}" for i in range(12)]
    found = [k_fold(list(reversed(ids)), fold, 5, 12345) for fold in range(5)]
    assert [part["val"] for part in found] == NNUNET_FOLDS
    for part in found:
        assert sorted(part["train"] + part["val"]) == ids
        assert part["test"] == []


def folder_with(root, cases):
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for case in cases:
        (root / "imagesTr" / f"{case}_0000.nii.gz").write_text("")
    description = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(description))


def test_stored_folds_come_first(raw):
    cases = [f"c{i}" for i in range(6)]
    root = raw / "Dataset027_ACDC"
    folder_with(root, cases)
    preprocessed = raw.parent / "preprocessed" / "Dataset027_ACDC"
    preprocessed.mkdir(parents=True)
    stored = [{"train": cases[1:], "val": cases[:1]}, {"train": cases[:4], "val": cases[4:]}]
    (preprocessed / "splits_final.json").write_text(json.dumps(stored))
    assert NnUNetFolder(27, fold=1).case_ids("val") == ["c4", "c5"]
    (root / "splits_final.json").write_text(json.dumps(stored[::-1]))
    assert NnUNetFolder(27, fold=1).case_ids("val") == ["c0"]
    with pytest.raises(ConfigError, match=r"splits_final\.json: has the folds 0 to 1, and no fold 4"):
        NnUNetFolder(27, fold=4).case_ids("val")
    # Other folds than nnU-Net's are made, not looked up.
    assert len(NnUNetFolder(27, folds=3).case_ids("val")) == 2
    (root / "splits_final.json").write_text(json.dumps([{"train": ["c1", "gone"], "val": []}]))
    with pytest.raises(MissingDataError, match=r"splits_final\.json names 1 cases that are not in imagesTr: gone"):
        NnUNetFolder(27).case_ids("train")


@pytest.mark.parametrize("text", ["{", "[1]", '[{"train": ["a"]}]', '[{"train": ["a"], "val": ["a"]}]',
                                  '[{"train": [], "val": ["a"]}]'])  # fmt: skip
def test_bad_folds_are_said(tmp_path, text):
    file = tmp_path / "splits_final.json"
    file.write_text(text)
    with pytest.raises(BadDataError, match=r"splits_final\.json"):
        load_fold(file, 0)


def test_the_middle_sizes_without_a_plan(raw):
    root = raw / "Dataset003_Liver"
    folder_with(root, ["c0"])
    spec = NnUNetFolder(root).spec()
    assert (spec.patch_size, len(spec.strides), spec.spacing) == ((64, 64, 64), 5, (0.0, 0.0, 0.0))
    assert NnUNetFolder(root, patch_size=(8, 8, 8)).spec().strides == ()
    assert NnUNetFolder(root, patch_size=(32, 48)).spec().strides == ((1, 1), *[(2, 2)] * 4)
