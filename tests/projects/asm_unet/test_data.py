import numpy as np
import pytest
import torch
import yaml

from bestiary.projects.asm_unet.data import CLASSES, ICBM152
from bestiary.shared.core.errors import ConfigError, MissingDataError
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.assets import is_present, manifest_path
from bestiary.shared.data.augment import Augment
from bestiary.shared.metrics.segmentation import VolumeProtocol

needs_asset = pytest.mark.skipif(
    not is_present("icbm152"), reason="the asset icbm152 is absent; get it with: python tools/fetch.py icbm152"
)
STREAM = Stream(seed=0, stage="train", global_batch=2)


def test_spec_and_revision_need_no_data(monkeypatch, tmp_path):
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path))
    source = ICBM152(downsample=2)
    assert isinstance(source, DataSource)
    assert source.spec().class_names == CLASSES
    assert source.spec().spacing == (2.0, 2.0, 2.0)
    assert source.revision != ICBM152().revision
    with pytest.raises(MissingDataError, match=r"python tools/fetch\.py icbm152$"):
        source.check()
    with pytest.raises(ConfigError):
        ICBM152(downsample=0)


def test_the_config_fits_the_class():
    values = yaml.safe_load((manifest_path().parent / "dataset" / "icbm152.yaml").read_text())
    assert values.pop("_target_") == f"{ICBM152.__module__}.ICBM152"
    augment = values.pop("augment")
    augment.pop("_target_")
    assert ICBM152(**values, augment=Augment(**augment)).spec().patch_size == (32, 32, 32)


@needs_asset
@pytest.mark.parametrize("downsample", [1, 4])
def test_no_held_out_voxel_nor_its_mirror_image_is_trained_on(downsample):
    source = ICBM152(downsample=downsample)
    arrays, affine = source._raw()
    shape = arrays["t1"].shape
    # The template is its own mirror image: that is why the other half cannot be used.
    assert np.array_equal(arrays["t1"], arrays["t1"][:, :, ::-1])

    def codes(voxels):
        return np.ravel_multi_index(tuple(voxels.T.astype(np.int64)), shape)

    parts = {part: source.positions(part).astype(np.int64) for part in ("train", "val", "test")}
    trained = np.zeros(np.prod(shape), bool)
    trained[codes(parts["train"])] = True
    for part in ("val", "test"):
        world = parts[part] @ affine[:3, :3].T + affine[:3, 3]
        assert (world[:, 0] < 0).all()
        mirrored = np.rint((world * [-1, 1, 1] - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T).astype(np.int64)
        assert not trained[codes(parts[part])].any()
        assert not trained[codes(mirrored)].any()
    assert not np.isin(codes(parts["val"]), codes(parts["test"])).any()


@needs_asset
def test_training_patches_hold_training_voxels_only(monkeypatch):
    source = ICBM152(augment=Augment(strength=0))
    arrays, _ = source._raw()
    # Each voxel carries its own y (from 1, as padding is 0), through the same cut that the image goes through.
    rows = np.broadcast_to(np.arange(1, arrays["t1"].shape[1] + 1)[None, :, None], arrays["t1"].shape)
    monkeypatch.setattr("bestiary.projects.asm_unet.data.normalize", lambda *_: rows.astype(np.float32))
    seen = {int(v) - 1 for k in range(60) for v in source.train_example(k, STREAM)["image"].unique() if v}
    held_out = {int(v) - 1 for part in ("val", "test") for v in source.held_out(part)[0]["image"].unique()}
    assert min(held_out) - max(seen) > 1
    assert seen == {int(v) for v in np.unique(source.positions("train")[:, 1])}


@needs_asset
def test_whole_parts_and_patches():
    source = ICBM152(downsample=2)
    source.check()
    test = source.held_out("test")[0]
    assert test["image"].shape[1:] == test["label"].shape[1:]
    assert test["label"].unique().tolist() == [0, 1, 2, 3]
    corner = test["affine"] @ [0, 0, 0, 1]
    assert corner[0] == pytest.approx(-97.5)
    assert source.axes() == "RAS"
    patch = source.train_example(1, STREAM)
    assert patch["image"].shape == (1, 32, 32, 32)
    assert patch["label"].any()
    assert torch.equal(patch["image"], ICBM152(downsample=2).train_example(1, STREAM)["image"])


@needs_asset
def test_intensity_alone_solves_it():
    scores = ICBM152().baselines(protocol=VolumeProtocol(CLASSES, hd95=False, nsd=False))["intensity lookup"]
    assert scores["dice/CSF"] == pytest.approx(0.867, abs=0.01)
    assert scores["dice/GM"] == pytest.approx(0.966, abs=0.01)
    assert scores["dice/WM"] == pytest.approx(0.890, abs=0.01)


@needs_asset
def test_baselines_have_the_keys_of_the_protocol():
    source = ICBM152(downsample=4)
    lookup = source.baselines()["intensity lookup"]
    protocol = VolumeProtocol(CLASSES)
    label = source.held_out("test")[0]["label"][0]
    assert set(lookup) == set(protocol.score([(label, label, source.spacing)], CLASSES))
