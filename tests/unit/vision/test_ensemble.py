"""Several models as one."""

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from bestiary.shared.core.errors import BadDataError, ConfigError, UserError
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.vision.ensemble import Ensemble, load_models, member_paths, refuse_seen
from bestiary.shared.vision.segmentation import SegmentationModel

CT = {"scheme": "ct", "lower": -100.0, "upper": 200.0, "mean": 40.0, "std": 50.0}
OTHER = {"scheme": "ct", "lower": -80.0, "upper": 180.0, "mean": 30.0, "std": 60.0}


class Net(nn.Module):
    """Logits that are linear in the voxel."""

    def __init__(self, weights):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(weights))

    def forward(self, x):
        return x * self.w.view(1, -1, 1, 1)


def model(weights=(0.0, 1.0), scheme=CT, **changes):
    values = {
        "task": "seg", "modalities": ("CT",), "spatial_dims": 2, "in_channels": 1, "num_classes": 2,
        "class_names": ("background", "liver"), "spacing": (1.0, 1.0), "patch_size": (8, 8),
    }  # fmt: skip
    return SegmentationModel(Net(weights), DataSpec(**{**values, **changes}), mirror_tta=False, normalize=[scheme])


def test_the_mean_of_the_probabilities():
    image = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
    members = [model((0.0, 1.0)), model((0.0, -3.0)), model((1.0, 0.5))]
    found = Ensemble(members).infer(image)
    by_hand = (torch.sigmoid(image) + torch.sigmoid(-3 * image) + torch.sigmoid(-0.5 * image)) / 3
    torch.testing.assert_close(found[1:], by_hand)
    torch.testing.assert_close(found.sum(0), torch.ones(8, 8))


def test_each_member_sees_its_own_normalisation():
    raw = torch.linspace(-70, 170, 64).view(1, 8, 8)  # within both windows
    first, second = ((raw - s["mean"]) / s["std"] for s in (CT, OTHER))
    found = Ensemble([model((0.0, 1.0)), model((0.0, 2.0), OTHER)]).infer(first)
    torch.testing.assert_close(found[1:], (torch.sigmoid(first) + torch.sigmoid(2 * second)) / 2)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"class_names": ("background", "spleen")}, "classes"),
        ({"spacing": (1.0, 2.0)}, "spacing"),
        ({"modalities": ("MR",)}, "channels"),
        ({"scheme": {"scheme": "zscore"}}, "normalisation"),
    ],
)
def test_what_does_not_fit_is_said(changes, what):
    with pytest.raises(ConfigError, match=rf"a and b differ in {what}"):
        Ensemble([model(), model(**changes)], ["a", "b"])


def test_other_refusals():
    turned = model()
    turned.use_axes("RA")
    with pytest.raises(ConfigError, match="orientation"):
        Ensemble([model(), turned])
    with pytest.raises(ConfigError, match="two models"):
        Ensemble([model()])
    with pytest.raises(ConfigError, match="is a Linear"):
        Ensemble([model(), nn.Linear(1, 1)])  # type: ignore[list-item]
    Ensemble([model(), model(patch_size=(16, 16))])  # patches may differ


def test_files_are_predicted(tmp_path):
    raw = np.random.default_rng(0).uniform(-70, 170, (10, 9)).astype(np.float32)
    nib.save(nib.Nifti1Image(raw, np.eye(4)), tmp_path / "a.nii.gz")
    members = [model((0.0, 1.0)), model((0.5, -2.0), OTHER)]
    Ensemble(members).predict([tmp_path / "a.nii.gz"], tmp_path / "out")
    label = np.asarray(nib.load(tmp_path / "out" / "a_seg.nii.gz").dataobj)
    share = [1 / (1 + np.exp((0 - 1) * (raw - 40) / 50)), 1 / (1 + np.exp((0.5 + 2) * (raw - 30) / 60))]
    np.testing.assert_array_equal(label, (np.mean(share, 0) > 0.5).astype(label.dtype))


def test_members_have_their_own_normalisation_in_bounded_memory():
    raw = torch.rand(1, 21, 13, generator=torch.Generator().manual_seed(0)) * 240 - 70
    both = Ensemble([model((0.0, 1.0)), model((0.4, -1.5), OTHER)])
    image = (raw - CT["mean"]) / CT["std"]
    np.testing.assert_array_equal(both.infer_labels(image, (21, 13)), both.infer(image).argmax(0).numpy())


@pytest.mark.parametrize(("option", "value"), [("mirror_tta", True), ("sw_overlap", 0.25)])
def test_members_that_look_otherwise_are_another_ensemble(tmp_path, option, value):
    nib.save(nib.Nifti1Image(np.zeros((10, 9), np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    members = [model((0.0, 1.0)), model((0.5, -2.0))]
    Ensemble(members).predict([tmp_path / "a.nii.gz"], tmp_path / "out")
    setattr(members[1], option, value)
    with pytest.raises(UserError, match="of another model"):
        Ensemble(members).predict([tmp_path / "a.nii.gz"], tmp_path / "out")


def test_paths():
    assert member_paths("/a,b") == ["/a,b"]
    assert member_paths("[/a, '/b c']") == ["/a", "/b c"]
    with pytest.raises(ConfigError, match="brackets"):
        member_paths("[a,]")
    with pytest.raises(BadDataError, match="/nowhere/b: no checkpoint"):
        load_models("[/nowhere/b,/nowhere/c]")


def test_what_a_member_was_trained_on_is_not_scored():
    class Source:
        def __init__(self, *cases):
            self.cases = list(cases)

        def case_ids(self, split):
            return self.cases if split == "train" else []

    refuse_seen(["t1"], [Source("c1"), Source("c2")], ["A", "B"])
    with pytest.raises(ConfigError, match=r"1 of the 2 cases \(c2\) were trained on by B: .*split=test"):
        refuse_seen(["c2", "c3"], [Source("c1"), Source("c2")], ["A", "B"])
