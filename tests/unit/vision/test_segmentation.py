import pickle

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError, UserError
from bestiary.shared.core.protocols import Model, Sampling
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.vision.segmentation import SegmentationModel


def spec(dims=3, channels=1, spacing=1.0):
    return DataSpec(
        task="seg",
        modalities=("T1", "T2")[:channels],
        spatial_dims=dims,
        in_channels=channels,
        num_classes=3,
        class_names=("background", "dark", "bright"),
        spacing=(spacing,) * dims,
        patch_size=(8,) * dims,
        strides=((1,) * dims, (2,) * dims),
    )


class Threshold(nn.Module):
    """Class 1 below zero, class 2 above, background at zero: an answer that is known for every voxel."""

    def __init__(self, levels=2):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.levels, self.seen = levels, []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        x = x[:, :1]
        out = torch.cat([0.1 - x.abs(), -x, x], 1) * self.scale
        if not self.training:
            return out
        return [out] + [nn.functional.avg_pool3d(out, 2**i) for i in range(1, self.levels)]


def test_it_is_a_model():
    assert isinstance(SegmentationModel(Threshold(), spec()), Model)


def test_the_processor_stacks_and_pickles():
    processor = pickle.loads(pickle.dumps(SegmentationModel(Threshold(), spec()).processor()))
    image, label = torch.zeros(1, 8, 8, 8), torch.ones(1, 8, 8, 8, dtype=torch.int64)
    batch = processor([{"id": i, "meta": {}, "image": image, "label": label} for i in "ab"], "train")
    assert batch["ids"] == ["a", "b"]
    assert batch["image"].shape == (2, 1, 8, 8, 8)
    assert batch["label"].dtype == torch.int64
    assert "label" not in processor([{"id": "a", "meta": {}, "image": image}], "eval")
    with pytest.raises(BadDataError, match="one shape"):
        processor([{"id": "a", "image": image}, {"id": "b", "image": image[:, :4]}], "train")


def test_forward_gives_levels_in_training_and_one_in_evaluation():
    model = SegmentationModel(Threshold(), spec())
    batch = {"ids": ["a"], "image": torch.randn(1, 1, 8, 8, 8)}
    out = model.train()(batch)
    assert out.logits.shape == (1, 3, 8, 8, 8)
    assert [aux.shape for aux in out.aux_logits] == [(1, 3, 4, 4, 4)]
    assert model.eval()(batch).aux_logits == []


