"""Colin27 and INIA19 cut into sides: what is labelled, what is held out, and what copying the other side scores."""

import numpy as np
import pytest
import torch
import yaml

from bestiary.projects.asm_unet.hemispheres import INIA19, Colin27, Hemispheres, block_majority
from bestiary.shared.core.errors import ConfigError, MissingDataError
from bestiary.shared.core.examples import IGNORE_INDEX
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.assets import asset_path, is_present, manifest_path
from bestiary.shared.data.augment import Augment
from bestiary.shared.data.preprocess import read_volume
from bestiary.shared.metrics.segmentation import VolumeProtocol

needs_asset = pytest.mark.skipif(
    not is_present("mricron_data"), reason="the asset is absent; get it with: python tools/fetch.py mricron_data"
)
BRAINS = [Colin27, INIA19]


class Answers(torch.nn.Module):
    """A model that gives the same class numbers for every image."""

    def __init__(self, labels, spec):
        super().__init__()
        self.labels, self.spec = labels, spec

    def infer(self, image):
        assert image.shape[1:] == self.labels.shape
        return self.labels


NET = {"patch_size": (16, 16, 16), "strides": ((1, 1, 1), (2, 2, 2))}


@pytest.mark.parametrize("brain", BRAINS)
def test_spec_and_revision_need_no_data(brain: type[Hemispheres], monkeypatch, tmp_path):
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path))
    source = brain(**NET, downsample=2)
    assert source.spec().num_classes == {Colin27: 55, INIA19: 135}[brain]
    assert source.spec().spacing == (2 * brain.voxel_mm,) * 3
    assert source.revision != brain(**NET).revision
    with pytest.raises(MissingDataError, match=r"python tools/fetch\.py mricron_data$"):
        source.check()
    with pytest.raises(ConfigError, match="downsample"):
        brain(**NET, downsample=0)


@pytest.mark.parametrize("brain", BRAINS)
def test_the_config_fits_the_class(brain: type[Hemispheres]):
    values = yaml.safe_load((manifest_path().parent / "dataset" / f"{brain.name}.yaml").read_text())
    assert values.pop("_target_") == f"{brain.__module__}.{brain.__name__}"
    augment = values.pop("augment")
    augment.pop("_target_")
    assert "mirror" not in augment["groups"]
    assert brain(**values, augment=Augment(**augment)).spec().patch_size == (32, 32, 24)


@needs_asset
def test_names_are_those_of_the_file():
    lines = (asset_path("mricron_data") / "aal.nii.txt").read_text().splitlines()
    named = {int(line.split()[0]): line.split()[1] for line in lines if len(line.split()) > 1}
    pairs = Colin27.structures()
    for (left, right), name in pairs.items():
        assert (named[left], named[right]) == (f"{name}_L", f"{name}_R")
    rest = set(named) - {value for pair in pairs for value in pair}
    assert len(rest) == 8
    assert all("Vermis" in named[value] for value in rest)


@needs_asset
def test_structures_are_those_of_200_voxels_on_both_sides():
    values = read_volume(asset_path("mricron_data") / INIA19.label_file)[0].astype(int)
    counts = np.bincount(values.ravel(), minlength=2000)
    large = [n for n in range(1, 1000) if counts[n] >= 200 and counts[n + 1000] >= 200]
    assert [left for left, _ in INIA19.structures()] == large
    assert len(large) == 134


