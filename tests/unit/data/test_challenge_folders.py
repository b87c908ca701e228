"""Synapse and ACDC in each layout that they are found in, with real anatomy in the files."""

from collections import Counter

import nibabel as nib
import numpy as np
import pytest
import torch

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream
from bestiary.shared.data import preprocess as pre
from bestiary.shared.data.challenge_folders import ACDCFolder, SynapseFolder
from bestiary.shared.data.splits import load_split
from bestiary.shared.vision.segmentation import SegmentationModel

STREAM = Stream(seed=0, stage="train", global_batch=2)
ORGANS = (
    *("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta"),
    *("inferior vena cava", "portal and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland"),
)
EIGHT = ["aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach"]


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path, brain_pieces):
    """Statistics of these files are no business of the user's folder, which the template was read from before."""
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path / "home"))


def split_file(tmp_path, **lists):
    path = tmp_path / "split.yaml"
    path.write_text(str({k: v for k, v in lists.items()}))
    return str(path)


def synapse(root, split, **options):
    given = {
        "patch_size": (8, 16, 16),
        "split": split,
        "labels": {"background": 0, **{name: i for i, name in enumerate(ORGANS, start=1)}},
        "channel_names": ["CT"],
        "file_ending": ".nii.gz",
    }
    return SynapseFolder(root, **{**given, **options})


def acdc(root, **options):
    given = {
        "patch_size": (4, 16, 16),
        "labels": {"background": 0, "RV": 1, "Myo": 2, "LV": 3},
        "channel_names": ["cineMRI"],
        "file_ending": ".nii.gz",
    }
    return ACDCFolder(root, **{**given, **options})


@pytest.mark.parametrize("layout", ["download", "training", "img", "flat", "nnunet"])
def test_synapse_reads_the_same_from_every_layout(challenge_tree, tmp_path, layout):
    root = challenge_tree(tmp_path / "set", "synapse", layout, [1, 5, 40])
    data = synapse(root, split_file(tmp_path, train=["img0005", "img0040"], test=["img0001"]), classes=EIGHT)
    data.check()
    assert data.case_ids("test") == ["img0001"]
    assert data.spec().class_names == ("background", *EIGHT)
    image, label = nib.load(data.images_of("img0001")[0]), nib.load(data.label_of("img0001"))
    volume = data.case("img0001")
    values = np.asarray(label.dataobj).T
    for number, name in enumerate(EIGHT, start=1):
        np.testing.assert_array_equal(volume.label == number, values == 1 + ORGANS.index(name))
    (scheme,) = data.normalization()
    hu = np.clip(np.asarray(image.dataobj).T, scheme["lower"], scheme["upper"])
    np.testing.assert_allclose(volume.image[0], (hu - scheme["mean"]) / scheme["std"], atol=1e-4)
    assert volume.spacing == (2.0, 1.0, 1.0)
    example = data.train_example(1, STREAM)
    assert example["image"].shape == (1, 8, 16, 16)
    assert synapse(root, None, folds=3).spec().num_classes == 14
    assert synapse(root, None, folds=3).revision == data.revision


def test_the_window_scales_to_0_and_1_and_travels_with_the_weights(challenge_tree, tmp_path):
    root = challenge_tree(tmp_path / "set", "synapse", "download", [1, 2])
    data = synapse(root, split_file(tmp_path, train=["img0001"], test=["img0002"]), intensity="hu_window")
    hu = np.asarray(nib.load(data.images_of("img0002")[0]).dataobj).T
    assert hu.min() < -125
    assert hu.max() > 275
    np.testing.assert_allclose(data.case("img0002").image[0], (np.clip(hu, -125, 275) + 125) / 400, atol=1e-6)
    spec = DataSpec("seg", ("CT",), 3, 1, 2, ("background", "x"), (0.0,) * 3, (8, 8, 8), ((1, 1, 1),))
    model, copy = (SegmentationModel(torch.nn.Conv3d(1, 2, 1), spec) for _ in range(2))
    model.adapt_to(data)
    copy.load_state_dict(model.state_dict())
    again = pre.normalize(hu, copy.schemes()[0])
    assert (again.min(), again.max()) == (0.0, 1.0)
    np.testing.assert_allclose(again, data.case("img0002").image[0], atol=1e-6)
    soft = synapse(root, None, folds=2, intensity="hu_window", hu_window=(0, 80))
    assert soft.case("img0002").image.max() == 1.0
    for wrong in ({"intensity": "hu"}, {"hu_window": (1, 0)}, {"hu_window": (1,)}):
        with pytest.raises(ConfigError):
            synapse(root, None, **wrong)


