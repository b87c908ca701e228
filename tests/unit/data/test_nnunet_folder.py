import json

import nibabel as nib
import numpy as np
import pytest
import yaml

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.assets import manifest_path
from bestiary.shared.data.challenge_folders import SynapseFolder
from bestiary.shared.data.nnunet_folder import NnUNetFolder
from bestiary.shared.data.splits import k_fold, load_split, named_splits

CASES = [f"case{i}" for i in range(6)]
SHAPE = (12, 11, 10)  # x, y, z


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path / "data"))
    return write(tmp_path / "set")


def write(root, channels=("CT", "T2"), labels=None, cases=CASES, affine=None):
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    affine = np.diag([1, 1, 2, 1]) if affine is None else affine
    for case in cases:
        label = np.zeros(SHAPE, np.uint8)
        label[2:6, 2:6, 2:6] = 1
        label[7:9, 7:9, 7:9] = 2
        for c in range(len(channels)):
            image = rng.normal(100 * (c + 1), 10, SHAPE).astype(np.float32)
            nib.save(nib.Nifti1Image(image, affine), root / "imagesTr" / f"{case}_{c:04d}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), root / "labelsTr" / f"{case}.nii.gz")
    description = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": labels or {"background": 0, "liver": 1, "spleen": 2},
        "file_ending": ".nii.gz",
        "numTraining": len(cases),
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def source(root, **options):
    return NnUNetFolder(root, **{"patch_size": (8, 8, 8), "folds": 3, **options})


def test_spec_comes_from_the_description_alone(root):
    for file in (root / "imagesTr").iterdir():
        file.write_text("no volume")
    spec = source(root, spacing=(2, 1, 1), strides=[[1, 1, 1], [2, 2, 2]]).spec()
    assert spec.class_names == ("background", "liver", "spleen")
    assert spec.modalities == ("CT", "T2")
    assert (spec.in_channels, spec.num_classes, spec.spacing) == (2, 3, (2.0, 1.0, 1.0))


def test_a_good_folder_passes_and_gives_examples(root):
    data = source(root)
    assert isinstance(data, DataSource)
    data.check()
    example = data.train_example(3, Stream(0, "train", 4))
    assert example["image"].shape == (2, 8, 8, 8)
    whole = data.held_out("val")[0]
    assert whole["image"].shape == (2, 10, 11, 12)  # z, y, x
    assert whole["meta"]["spacing"] == (2.0, 1.0, 1.0)
    assert data.spec().spacing == (0.0, 0.0, 0.0)  # each file keeps its own grid, at prediction too
    assert whole["label"].unique().tolist() == [0, 1, 2]


def test_ct_is_clipped_and_scaled_by_the_training_foreground_and_the_rest_case_by_case(root, monkeypatch):
    data = source(root)
    ct, other = data.normalization()
    inside = []
    for case in data.case_ids("train"):
        label = np.asarray(nib.load(root / "labelsTr" / f"{case}.nii.gz").dataobj)
        inside.append(np.asarray(nib.load(root / "imagesTr" / f"{case}_0000.nii.gz").dataobj)[label > 0])
    values = np.concatenate(inside)
    assert ct["mean"] == pytest.approx(values.mean(), abs=0.5)
    assert ct["std"] == pytest.approx(values.std(), abs=0.5)
    assert ct["lower"] == pytest.approx(np.percentile(values, 0.5), abs=1.5)
    assert other == {"scheme": "zscore"}
    image = data.case("case0").image
    assert image[1].mean() == pytest.approx(0, abs=1e-4)
    assert image[0].min() == pytest.approx((ct["lower"] - ct["mean"]) / ct["std"], abs=1e-4)
    # The statistics are stored: another source does not read the volumes again.
    monkeypatch.setattr(NnUNetFolder, "_read_images", lambda *_: pytest.fail("read again"))
    assert source(root).normalization() == (ct, other)


def test_resampling_keeps_the_label_on_the_source_grid(root):
    data = source(root, spacing=(1.0, 1.0, 1.0))
    whole = data.held_out("val")[0]
    assert whole["image"].shape == (2, 20, 11, 12)
    assert whole["label"].shape == (1, 20, 11, 12)
    assert whole["meta"]["source_label"].shape == (1, 10, 11, 12)
    assert whole["meta"]["source_spacing"] == (2.0, 1.0, 1.0)
    assert data.case(data.case_ids("train")[0]).meta.keys() == {"file"}
    # A voxel's centre keeps its place: source slice 0 spans new slices 0 and 1.
    np.testing.assert_allclose(whole["affine"] @ [0.5, 0, 0, 1], [0, 0, 0, 1], atol=1e-6)


def test_a_case_that_lies_otherwise_is_brought_to_the_first_case(root):
    plain = source(root)
    first, *others = CASES
    want = {case: plain.case(case) for case in others}
    for case in others:
        for path in [*plain.images_of(case), plain.label_of(case)]:
            nib.save(nib.load(path).as_reoriented(nib.orientations.axcodes2ornt(tuple("PSL"))), path)
    # An image and its label need not lie alike, as long as they lie on each other.
    label = plain.label_of(others[0])
    nib.save(nib.load(label).as_reoriented(nib.orientations.axcodes2ornt(tuple("RIA"))), label)
    turned = source(root)
    turned.check()
    assert turned.axes() == "RAS"
    for case, volume in want.items():
        np.testing.assert_array_equal(turned.case(case).label, volume.label)
        np.testing.assert_allclose(turned.case(case).image, volume.image, atol=1e-5)
        np.testing.assert_allclose(turned.case(case).affine, volume.affine)
    # The first case decides, whatever it is and wherever the fold puts it.
    for path in [*plain.images_of(first), plain.label_of(first)]:
        nib.save(nib.load(path).as_reoriented(nib.orientations.axcodes2ornt(tuple("PSL"))), path)
    assert source(root).axes() != "RAS"


def test_classes_can_be_chosen_and_ordered(root):
    data = source(root, classes=["spleen"])
    assert data.spec().class_names == ("background", "spleen")
    assert (data.case("case0").label == 1).sum() == 8
    with pytest.raises(ConfigError, match="lung"):
        source(root, classes=["lung"]).spec()


def test_options_stand_in_for_the_description(root):
    (root / "dataset.json").unlink()
    with pytest.raises(MissingDataError, match=r"dataset\.json"):
        source(root).spec()
    labels = {"background": 0, "a": 1, "b": 2}
    data = source(root, labels=labels, channel_names=["T1", "T2"], file_ending=".nii.gz")
    data.check()
    assert data.spec().class_names == ("background", "a", "b")


def test_the_revision_follows_the_files(root):
    before = source(root).revision
    assert source(root).revision == before
    (root / "labelsTr" / "case0.nii.gz").unlink()
    assert source(root).revision != before


def test_folds_and_split_files(root, tmp_path):
    folds = [source(root, fold=f).case_ids("val") for f in range(3)]
    assert sorted(case for fold in folds for case in fold) == CASES
    assert set(folds[0]).isdisjoint(source(root).case_ids("train"))
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["case0"], "test": ["case1"]}))
    data = source(root, split=str(split))
    assert [data.case_ids(s) for s in ("train", "val", "test")] == [["case0"], [], ["case1"]]
    split.write_text(json.dumps({"train": ["case0"], "test": ["case9"]}))
    with pytest.raises(MissingDataError, match="case9"):
        source(root, split=str(split)).check()