@needs_asset
@pytest.mark.parametrize(("brain", "downsample"), [(Colin27, 1), (Colin27, 3), (INIA19, 1), (INIA19, 2)])
def test_no_held_out_voxel_is_trained_on(brain: type[Hemispheres], downsample):
    source = brain(**NET, downsample=downsample)
    full = {split: source.positions(split) for split in ("train", "val", "test")}
    assert full["train"][:, 2].max() <= brain.midline[0] < brain.midline[1] <= full["test"][:, 2].min()
    rows = {split: np.unique(voxels[:, 1]) for split, voxels in full.items()}
    # Between the two lie at least the margin and no row of either.
    assert np.abs(rows["train"][:, None] - rows["val"]).min() > brain.margin
    assert (rows["val"] >= brain.slab[0]).all()
    assert (rows["val"] < brain.slab[1]).all()
    train, val, test = (source.case(f"{source.name}_{split}") for split in ("train", "val", "test"))
    assert np.array_equal(train.image, val.image)  # seen, without labels
    for split, volume in (("train", train), ("val", val), ("test", test)):
        used = volume.label[volume.meta.get("region", ...)]
        assert len(full[split]) == (used != IGNORE_INDEX).sum() * downsample**3
    hidden = train.label == IGNORE_INDEX
    assert hidden[val.meta["region"]].all()
    assert np.array_equal(train.label[~hidden], val.label[~hidden])
    # Every structure can be learnt, and is tested.
    for volume in (train, test):
        assert len(set(np.unique(volume.label)) - {IGNORE_INDEX}) == len(source.class_names)
    # Only the slab is scored.
    answers = torch.from_numpy(np.where(hidden, val.label, 0).astype(np.int64))
    scores = VolumeProtocol(hd95=False, nsd=False, skip_undefined=True)(
        Answers(answers, source.spec()), [val.example()]
    )
    assert scores["dice/mean"] == 1


@needs_asset
@pytest.mark.parametrize("brain", BRAINS)
def test_the_tested_side_lies_like_the_learnt_one(brain: type[Hemispheres]):
    source = brain(**NET)
    test, train = source.case(f"{source.name}_test"), source.case(f"{source.name}_train")
    t1, label, affine = source._files
    # The affine leads back to the very voxel of the file, on the right side of the head.
    rng = np.random.default_rng(0)
    for index in rng.integers(0, test.label.shape, (50, 3)):
        world = test.affine[:3, :3] @ index + test.affine[:3, 3]
        z, y, x = np.rint(np.linalg.solve(affine[:3, :3], world - affine[:3, 3])).astype(int)
        assert label[z, y, x] == test.label[tuple(index)]
        assert (t1[z, y, x] == 0) == (test.image[(0, *index)] == 0)
        assert x > brain.midline[0]
    # Medial is at the same end: the column nearest the midline holds labels in both, the outermost hardly any.
    for case in (train, test):
        assert (case.label[..., -5:] > 0).mean() > 5 * (case.label[..., :5] > 0).mean()
    # Unmirrored, copying the left side scores next to nothing.
    dice = VolumeProtocol(hd95=False, nsd=False)
    flipped = source.mirrored_left()[0][..., ::-1].copy()
    assert dice.score([(flipped, test.label, test.spacing)], source.class_names)["dice/mean"] < 0.2


@needs_asset
@pytest.mark.parametrize(("brain", "dice", "r"), [(Colin27, 0.717, 0.816), (INIA19, 0.854, 0.962)])
def test_copying_the_other_side_scores(brain: type[Hemispheres], dice, r):
    source = brain(**NET)
    protocol = VolumeProtocol(hd95=False, nsd=False)
    assert source.baselines("test", protocol)["mirrored left side"]["dice/mean"] == pytest.approx(dice, abs=1e-3)
    assert source.mirrored_left()[1] == pytest.approx(r, abs=1e-3)
    assert source.baselines("val") == {}


@needs_asset
def test_training_patches():
    source = Colin27(**NET, downsample=3, augment=Augment(strength=0), oversample=1.0)
    stream = Stream(seed=0, stage="train", global_batch=2)
    examples = [source.train_example(k, stream) for k in range(8)]
    assert all(example["image"].shape == (1, 16, 16, 16) for example in examples)
    assert all((example["label"] > 0).any() for example in examples)


def test_a_block_takes_the_class_of_most_voxels():
    block = np.zeros((2, 2, 4), np.int16)
    block[..., :2] = np.array([[[1, 1], [1, 2]], [[2, 2], [1, 1]]])  # five of one, three of another
    block[..., 2:] = 3
    assert block_majority(block, 2).tolist() == [[[1, 3]]]
    assert np.array_equal(block_majority(block, 1), block)
