"""tools/analyse_orders.py on a net of a few steps."""

import csv
import json

import nibabel
import numpy as np
import pytest

from bestiary.shared.data.assets import is_present

pytestmark = pytest.mark.skipif(
    not is_present("icbm152"), reason="the asset icbm152 is absent; get it with: python tools/fetch.py icbm152"
)
SMALL = [
    "+project=asm_unet",
    "debug=fast",
    "dataset.downsample=4",
    "dataset.patch_size=[8,8,8]",
    "dataset.strides=[[1,1,1],[2,2,2]]",
    "encoder.features=[4,8]",
    "recipe.evaluations.volume.protocol.hd95=false",
    "recipe.evaluations.volume.protocol.nsd=false",
]


def train(tool, folder, *more):
    done = tool("train", *SMALL, *more, f"paths.run_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def run(tool, tmp_path_factory):
    return train(tool, tmp_path_factory.mktemp("asm") / "run", "backbone.min_channels=4", "backbone.num_groups=2")


def test_maps_tables_and_pictures(tool, run, tmp_path):
    out = tmp_path / "out"
    job = tool("analyse_orders", f"checkpoint={run}", f"out={out}")
    assert job.returncode == 0, job.stderr
    assert "Dice with raster" in job.stdout
    names = {path.name for path in out.iterdir()}
    case = "icbm152_test"
    maps = {f"{case}_encoder1_group{g}.nii.gz" for g in (0, 1)}
    assert names == maps | {f"{case}_orders.png", f"{case}_transplant.csv", f"{case}_transplant.png", "orders.json"}
    volume = nibabel.load(out / f"{case}_encoder1_group0.nii.gz")
    values = volume.get_fdata()
    assert 0 <= values.min() < values.max() <= 1
    assert np.allclose(volume.header.get_zooms(), 4)
    rows = list(csv.DictReader((out / f"{case}_transplant.csv").open()))
    assert [row["structure"] for row in rows] == ["CSF", "GM", "WM"]
    summary = json.loads((out / "orders.json").read_text())[case]
    mean = np.mean([float(row["raster"]) for row in rows])
    assert summary["dice"]["raster"] == pytest.approx(mean, abs=1e-4)
    # what the run's own evaluation said
    own = json.loads((run / "result.json").read_text())["metrics"]["test/dice/mean"]
    assert summary["dice"]["its own"] == pytest.approx(own)


def test_a_named_donor(tool, run, tmp_path):
    jobs = [tool("analyse_orders", f"checkpoint={run}", f"out={tmp_path / d}", f"donor={d}") for d in ("train", "val")]
    assert [job.returncode for job in jobs] == [0, 0], jobs[0].stderr
    found = [json.loads((tmp_path / d / "orders.json").read_text())["icbm152_test"] for d in ("train", "val")]
    assert found[0]["rank_correlation"] != found[1]["rank_correlation"]
    assert found[0]["dice"]["raster"] == found[1]["dice"]["raster"]


def test_short_answers(tool, run, short, tmp_path):
    out = f"out={tmp_path / 'none'}"
    short(tool("analyse_orders", f"checkpoint={run}", "case=other", out), "case=other", "icbm152_test")
    short(tool("analyse_orders", f"checkpoint={run}", "donor=nobody", out), "donor=nobody")
    short(tool("analyse_orders", f"checkpoint={run}", "split=all", out), "train, val, test")
    plain = train(tool, tmp_path / "plain", "backbone=none")
    short(tool("analyse_orders", f"checkpoint={plain}", out), "no adaptive scan block")