def damage(root, fault):
    image, label = root / "imagesTr" / "case1_0001.nii.gz", root / "labelsTr" / "case1.nii.gz"
    if fault == "no image":
        image.unlink()
    elif fault == "no label":
        label.unlink()
    elif fault == "shape":
        nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.float32), np.diag([1, 1, 2, 1])), image)
    elif fault == "place":
        nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.float32), np.diag([1, 1, 3, 1])), image)
    elif fault == "damaged":
        image.write_bytes(image.read_bytes()[:20])
    elif fault == "json":
        (root / "dataset.json").write_text("{")


@pytest.mark.parametrize(
    ("fault", "error", "file"),
    [
        ("no image", MissingDataError, "case1_0001"),
        ("no label", MissingDataError, "case1.nii.gz"),
        ("shape", BadDataError, "case1_0001"),
        ("place", BadDataError, "case1_0001"),
        ("damaged", BadDataError, "case1_0001"),
        ("json", BadDataError, "dataset.json"),
    ],
)
def test_check_names_the_file_at_fault(root, fault, error, file):
    damage(root, fault)
    with pytest.raises(error, match=file):
        source(root).check()


def test_label_values_are_checked_when_a_case_is_read(root):
    path = root / "labelsTr" / "case2.nii.gz"
    nib.save(nib.Nifti1Image(np.full(SHAPE, 7, np.uint8), np.diag([1, 1, 2, 1])), path)
    with pytest.raises(BadDataError, match=r"case2\.nii\.gz.*7"):
        source(root).case("case2")


@pytest.mark.parametrize(
    "labels",
    [{"background": 0, "a": 2}, {"background": 0, "a": [1, 2]}],
)
def test_labels_that_cannot_be_read_are_said(tmp_path, labels):
    with pytest.raises(BadDataError, match="label"):
        source(write(tmp_path / "set", labels=labels)).spec()


def test_a_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(MissingDataError, match=r"dataset\.root"):
        source(tmp_path / "nowhere").check()
    with pytest.raises(MissingDataError, match="ask for it"):
        source(tmp_path / "nowhere", request="{root}: ask for it").check()


