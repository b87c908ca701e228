"""A step on each medical data set, laid out with real anatomy; and tools/predict.py on folders, with such a run."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

SMALL = [
    "+project=asm_unet",
    "backbone=raster",
    "backbone.min_channels=4",
    "encoder.features=[4,8]",
    "encoder.convs_per_stage=1",
    "model.network.decoder_convs=1",
    "model.mirror_tta=false",
    "dataset.strides=[[1,1,1],[1,2,2]]",
    "dataset.kernel_sizes=[]",
    "recipe.steps=1",
    "recipe.batch_size=2",
    "recipe.num_workers=0",
    "recipe.evaluations.volume.protocol.hd95=false",
    "recipe.evaluations.volume.protocol.nsd=false",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory, brain_pieces):
    """Where bestiary keeps things in these tests: no asset is needed any more."""
    return {"BESTIARY_DATA": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="module")
def trained(tool, home, tmp_path_factory):
    def train(*arguments):
        folder = tmp_path_factory.mktemp("trained") / "run"
        job = tool("train", *SMALL, *arguments, f"paths.run_dir={folder}", env=home)
        assert job.returncode == 0, job.stdout + job.stderr
        return folder, job.stdout

    return train


def split(tmp_path, **lists):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(lists))
    return f"dataset.split={path}"


@pytest.mark.parametrize(
    ("options", "organs"),
    [(["dataset=synapse"], 8), (["dataset=synapse13", "dataset.intensity=hu_window"], 13)],
)
def test_synapse(trained, challenge_tree, tmp_path, options, organs):
    root = challenge_tree(tmp_path / "set", "synapse", "download", [1, 2, 3])
    cases = split(tmp_path, train=["img0001", "img0002"], test=["img0003"])
    options = [*options, f"dataset.root={root}", "dataset.patch_size=[8,16,16]", "dataset.spacing=[2,1,1]"]
    run, said = trained(*options, cases)
    structure = json.loads((run / "stages" / "train" / "structure.json").read_text())
    assert structure["spec"]["num_classes"] == organs + 1
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    scores = {k.split("/")[-1]: v for k, v in metrics.items() if "dice" in k}
    assert len(scores) == organs + 1
    eight = ["aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach"]
    np.testing.assert_allclose(scores["mean"], np.mean([scores[name] for name in eight]))
    assert "left kidney" in said


def test_acdc(trained, challenge_tree, tmp_path):
    root = challenge_tree(tmp_path / "set", "acdc", "download", [1, 2, 3])
    cases = split(tmp_path, train=["patient001", "patient002"], test=["patient003"])
    options = [f"dataset.root={root}", "dataset.patch_size=[4,16,16]", "dataset.spacing=[5,1,1]"]
    run, said = trained("dataset=acdc", *options, cases)
    assert "Myo" in said
    assert (run / "overlay.png").is_file()


def test_btms_takes_all_from_its_dataset_json(trained, brain_pieces, tmp_path):
    root, cases = tmp_path / "Dataset001_BTMS", ["a", "b", "c", "d", "e"]
    for case, (image, label, affine) in zip(cases, brain_pieces((20, 20, 12)), strict=False):
        for path, values in ((root / f"imagesTr/{case}_0000.nii.gz", image), (root / f"labelsTr/{case}.nii.gz", label)):
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values, affine), path)
    description = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "duct": 1, "cyst": 2, "liver": 3},
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    _, said = trained("dataset=btms", f"dataset.root={root}", "dataset.patch_size=[8,16,16]")
    assert "cyst" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("acdc", ["humanheart-project", "data/acdc/training/patient001/patient001_frame01.nii.gz", "Info.cfg"]),
        ("btms", ["private", "data/Dataset001_BTMS/dataset.json", "YqunYang/ASM-UNet"]),
        ("synapse13", ["synapse.org", "data/synapse/RawData/Training/img/img0001.nii.gz"]),
    ],
)
def test_what_is_not_there_is_said(tool, short, tmp_path, name, words):
    job = tool("train", "+project=asm_unet", f"dataset={name}", env={"BESTIARY_DATA": str(tmp_path)})
    assert "{root}" not in short(job, *words, lines=6)


# tools/predict.py on the run of a data set whose first case lies as LPI.


@pytest.fixture(scope="module")
def run(trained, challenge_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpi")
    root = challenge_tree(folder / "set", "acdc", "nnunet", [1, 2, 3])
    for path in root.rglob("*.nii.gz"):
        nib.save(nib.load(path).as_reoriented(nib.orientations.axcodes2ornt(tuple("LPI"))), path)
    cases = split(folder, train=["patient001", "patient002"], test=["patient003"])
    options = ["dataset.patch_size=[4,16,16]", "dataset.spacing=[5,1,1]", "recipe.steps=30", "recipe.optimizer=adamw"]
    done, _ = trained("dataset=acdc", f"dataset.root={root}", cases, *options, "recipe.lr=0.01")
    return done, root


def labels(path):
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj)


def test_a_folder_in_every_orientation(tool, run, tmp_path):
    checkpoint, root = run
    given = nib.load(root / "imagesTr" / "patient003_frame01_0000.nii.gz")
    names = {"LPI": "gedreht, links", "RAS": "вправо", "SAL": "c d"}
    (tmp_path / "in").mkdir()
    for codes, name in names.items():
        turn = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(given.affine), nib.orientations.axcodes2ornt(tuple(codes))
        )
        nib.save(given.as_reoriented(turn), tmp_path / "in" / f"{name}.nii.gz")
    (tmp_path / "in" / "bad.nii.gz").write_bytes(b"no volume")
    arguments = [f"checkpoint={checkpoint}", "inputs=in", "out=out, mine"]
    job = tool("predict", *arguments, cwd=tmp_path)
    assert job.returncode == 2
    assert "Traceback" not in job.stderr
    assert "1 of 4 images were not predicted" in job.stderr
    assert "bad.nii.gz: cannot be read as NIfTI" in job.stderr
    out = tmp_path / "out, mine"
    assert job.stdout.splitlines()[-1] == "out, mine/volumes.csv"
    found = {codes: out / f"{name}_seg.nii.gz" for codes, name in names.items()}
    for codes, path in found.items():
        assert nib.aff2axcodes(nib.load(path).affine) == tuple(codes)
        np.testing.assert_array_equal(labels(path), labels(found["LPI"]))
    assert len(np.unique(labels(found["LPI"]))) > 1
    with open(out / "volumes.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    counts = {r["class_name"]: int(r["voxels"]) for r in rows if r["case"] == names["SAL"]}
    assert counts == {n: int((labels(found["RAS"]) == c).sum()) for c, n in enumerate(("RV", "Myo", "LV"), start=1)}
    # Without the bad one the same command says that all is done, and so it does with overwrite: the model is the same.
    (tmp_path / "in" / "bad.nii.gz").unlink()
    again = tool("predict", *arguments, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, "")
    assert again.stderr.count("done before") == 3
    assert tool("predict", *arguments, "overwrite=true", cwd=tmp_path).stdout == ""
    for path in found.values():
        path.unlink()
    assert len(tool("predict", *arguments, cwd=tmp_path).stdout.splitlines()) == 6


def test_files_whose_names_hold_commas(tool, run, tmp_path):
    checkpoint, root = run
    for name in ("a,b.nii.gz", "c.nii.gz"):
        shutil.copy(root / "imagesTr" / "patient003_frame01_0000.nii.gz", tmp_path / name)
    job = tool("predict", f"checkpoint={checkpoint}", "inputs=a,b.nii.gz,c.nii.gz", "out=out", cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    assert sorted(p.name for p in (tmp_path / "out").glob("*_seg.nii.gz")) == ["a,b_seg.nii.gz", "c_seg.nii.gz"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inputs=series.nii.gz"], ["series.nii.gz: has 4 axes (4, 4, 4, 2), and 3 are needed"]),
        (["inputs=good.nii.gz", "out=good.nii.gz"], ["good.nii.gz: cannot be written (File exists)", "out="]),
        (["inputs=."], [".: is read and written at once"]),
        (["inputs=empty"], ["empty: holds no .nii.gz or .nii file"]),
        (["inputs=good.nii.gz", "overwrite=yes"], ["overwrite is true or false, not 'yes'"]),
        (["inputs=good.nii.gz", "question=x"], ["no argument 'question'"]),
    ],
)
def test_short_answers(tool, short, run, tmp_path, arguments, words):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.float32), np.eye(4)), tmp_path / "series.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), tmp_path / "good.nii.gz")
    (tmp_path / "empty").mkdir()
    out = [] if any(a.startswith("out=") for a in arguments) else ["out=."]
    short(tool("predict", f"checkpoint={run[0]}", *arguments, *out, cwd=tmp_path), *words, lines=1)
