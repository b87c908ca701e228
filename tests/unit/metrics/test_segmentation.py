import math

import numpy as np
import pytest
import torch
from torch import nn

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.protocols import EvalProtocol
from bestiary.shared.metrics.segmentation import VolumeProtocol

NAMES = ("background", "A", "B")


def cube(low, high, value=1, shape=(20, 20, 20)):
    out = np.zeros(shape, np.int64)
    out[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = value
    return out


def test_it_is_a_protocol():
    assert isinstance(VolumeProtocol(), EvalProtocol)
    assert (VolumeProtocol.name, VolumeProtocol.version) == ("volume", "1")


def test_a_cube_shifted_by_two_voxels():
    # 8^3 cubes, shifted by 2 of 8 along the first axis: overlap 6/8. The far faces are 2 voxels of 1.5 mm apart.
    pair = (cube((6, 5, 5), (14, 13, 13)), cube((4, 5, 5), (12, 13, 13)), (1.5, 1.0, 1.0))
    scores = VolumeProtocol(nsd_tolerance_mm=3.0).score([pair], NAMES[:2])
    assert scores["dice/A"] == scores["dice/mean"] == pytest.approx(0.75)
    assert scores["hd95/A"] == pytest.approx(3.0)
    assert scores["nsd/A"] == pytest.approx(1.0)
    strict = VolumeProtocol(nsd_tolerance_mm=0.5).score([pair], NAMES[:2])
    assert 0.3 < strict["nsd/A"] < 0.8


def test_a_perfect_answer_and_a_thin_one():
    whole = cube((0, 0, 0), (20, 20, 20))
    perfect = VolumeProtocol().score([(whole, whole, (1, 1, 1))], NAMES[:2])
    assert perfect == {key: pytest.approx(0.0 if "hd95" in key else 1.0) for key in perfect}
    point = cube((3, 3, 3), (4, 4, 4))
    other = cube((3, 3, 7), (4, 4, 8))
    scores = VolumeProtocol().score([(point, other, (1, 1, 2.0))], NAMES[:2])
    assert scores["dice/A"] == 0
    assert scores["hd95/A"] == pytest.approx(8.0)
    assert scores["nsd/A"] == 0


def test_two_dimensions():
    pair = (cube((2, 2), (6, 6), shape=(9, 9)), cube((2, 3), (6, 7), shape=(9, 9)), (1.0, 2.0))
    scores = VolumeProtocol(nsd_tolerance_mm=2.0).score([pair], NAMES[:2])
    assert scores["dice/A"] == pytest.approx(0.75)
    assert scores["hd95/A"] == pytest.approx(2.0)


EMPTY, FULL = cube((0, 0, 0), (0, 0, 0)), cube((4, 4, 4), (8, 8, 8))


@pytest.mark.parametrize(
    ("rule", "prediction", "reference", "expected"),
    [
        ("nnunet", EMPTY, EMPTY, (math.nan, math.nan, math.nan)),
        ("nnunet", FULL, EMPTY, (0, math.nan, 0)),
        ("nnunet", EMPTY, FULL, (0, math.nan, 0)),
        ("transunet", EMPTY, EMPTY, (0, 0, 0)),
        ("transunet", FULL, EMPTY, (1, 0, 1)),
        ("transunet", EMPTY, FULL, (0, 0, 0)),
    ],
)
def test_rules_for_absent_classes(rule, prediction, reference, expected):
    scores = VolumeProtocol(empty_rule=rule).score([(prediction, reference, (1, 1, 1))], NAMES[:2])
    for metric, value in zip(("dice", "hd95", "nsd"), expected, strict=True):
        assert scores[f"{metric}/A"] == pytest.approx(value, nan_ok=True)


def test_cases_first_then_classes_and_nan_is_ignored_in_cases_only():
    a, b = cube((4, 4, 4), (8, 8, 8), 1), cube((10, 10, 10), (14, 14, 14), 2)
    half = cube((10, 10, 10), (14, 14, 12), 2)
    protocol = VolumeProtocol(hd95=False, nsd=False)
    pairs = [(a + b, a + b, (1, 1, 1)), (a, a, (1, 1, 1)), (a + half, a + b, (1, 1, 1))]
    scores = protocol.score(pairs, NAMES)
    assert set(scores) == {"dice/A", "dice/B", "dice/mean"}
    assert scores["dice/A"] == 1
    assert scores["dice/B"] == pytest.approx((1 + 2 * 0.5 / 1.5) / 2)
    assert scores["dice/mean"] == pytest.approx((scores["dice/A"] + scores["dice/B"]) / 2)
    assert math.isnan(protocol.score([(a, a, (1, 1, 1))], NAMES)["dice/mean"])
    assert protocol.score([], NAMES) == {}


class Answers(nn.Module):
    """Gives the image back, as class numbers or as logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def infer(self, image):
        assert not self.training
        label = image[0].long()
        return nn.functional.one_hot(label, 3).movedim(-1, 0).float() if self.logits else label


@pytest.mark.parametrize("logits", [True, False])
def test_a_model_is_scored_by_what_it_infers(logits):
    truth = torch.as_tensor(cube((4, 4, 4), (8, 8, 8), 1) + cube((10, 10, 10), (14, 14, 14), 2))
    example = {"id": "x", "meta": {"spacing": (1, 1, 1)}, "image": truth[None].float(), "label": truth[None]}
    model = Answers(logits).train()
    scores = VolumeProtocol(NAMES)(model, [example])
    assert scores["dice/mean"] == 1
    assert scores["hd95/B"] == 0
    assert model.training


def test_a_resampled_case_is_scored_on_its_source_grid():
    truth = torch.as_tensor(cube((4, 4, 4), (12, 12, 12)))
    coarse = truth[::2, ::2, ::2]
    meta = {"spacing": (2, 2, 2), "source_label": truth[None], "source_spacing": (1, 1, 1)}
    example = {"id": "x", "meta": meta, "image": coarse[None].float(), "label": coarse[None]}
    scores = VolumeProtocol(NAMES[:2])(Answers(True), [example])
    assert scores["dice/A"] > 0.95
    assert scores["hd95/A"] <= 1


def test_wrong_use_is_said():
    with pytest.raises(ConfigError, match="nnunet"):
        VolumeProtocol(empty_rule="medpy")
    with pytest.raises(BadDataError, match="shape"):
        VolumeProtocol().score([(np.zeros((2, 2)), np.zeros((2, 3)), (1, 1))], NAMES)


def test_dice_of_many_classes_against_masks_and_classes_out_of_range():
    rng = np.random.default_rng(0)
    prediction, reference = rng.integers(0, 7, (2, 9, 8, 7))
    scores = VolumeProtocol(hd95=False, nsd=False).score_case(prediction, reference, (1, 1, 1), num_classes=7)["dice"]
    for index, score in enumerate(scores, start=1):
        p, y = prediction == index, reference == index
        assert score == pytest.approx(2 * (p & y).sum() / (p.sum() + y.sum()))
    with pytest.raises(BadDataError, match="prediction holds classes 0 to 6; there are 5"):
        VolumeProtocol().score_case(prediction, reference, (1, 1, 1), num_classes=5)


def test_quarters_of_the_classes_by_volume():
    # Eight classes of 1 to 8 voxels, numbered from the largest; each prediction misses all but its first voxel.
    truth, guess, dice, at = np.zeros(36, np.int64), np.zeros(36, np.int64), {}, 0
    for number, size in zip(range(1, 9), range(8, 0, -1), strict=True):
        truth[at : at + size], guess[at], at = number, number, at + size
        dice[size] = 2 / (size + 1)
    names = ("background", *"hgfedcba")
    protocol = VolumeProtocol(hd95=False, nsd=False, by_volume=True)
    scores = protocol.score([(guess.reshape(6, 6), truth.reshape(6, 6), (1.0, 2.0))], names)
    for quarter, sizes in enumerate(((1, 2), (3, 4), (5, 6), (7, 8)), start=1):
        assert scores[f"dice/quarter_{quarter}"] == pytest.approx(np.mean([dice[size] for size in sizes]))
    few = protocol.score([(truth.clip(max=3), truth.clip(max=3), (1.0,))], names[:4])
    assert not any("quarter" in key for key in few)


def test_means_can_leave_out_what_is_undefined():
    truth = cube((0, 0, 0), (4, 4, 4))
    pairs = [(truth, truth, (1, 1, 1))]
    plain, skipping = (VolumeProtocol(hd95=False, nsd=False, skip_undefined=skip) for skip in (False, True))
    assert math.isnan(plain.score(pairs, NAMES)["dice/mean"])
    assert skipping.score(pairs, NAMES)["dice/mean"] == 1.0
    assert math.isnan(skipping.score([(truth * 0, truth * 0, (1, 1, 1))], NAMES)["dice/mean"])


def test_the_mean_may_be_over_some_of_the_classes():
    truth = torch.tensor([[1, 1, 2, 2, 3, 0]])
    guess = torch.tensor([[1, 1, 2, 0, 0, 0]])
    names = ("background", "a", "b", "c")
    options = {"hd95": False, "nsd": False}
    found = VolumeProtocol(names, mean_over=["b", "a"], **options).score([(guess, truth, (1, 1))], names)
    assert found["dice/mean"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["dice/c"] == 0
    assert VolumeProtocol(names, **options).score([(guess, truth, (1, 1))], names)["dice/mean"] == pytest.approx(5 / 9)
    for wrong in ([], ["background"], ["d"]):
        with pytest.raises(ConfigError, match="mean_over"):
            VolumeProtocol(names, mean_over=wrong, **options).score([(guess, truth, (1, 1))], names)