def read_config(name):
    values = yaml.safe_load((manifest_path().parent / "dataset" / f"{name}.yaml").read_text())
    values.pop("augment")
    values.pop("_target_")
    return values


def test_synapse_needs_no_data_for_its_spec_and_five_lines_without():
    values = read_config("synapse")
    values["root"] = "some/folder"
    data = SynapseFolder(**values)
    spec = data.spec()
    assert spec.num_classes == 9
    assert spec.class_names[1] == "aorta"
    assert len(spec.strides) == len(spec.kernel_sizes) == 6
    with pytest.raises(MissingDataError) as error:
        data.check()
    text = str(error.value)
    assert len(text.splitlines()) == 5
    assert "syn3193805" in text
    assert "some/folder/imagesTr" in text
    assert "some/folder/RawData/Training/img/img0001.nii.gz" in text
    assert "dataset=synapse" in text


def test_the_transunet_split_is_the_published_one():
    assert "synapse_transunet" in named_splits()
    split = load_split("synapse_transunet")
    assert (len(split["train"]), len(split["val"]), len(split["test"])) == (18, 0, 12)
    assert not set(split["train"]) & set(split["test"])
    assert "img0040" in split["train"]
    assert "img0038" in split["test"]


@pytest.mark.parametrize("text", ["{train: [a, b], test: [b]}", "{train: []}", "[1]", "{train: [a], dev: [b]}", "{"])
def test_bad_splits_are_said(tmp_path, text):
    file = tmp_path / "split.yaml"
    file.write_text(text)
    with pytest.raises(BadDataError, match=r"split\.yaml"):
        load_split(file)


def test_folds_are_the_same_everywhere():
    ids = [f"c{i}" for i in range(7)]
    assert k_fold(ids, 1, 5, 0) == k_fold(list(reversed(ids)), 1, 5, 0)
    with pytest.raises(ConfigError):
        k_fold(ids, 5, 5, 0)
    with pytest.raises(ConfigError):
        k_fold(ids[:2], 0, 5, 0)


def test_a_name_in_both_image_folders_is_refused_in_every_split(root, tmp_path):
    for kind, end in (("images", "_0000"), ("images", "_0001"), ("labels", "")):
        (root / f"{kind}Ts").mkdir(exist_ok=True)
        (root / f"{kind}Tr" / f"case1{end}.nii.gz").rename(tmp_path / "one")
        for part in ("Tr", "Ts"):
            (root / f"{kind}{part}" / f"case1{end}.nii.gz").write_bytes((tmp_path / "one").read_bytes())
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["case0"], "test": ["case1"]}))
    for options in ({}, {"split": str(split)}):
        with pytest.raises(BadDataError, match="case1: is a training case too"):
            source(root, **options).case_ids("test")
    split.write_text(json.dumps({"train": ["case0"], "test": ["case2"]}))
    assert source(root, split=str(split)).case_ids("test") == ["case2"]


def test_all_folds_have_one_orientation(root):
    for path in root.rglob("case0*.nii.gz"):
        nib.save(nib.load(path).as_reoriented(nib.orientations.axcodes2ornt(tuple("PSL"))), path)
    firsts = {source(root, fold=fold).case_ids("train")[0] for fold in range(3)}
    assert len(firsts) > 1
    lies = "".join(nib.aff2axcodes(nib.load(root / "labelsTr" / "case0.nii.gz").affine))
    assert lies != "RAS"
    assert {source(root, fold=fold).axes() for fold in range(3)} == {lies}


def test_grids_agree_by_voxels_and_not_by_millimetres(root):
    # 0.02 of voxels of 0.04 mm is half a voxel: which is less than a twentieth of a mm.
    fine = np.diag([0.04, 0.04, 0.08, 1])
    for path in root.rglob("*.nii.gz"):
        affine = fine.copy()
        affine[0, 3] = 0.02 if path.name == "case1_0001.nii.gz" else 0
        nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj), affine), path)
    with pytest.raises(BadDataError, match=r"case1_0001\.nii\.gz: position in the header"):
        source(root).check()


@pytest.mark.parametrize("fold", ["all", "0", None, True])
def test_a_fold_that_is_no_number_is_said(root, fold):
    with pytest.raises(ConfigError, match=r"dataset\.fold=.*dataset\.split=FILE"):
        source(root, fold=fold)


def test_one_axis_may_keep_its_spacing(root):
    data = source(root, spacing=(0, 2, 2))
    data.check()
    whole = data.held_out("val")[0]
    assert whole["image"].shape == (2, 10, 6, 6)
    assert whole["meta"]["spacing"] == (2.0, 2.0, 2.0)
