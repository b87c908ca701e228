"""Segmentation on a GPU: nets and gradients are those of the CPU; a run trains, goes on, predicts and is analysed."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch

from bestiary.shared.core.checkpoint import Structure, build_model
from bestiary.shared.core.config import compose, resolved
from bestiary.shared.core.specs import DataSpec

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

STRIDES = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
SPEC = DataSpec("seg", ("T1",), 3, 1, 3, ("b", "x", "y"), (1, 1, 1), (16, 16, 16), STRIDES)
PLAN = ["encoder.features=[4,8,12]", "encoder.convs_per_stage=1", "backbone.min_channels=4"]
MIXERS = ["adaptive_scan", "raster", "bidirectional", "sliced", "cross_scan", "attention", "none"]
NETS = {
    **{name: [*PLAN, f"backbone={name}"] for name in MIXERS},
    "resenc": ["encoder=unet_residual", "encoder.features=[4,8,12]", "backbone=none"],
    "umamba_bot": ["model=umamba_bot", *PLAN[:2], "backbone=none"],
    "segmamba": [
        "model=segmamba",
        "backbone=none",
        "encoder=none",
        "model.network.features=[4,6,8,10]",
        "model.network.depths=[1,1,1,1]",
    ],
    "swin_unetr": ["model=swin_unetr", "backbone=none", "encoder=none", "model.network.depths=[1,1,1,1]"],
}


def outputs(model, image, autocast=False):
    """Logits of all heads and every parameter's gradient of their mean square."""
    model.zero_grad()
    with torch.autocast(image.device.type, torch.bfloat16, enabled=autocast):
        found = model.network(image)
    logits = list(found) if isinstance(found, (list, tuple)) else [found]
    sum(one.float().square().mean() for one in logits).backward()
    grads = {n: p.grad.float().cpu().clone() for n, p in model.named_parameters() if p.grad is not None}
    return [one.detach().float().cpu() for one in logits], grads


def apart(one, other):
    one, other = (torch.cat([x.flatten() for x in part]) for part in (one, other))
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("name", NETS)
def test_a_net_is_the_same_net_there(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    options = [o for o in NETS[name] if not (name == "none" and o.startswith("backbone."))]
    cfg, choices = compose(["+project=asm_unet", *options])
    values = resolved(cfg)
    parts = {part: values.get(part) or None for part in ("model", "encoder", "backbone")}
    torch.manual_seed(0)
    model = build_model(Structure("asm_unet", choices, options, SPEC.to_dict(), parts)).train()
    side = 32 if name in ("segmamba", "swin_unetr") else 16
    image = torch.randn(2, 1, side, side, side)
    want, want_grads = outputs(model, image)
    model = model.cuda()
    found, grads = outputs(model, image.cuda())
    assert len(found) == len(want)
    assert grads.keys() == want_grads.keys()
    assert apart(found, want) < 1e-3
    assert apart([grads[n] for n in grads], [want_grads[n] for n in grads]) < 1e-2
    rough, rough_grads = outputs(model, image.cuda(), autocast=True)
    assert apart(rough, want) < 0.2
    assert all(torch.isfinite(g).all() for g in rough_grads.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six volumes of bright and dark balls in noise."""
    root = tmp_path_factory.mktemp("balls")
    rng = np.random.default_rng(0)
    where = np.stack(np.meshgrid(*3 * [np.arange(20)], indexing="ij"), -1)
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir()
    for case in range(6):
        label = np.zeros((20, 20, 20), np.uint8)
        for structure in (1, 2):
            distance = np.linalg.norm(where - rng.uniform(5, 15, 3), axis=-1)
            label[distance < rng.uniform(3, 5)] = structure
        image = np.array([0.0, 2.0, -2.0])[label] + rng.normal(0, 0.5, label.shape)
        nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), root / "imagesTr" / f"b{case}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), root / "labelsTr" / f"b{case}.nii.gz")
    description = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "bright": 1, "dark": 2}}
    (root / "dataset.json").write_text(json.dumps({**description, "numTraining": 6, "file_ending": ".nii.gz"}))
    (root / "split.json").write_text(json.dumps({"train": [f"b{i}" for i in range(4)], "val": ["b4"], "test": ["b5"]}))
    return root


def arguments(folder, run, steps):
    return [
        "+project=asm_unet",
        "trainer=gpu",
        "dataset=nnunet_folder",
        f"dataset.root={folder}",
        f"dataset.split={folder / 'split.json'}",
        "dataset.patch_size=[16,16,16]",
        "dataset.strides=[[1,1,1],[2,2,2],[2,2,2]]",
        "dataset.kernel_sizes=[]",
        *PLAN,
        "model.mirror_tta=false",
        f"recipe.steps={steps}",
        "recipe.num_workers=0",
        "recipe.optimizer=adamw",
        "recipe.lr=5e-3",
        f"paths.run_dir={run}",
    ]


def said(job):
    assert job.returncode == 0, job.stdout + job.stderr
    return job.stdout


def test_a_run_trains_there_and_is_used_on_both(run_tool, folder, tmp_path):
    run = tmp_path / "run"
    assert "on the CPU" not in said(run_tool("train", *arguments(folder, run, 120), timeout=500))
    scores = json.loads((run / "result.json").read_text())["metrics"]
    assert scores["test/dice/mean"] > 0.7
    image = folder / "imagesTr" / "b5_0000.nii.gz"
    maps = {}
    for device in ("cuda", "cpu"):
        out = tmp_path / device
        said(run_tool("predict", f"checkpoint={run}", f"inputs={image}", f"out={out}", f"device={device}"))
        maps[device] = np.asarray(nib.load(next(out.glob("*_seg.nii.gz"))).dataobj)
    assert (maps["cuda"] == maps["cpu"]).mean() > 0.999
    orders = tmp_path / "orders"
    said(run_tool("analyse_orders", f"checkpoint={run}", f"out={orders}", "device=cuda"))
    rows = list(csv.DictReader(next(orders.glob("*_transplant.csv")).open()))
    assert [row["structure"] for row in rows] == ["bright", "dark"]


def test_a_run_that_is_killed_goes_on(run_tool, train_until, folder, tmp_path):
    from safetensors.torch import load_file

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    exact = ["trainer.precision=32-true", "callbacks.save_every_steps=2", "callbacks.log_every_steps=1"]
    train_until("train 5/8", *arguments(folder, broken, 8), *exact)
    for run in (whole, broken):
        said(run_tool("train", *arguments(folder, run, 8), *exact, timeout=300))
    one, other = (load_file(f / "stages" / "train" / "weights.safetensors") for f in (whole, broken))
    # Sums on the GPU run in any order: the same run twice, 0.001 apart. Samples in another order: 0.018.
    assert apart([one[n].float() for n in one], [other[n].float() for n in one]) < 5e-3