@pytest.mark.parametrize("layout", ["download", "training", "patients", "nnunet"])
def test_acdc_reads_the_same_from_every_layout(challenge_tree, tmp_path, layout):
    root = challenge_tree(tmp_path / "set", "acdc", layout, [1, 21, 90])
    data = acdc(root, split=split_file(tmp_path, train=["patient001", "patient090"], test=["patient021"]))
    data.check()
    assert data.case_ids("train") == [
        "patient001_frame01",
        "patient001_frame09",
        "patient090_frame01",
        "patient090_frame08",
    ]
    assert data.case_ids("test") == ["patient021_frame01", "patient021_frame09"]
    assert data.spec().class_names == ("background", "RV", "Myo", "LV")
    volume = data.case("patient021_frame09")
    image, label = nib.load(data.images_of(volume.id)[0]), nib.load(data.label_of(volume.id))
    np.testing.assert_array_equal(volume.label, np.asarray(label.dataobj).T)
    np.testing.assert_allclose(volume.image[0], pre.normalize(np.asarray(image.dataobj).T, pre.ZSCORE), atol=1e-5)
    known = {} if layout == "nnunet" else {"patient": "patient021", "phase": "ES", "group": "DCM"}
    assert {k: v for k, v in volume.meta.items() if k in ("patient", "phase", "group")} == known
    assert data.train_example(1, STREAM)["label"].shape == (1, 4, 16, 16)


def test_folds_of_acdc_are_by_patient_and_testing_is_the_test(challenge_tree, tmp_path):
    root = challenge_tree(tmp_path / "set", "acdc", "download", [1, 2, 3, 101])
    folds = [acdc(root, folds=3, fold=f) for f in range(3)]
    held = [{c.split("_")[0] for c in data.case_ids("val")} for data in folds]
    assert sorted(p for fold in held for p in fold) == ["patient001", "patient002", "patient003"]
    for data, patients in zip(folds, held, strict=True):
        assert not patients & {c.split("_")[0] for c in data.case_ids("train")}
        assert len(data.case_ids("val")) == 2
        assert data.case_ids("test") == ["patient101_frame01", "patient101_frame09"]
    # Labels of the test patients were secret for years.
    folds[0].label_of("patient101_frame09").unlink()
    assert acdc(root, folds=3).case_ids("test") == ["patient101_frame01"]


def test_a_patients_phases_stay_together(challenge_tree, tmp_path):
    root = challenge_tree(tmp_path / "set", "acdc", "download", [1, 2])
    apart = split_file(tmp_path, train=["patient001_frame01", "patient002"], test=["patient001_frame09"])
    with pytest.raises(BadDataError, match="patient001 is in train with one phase and in test"):
        acdc(root, split=apart).check()
    absent = split_file(tmp_path, train=["patient001"], test=["patient077"])
    with pytest.raises(MissingDataError, match=r"test names 1 patients.*patient077"):
        acdc(root, split=absent).check()


def damage(folder, fault):
    info = folder / "Info.cfg"
    if fault == "no info":
        info.unlink()
    elif fault == "no frame":
        info.write_text(info.read_text().replace("ES: 9", "ES: ?"))
    elif fault == "no label":
        (folder / "patient001_frame09_gt.nii.gz").unlink()
    elif fault == "other frame":
        info.write_text(info.read_text().replace("ES: 9", "ES: 12"))


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("no info", MissingDataError, r"patient001/Info\.cfg: is missing"),
        ("no frame", BadDataError, r"Info\.cfg: gives no frame number for ES"),
        ("no label", MissingDataError, r"patient001_frame09_gt\.nii\.gz: is missing"),
        ("other frame", MissingDataError, r"patient001_frame12\.nii\.gz: is missing"),
    ],
)
def test_what_is_missing_of_a_patient_is_named(challenge_tree, tmp_path, fault, error, words):
    root = challenge_tree(tmp_path / "set", "acdc", "download", [1, 2])
    damage(root / "training" / "patient001", fault)
    with pytest.raises(error, match=words):
        acdc(root, folds=2).check()


@pytest.mark.parametrize("make", [acdc, lambda root: synapse(root, None)])
def test_a_folder_of_something_else_says_both_layouts(tmp_path, make):
    (tmp_path / "other").mkdir()
    with pytest.raises(MissingDataError, match=r"holds neither the download .* nor nnU-Net's layout"):
        make(tmp_path / "other").check()
    with pytest.raises(MissingDataError, match="there is no such folder"):
        make(tmp_path / "nowhere").check()


def test_a_label_that_is_missing_is_named_as_the_download_names_it(challenge_tree, tmp_path):
    root = challenge_tree(tmp_path / "set", "synapse", "download", [1, 2])
    (root / "RawData/Training/label/label0002.nii.gz").unlink()
    with pytest.raises(MissingDataError, match=r"label0002\.nii\.gz: is missing for case img0002"):
        synapse(root, None, folds=2).check()


GROUPS = ("DCM", "HCM", "MINF", "NOR", "RV")


def test_the_two_splits_of_acdc():
    seventy, eighty = load_split("acdc_70_10_20"), load_split("acdc_80_20")
    everyone = {f"patient{i:03d}" for i in range(1, 101)}
    for split, sizes in ((seventy, (70, 10, 20)), (eighty, (80, 0, 20))):
        assert tuple(len(split[part]) for part in ("train", "val", "test")) == sizes
        assert {p for names in split.values() for p in names} == everyone
    assert seventy["test"] == eighty["test"]
    assert {*seventy["train"], *seventy["val"]} == set(eighty["train"])
    # What the files say of the groups.
    count = Counter(GROUPS[(int(p[-3:]) - 1) // 20] for p in seventy["test"])
    assert [count[g] for g in GROUPS] == [7, 1, 5, 3, 4]
    assert {GROUPS[(int(p[-3:]) - 1) // 20] for p in seventy["val"]} == {"RV"}
