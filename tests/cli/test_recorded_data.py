"""A run keeps to the plan, the orientation and the lists of cases that it began with, whatever the files say later."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import yaml

from bestiary.shared.core.train import load_run

SHAPE = (16, 18, 6)  # x, y, z
LEVELS = [[1, 1, 1], [1, 2, 2]]


def write(root, cases, shift=0, seed=0, affine=(1.0, 1.0, 3.0)):
    rng = np.random.default_rng(seed)
    for number, case in enumerate(cases):
        label = np.zeros(SHAPE, np.uint8)
        label[2 : 7 + number % 3, 4:12, 1:5] = 1
        image = (rng.normal(20 + shift, 10, SHAPE) + 60 * label).round().astype(np.int16)
        for kind, array, end in (("imagesTr", image, "_0000"), ("labelsTr", label, "")):
            (root / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([*affine, 1.0])), root / kind / f"{case}{end}.nii.gz")
    labels = {"background": 0, "block": 1}
    values = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": len(cases), "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(values))
    return root


def plan(spacing, mean):
    network = {
        "spacing": spacing,
        "patch_size": [4, 16, 16],
        "median_shape": [6, 18, 16],
        "batch_size": 2,
        "strides": LEVELS,
        "kernel_sizes": [[3, 3, 3]] * 2,
        "features": [4, 8],
        "convs": [1, 1],
        "decoder_convs": [1],
        "residual": False,
        "batch_dice": False,
    }
    scheme = {"scheme": "ct", "lower": 0.0, "upper": 150.0, "mean": mean, "std": 30.0}
    values = {"format": 1, "axes": "RAS", "channel_names": ["CT"], "normalization": [scheme]}
    return yaml.safe_dump({**values, "configurations": {"3d_fullres": network}})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return {"BESTIARY_DATA": str(tmp_path_factory.mktemp("home"))}


@pytest.fixture(scope="module")
def trained(tool, home, tmp_path_factory):
    """The data set, a run of fold 0 on it, and the command of that run."""
    root = write(tmp_path_factory.mktemp("raw") / "Set", [f"c{i}" for i in range(6)])
    (root / "bestiary_plan.yaml").write_text(plan([3.0, 1.0, 1.0], 80.0))
    run = tmp_path_factory.mktemp("runs") / "run"
    command = ["+project=asm_unet", "dataset=nnunet_folder", f"dataset.root={root}", "dataset.plan=auto"]
    command += ["dataset.patch_size=null", "backbone=none", "encoder.features=[4,8]", "encoder.convs_per_stage=1"]
    command += ["model.network.decoder_convs=1", "model.mirror_tta=false", "recipe.steps=2", "recipe.batch_size=2"]
    command += ["recipe.num_workers=0", "recipe.evaluations.volume.protocol.hd95=false", f"paths.run_dir={run}"]
    job = tool("train", *command, env=home)
    assert job.returncode == 0, job.stdout + job.stderr
    return root, run, command


@pytest.fixture
def own(trained, tmp_path):
    """A run of one's own, on a data set that is put back afterwards."""
    root, run, command = trained
    kept = shutil.copytree(root, tmp_path / "kept")
    copy = shutil.copytree(run, tmp_path / "run")
    yield root, copy, [text for text in command if not text.startswith("paths.")]
    shutil.rmtree(root)
    shutil.copytree(kept, root)


def replan(root):
    """Another plan, another fold 0, and a case more."""
    (root / "bestiary_plan.yaml").write_text(plan([1.5, 2.0, 2.0], 10.0))
    folds = [{"train": ["c1", "c2"], "val": ["c0", "c3"]}] * 5
    (root / "splits_final.json").write_text(json.dumps(folds))
    for kind, end in (("imagesTr", "_0000"), ("labelsTr", "")):
        shutil.copy(root / kind / f"c0{end}.nii.gz", root / kind / f"c9{end}.nii.gz")