@pytest.mark.parametrize("shape", [(8, 8, 8), (5, 20, 9), (3, 3, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_windows_and_mirrors_leave_a_pointwise_network_alone(shape, training):
    image = torch.randn(1, *shape)
    model = SegmentationModel(Threshold(), spec(), sw_batch=2).train(training)
    out = model.infer(image)
    model.network.eval()
    torch.testing.assert_close(out, model.network(image[None])[0])
    assert all(seen[2:] == (8, 8, 8) for seen in model.network.seen[:-1])


def test_mirroring_averages_all_flips():
    class Ramp(nn.Module):
        def forward(self, x):
            return x + torch.arange(8.0)

    image = torch.randn(3, 8, 8)
    data = DataSpec("seg", ("a", "b", "c"), 2, 3, 3, ("x", "y", "z"), (1, 1), (8, 8))
    out = SegmentationModel(Ramp(), data, mirror_tta=True).infer(image)
    torch.testing.assert_close(out, image + 3.5)
    plain = SegmentationModel(Ramp(), data, mirror_tta=False).infer(image)
    torch.testing.assert_close(plain, image + torch.arange(8.0))


def test_infer_says_what_does_not_fit():
    with pytest.raises(BadDataError, match="1 channels"):
        SegmentationModel(Threshold(), spec()).infer(torch.zeros(2, 8, 8, 8))


def test_it_does_not_generate():
    with pytest.raises(UserError, match="predict"):
        SegmentationModel(Threshold(), spec()).generate({"ids": []}, 1, Sampling())


def write(path, data, spacing=(1, 1, 1)):
    nib.save(nib.Nifti1Image(data.astype(np.float32), np.diag([*spacing, 1])), path)
    return path


def raw(shape=(12, 11, 10)):
    data = np.random.default_rng(0).normal(100, 10, shape)
    data[:2] = 0
    return data


def test_predict_writes_labels_on_the_grid_of_the_input_and_a_picture(tmp_path):
    data = raw()
    path = write(tmp_path / "scan.nii.gz", data)
    affine = np.array([[0, -1.0, 0, 7], [1, 0, 0, 8], [0, 0, 1, 9], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(data.astype(np.float32), affine), path)
    model = SegmentationModel(Threshold(), spec()).train()
    written = model.predict([path], tmp_path / "out")
    assert [p.name for p in written] == ["scan_seg.nii.gz", "scan_overlay.png", "volumes.csv"]
    assert all(p.stat().st_size > 0 for p in written)
    label = nib.load(written[0])
    np.testing.assert_allclose(label.affine, affine)
    found = np.asarray(label.dataobj)
    inside = data[data != 0]
    z = np.where(data != 0, (data - inside.mean()) / inside.std(), 0)
    clear = np.abs(np.abs(z) - 0.05) > 1e-3
    expected = np.where(np.abs(z) < 0.05, 0, np.where(z < 0, 1, 2))
    np.testing.assert_array_equal(found[clear], expected[clear])
    assert model.training


def test_predict_resamples_and_returns_to_the_grid(tmp_path):
    path = write(tmp_path / "scan.nii.gz", raw(), spacing=(2, 2, 2))
    model = SegmentationModel(Threshold(), spec())
    written = model.predict([path], tmp_path)
    assert nib.load(written[0]).shape == (12, 11, 10)
    fine = len(model.network.seen)
    own = SegmentationModel(Threshold(), spec(spacing=0.0))
    assert nib.load(own.predict([path], tmp_path / "own")[0]).shape == (12, 11, 10)
    assert len(own.network.seen) < fine  # the grid was not refined


def test_predict_repeats_the_normalisation_of_the_data(tmp_path):
    data = np.full((8, 8, 8), 40.0)
    data[:4] = 60
    path = write(tmp_path / "ct.nii.gz", data)
    model = SegmentationModel(Threshold(), spec())
    model.use_normalization([{"scheme": "ct", "lower": 0, "upper": 45, "mean": 30, "std": 10}])
    copy = SegmentationModel(Threshold(), spec())
    copy.load_state_dict(model.state_dict())
    assert copy.schemes() == model.schemes()
    found = np.asarray(nib.load(copy.predict([path], tmp_path)[0]).dataobj)
    assert np.unique(found).tolist() == [2]  # z-scoring would have split it in two
    with pytest.raises(ConfigError):
        model.use_normalization([])


def test_several_channels_come_from_neighbouring_files(tmp_path):
    for c in range(2):
        write(tmp_path / f"scan_{c:04d}.nii.gz", raw())
    model = SegmentationModel(Threshold(), spec(channels=2))
    written = model.predict([tmp_path / "scan_0000.nii.gz"], tmp_path / "out")
    assert written[0].name == "scan_seg.nii.gz"
    with pytest.raises(BadDataError, match="_0001"):
        model.predict([write(tmp_path / "single.nii.gz", raw())], tmp_path)
    turned = np.diag([1.0, -1.0, 1.0, 1.0])
    nib.save(nib.Nifti1Image(raw().astype(np.float32), turned), tmp_path / "scan_0001.nii.gz")
    with pytest.raises(BadDataError, match="orientation in the header differs"):
        model.predict([tmp_path / "scan_0000.nii.gz"], tmp_path)
    (tmp_path / "scan_0001.nii.gz").unlink()
    with pytest.raises(MissingDataError, match="scan_0001"):
        model.predict([tmp_path / "scan_0000.nii.gz"], tmp_path)


def test_orientation_travels_with_the_weights():
    class Source:
        def normalization(self):
            return [{"scheme": "none"}]

        def axes(self):
            return "LPS"

    model = SegmentationModel(Threshold(), spec())
    assert model.axes() is None
    model.adapt_to(Source())
    copy = SegmentationModel(Threshold(), spec())
    copy.load_state_dict(model.state_dict())
    assert copy.axes() == "LPS"
    for codes in ("RA", "RAX", "ras"):
        with pytest.raises(ConfigError, match="orientation"):
            model.use_axes(codes)


def test_weights_from_before_orientations_were_kept_still_load():
    state = SegmentationModel(Threshold(), spec()).state_dict()
    del state["orientation"]
    model = SegmentationModel(Threshold(), spec())
    model.use_axes("RAS")
    model.load_state_dict(state)
    assert model.axes() is None


@pytest.mark.parametrize("options", [{"sw_overlap": 1.0}, {"sw_batch": 0}, {"normalize": [{"scheme": "z"}]}])
def test_wrong_options_are_said(options):
    with pytest.raises(ConfigError):
        SegmentationModel(Threshold(), spec(), **options)
    with pytest.raises(ConfigError):
        SegmentationModel(Threshold(), DataSpec(task="text"))
