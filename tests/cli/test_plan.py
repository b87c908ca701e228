"""From a folder to a plan, two folds, their ensemble and its masks, each step with its tool."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import yaml

SHAPE = (16, 18, 6)  # x, y, z
AFFINE = np.diag([1.0, 1.0, 3.0, 1.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("raw") / "Dataset005_Blocks"
    rng = np.random.default_rng(0)
    for part, count in (("Tr", 6), ("Ts", 2)):
        for number in range(count):
            label = np.zeros(SHAPE, np.uint8)
            label[2 : 7 + number % 3, 4:12, 1:5] = 1
            image = (rng.normal(20, 10, SHAPE) + 60 * label).round().astype(np.int16)
            for kind, array, end in (("images", image, "_0000"), ("labels", label, "")):
                (root / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(array, AFFINE), root / f"{kind}{part}" / f"{part}{number}{end}.nii.gz")
    labels = {"background": 0, "block": 1}
    values = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 6, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(values))
    return root


@pytest.fixture(scope="module")
def planned(tool, folder, tmp_path_factory):
    """The job, the plan that it wrote, and the environment of these tests."""
    env = {"BESTIARY_DATA": str(tmp_path_factory.mktemp("data")), "nnUNet_raw": str(folder.parent)}
    job = tool("plan", "dataset.root=5", "gpu_memory_gb=4", env=env)
    assert job.returncode == 0, job.stderr
    return job, folder / "bestiary_plan.yaml", env


def test_a_plan_is_made(planned, folder):
    job, file, _ = planned
    plan = yaml.safe_load(file.read_text())
    full = plan["configurations"]["3d_fullres"]
    assert full["spacing"] == [3.0, 1.0, 1.0]
    assert plan["made_with"]["gpu_memory_gb"] == 4
    assert plan["normalization"][0]["scheme"] == "ct"
    assert f"{folder}: 0 errors and 0 warnings in 6 cases" in job.stdout
    assert f"dataset.plan=auto recipe.batch_size={full['batch_size']}" in job.stdout


def test_a_bad_folder_gets_one_report_and_no_plan(tool, folder, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(folder, root)
    (root / "bestiary_plan.yaml").unlink(missing_ok=True)
    (root / "labelsTr" / "Tr1.nii.gz").unlink()
    (root / "imagesTr" / "Tr2_0000.nii.gz").write_bytes(b"no volume")
    nib.save(nib.Nifti1Image(np.full(SHAPE, 9, np.uint8), AFFINE), root / "labelsTr" / "Tr3.nii.gz")
    job = tool("plan", f"dataset.root={root}", env={"BESTIARY_DATA": str(tmp_path / "data")})
    assert job.returncode == 2
    assert "Traceback" not in job.stderr
    for words in ("3 errors and 0 warnings in 6 cases", "pairs (1)", "files (1)", "labels (1)", "labelsTr/Tr1.nii.gz",
                  "imagesTr/Tr2_0000.nii.gz", "has the values 9", "nothing was written"):  # fmt: skip
        assert words in job.stderr
    assert not (root / "bestiary_plan.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gpu_memory_gb=8"], ["dataset.root= is missing"]),
        (["dataset.root=/nowhere/x"], ["/nowhere/x: there is no such folder"]),
        (["dataset.root=ROOT", "planner=resenc"], ["there is no planner 'resenc'", "resenc_m"]),
        (["dataset.root=ROOT", "gpu_memory_gb=lots"], ["gpu_memory_gb is a number"]),
        (["dataset.root=ROOT", "gpu_memory_gb=0.0000001"], ["no patch fits"]),
        (["dataset.root=ROOT", "out=/nowhere/p.yaml"], ["there is no folder /nowhere"]),
        (["dataset.root=ROOT", "dataset.rot=1"], ["dataset.rot"]),
        (["dataset.root=ROOT", "min_bach=2"], ["did you mean 'min_batch'"]),
        (["dataset=icbm152"], ["needs no plan"]),
        (["dataset=nnunet"], ["there is no dataset 'nnunet'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_short_answers(tool, short, planned, folder, arguments, words):
    _, _, env = planned
    short(tool("plan", *[a.replace("ROOT", str(folder)) for a in arguments], env=env), *words)


def test_what_a_config_states_is_cleared_for_the_plan(tool, planned, folder, tmp_path):
    _, _, env = planned
    job = tool("plan", f"dataset.root={folder}", "dataset.spacing=[2,1,1]", f"out={tmp_path / 'p.yaml'}", env=env)
    assert job.returncode == 0, job.stderr
    assert f"dataset.plan={tmp_path / 'p.yaml'}" in job.stdout
    assert "dataset.spacing=null" in job.stdout
    assert "dataset.strides=null" not in job.stdout


@pytest.mark.slow
def test_folds_their_ensemble_and_its_masks(tool, short, planned, folder, tmp_path):
    _, _, env = planned
    small = ["encoder.features=[4,6,8]", "backbone=none", "recipe.num_workers=0", "recipe.batch_size=2", "debug=fast"]
    small += ["model.mirror_tta=false", "dataset.patch_size=null", f"dataset.root={folder}", "dataset.plan=auto"]
    levels = len(yaml.safe_load((folder / "bestiary_plan.yaml").read_text())["configurations"]["3d_fullres"]["strides"])
    small[0] = f"encoder.features={[4] * levels}"
    runs = [tmp_path / f"fold{fold}" for fold in range(2)]
    for fold, run in enumerate(runs):
        job = tool("train", "+project=asm_unet", "dataset=nnunet_folder", *small, f"dataset.fold={fold}",
                   f"paths.run_dir={run}", env=env)  # fmt: skip
        assert job.returncode == 0, job.stderr
    together = f"checkpoint=[{runs[0]},{runs[1]}]"
    job = tool("eval_model", together, "split=test", env=env)
    assert job.returncode == 0, job.stderr
    assert "test/dice/block" in job.stdout
    stored = json.loads(next(runs[0].glob("stages/*/eval_test_ensemble_of_2.json")).read_text())
    assert len(stored["members"]) == 2
    # Fold 0's val cases are training cases of fold 1.
    short(tool("eval_model", together, "split=val", env=env), "were trained on by", "split=test")
    out = tmp_path / "masks"
    job = tool("predict", together, f"inputs={folder / 'imagesTs'}", f"out={out}", env=env)
    assert job.returncode == 0, job.stderr
    job = tool("eval_model", f"predictions={out}", f"labels={folder / 'labelsTs'}", env=env)
    assert job.returncode == 0, job.stderr
    assert "2 cases, empty_rule nnunet" in job.stdout
    # The same masks, the same scores as the evaluation of the ensemble itself.
    scored = json.loads((out / "scores.json").read_text())["metrics"]
    assert scored["dice/block"] == pytest.approx(stored["test/dice/block"], abs=0.02)
    (out / "Ts0_seg.nii.gz").unlink()
    short(tool("eval_model", f"predictions={out}", f"labels={folder / 'labelsTs'}"), "have no prediction", "Ts0")