def test_it_is_scored_as_it_was_trained_whatever_the_files_say_now(tool, home, own):
    root, run, _ = own
    file = run / "stages" / "train" / "eval_val.json"
    assert tool("eval_model", f"checkpoint={run}", "split=val", env=home).returncode == 0
    before = json.loads(file.read_text())
    replan(root)
    job = tool("eval_model", f"checkpoint={run}", "split=val", env=home)
    assert job.returncode == 0, job.stderr
    assert json.loads(file.read_text()) == before
    (root / "bestiary_plan.yaml").unlink()  # it is not needed any more
    _, source, _, _ = load_run(str(run), [])
    assert source.spacing == (3.0, 1.0, 1.0)
    assert source.normalization()[0]["mean"] == 80.0
    assert "c9" not in {case for part in ("train", "val", "test") for case in source.case_ids(part)}


def test_it_does_not_go_on_with_other_data(tool, home, own, short):
    root, run, command = own
    (run / "result.json").unlink()  # as if it had been stopped before its last line
    before = (run / "data.json").read_bytes()
    replan(root)
    job = tool("train", *command, f"paths.run_dir={run}", env=home)
    short(
        job, "cannot go on", "init_from", "spacing: [3.0, 1.0, 1.0] -> [1.5, 2.0, 2.0]", "cases.val.c0: None", lines=11
    )
    assert not (run / "result.json").exists()
    assert (run / "data.json").read_bytes() == before


def test_it_goes_on_with_the_same_data(tool, home, own):
    _, run, command = own
    done = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    job = tool("train", *command, f"paths.run_dir={run}", env=home)
    assert job.returncode == 0, job.stderr
    assert json.loads((run / "result.json").read_text())["metrics"] == done["metrics"]


def test_another_folder_is_prepared_as_the_model_was_trained(own, tmp_path):
    _, run, _ = own
    other = write(tmp_path / "Ext", [f"c{i}" for i in range(5)], shift=300, seed=9, affine=(-1.0, 2.0, 4.0))
    for stored in (True, False):  # a run that recorded nothing has the model to go by
        if not stored:
            (run / "data.json").unlink()
        model, source, _, _ = load_run(str(run), [f"dataset.root={other}", "dataset.cache_mb=1"])
        assert source.axes() == model.axes() == "RAS"
        assert source.spacing == (3.0, 1.0, 1.0)
        scheme = source.normalization()[0]
        assert (scheme["mean"], scheme["upper"]) == (80.0, 150.0)
        image = source.case("c0").image
        assert image.max() == pytest.approx((150 - 80) / 30, abs=0.5)
        assert image.shape[1:] == (8, 36, 16)
        assert set(source.case_ids("val")) <= {f"c{i}" for i in range(5)}
        # The stored config asks for a plan.
        (other / "bestiary_plan.yaml").write_text(plan([1.5, 2.0, 2.0], 10.0))


def test_what_it_was_trained_on_is_not_scored(tool, home, own, short, tmp_path):
    root, run, _ = own
    copy = shutil.copytree(root, tmp_path / "elsewhere")
    folder = run / "stages" / "train"
    for options in (["dataset.fold=1"], [f"dataset.root={copy}", "dataset.fold=1"]):
        job = tool("eval_model", f"checkpoint={run}", "split=val", *options, env=home)
        short(job, "were trained on by", str(run))
    # Another folder's cases of the same names are other cases, and their numbers are not the run's own.
    other = write(tmp_path / "Ext", [f"c{i}" for i in range(6)], shift=5, seed=9)
    job = tool("eval_model", f"checkpoint={run}", "split=val", f"dataset.root={other}", "dataset.fold=1", env=home)
    assert job.returncode == 0, job.stderr
    assert not (folder / "eval_val.json").exists()
    (file,) = folder.glob("eval_val_root=*Ext_fold=1.json")
    assert "val/dice/mean" in json.loads(file.read_text())


def test_the_same_files_elsewhere_are_the_same_data(own, tmp_path):
    root, run, _ = own
    copy = shutil.copytree(root, tmp_path / "elsewhere")
    replan(copy)
    _, source, _, _ = load_run(str(run), [f"dataset.root={copy}"])
    stored = json.loads((run / "data.json").read_text())["cases"]
    assert {part: list(cases) for part, cases in stored.items()} == source.splits


def test_how_images_are_prepared_is_not_changed_where_they_are_scored(tool, home, trained, short):
    _, run, _ = trained
    job = tool("eval_model", f"checkpoint={run}", "dataset.spacing=[1,1,1]", env=home)
    short(job, "dataset.spacing", "leave it out", lines=1)
