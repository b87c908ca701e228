"""Orders replaced, compared and mapped, against permutations written out by hand."""

import numpy as np
import pytest
import torch
from scipy import stats

from bestiary.projects.asm_unet import orders as instrument
from bestiary.projects.asm_unet.model import ASMUNet
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.nn.mixers import random_order
from bestiary.shared.vision.segmentation import SegmentationModel

PATCH = (4, 8, 8)


def model(**options) -> SegmentationModel:
    torch.manual_seed(0)
    network = ASMUNet(
        spatial_dims=3,
        in_channels=1,
        num_classes=3,
        features=(4, 6),
        strides=(1, 2),
        kernel_sizes=(3, 3),
        convs_per_stage=1,
        asm_min_channels=5,
        d_state=4,
        group_length=16,
        **options,
    )
    spec = DataSpec(
        task="seg",
        modalities=("T1",),
        spatial_dims=3,
        in_channels=1,
        num_classes=3,
        class_names=("background", "A", "B"),
        spacing=(1.0, 1.0, 1.0),
        patch_size=PATCH,
        strides=((1, 1, 1), (2, 2, 2)),
    )
    return SegmentationModel(network, spec, mirror_tta=False).eval()


def image(seed: int = 0, shape=(4, 8, 12)) -> torch.Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))


def example(seed: int = 0, shape=(4, 8, 12)):
    label = torch.randint(0, 3, (1, *shape), generator=torch.Generator().manual_seed(seed + 100))
    return {"id": f"case{seed}", "meta": {"spacing": (1.0,) * 3}, "image": image(seed, shape), "label": label}


def test_within_the_context_blocks_walk_as_told_and_afterwards_as_before():
    net = model()
    before = net.infer(image())
    with instrument.orders_replaced(net, instrument.raster):
        raster = net.infer(image())
    assert torch.equal(net.infer(image()), before)
    assert not torch.allclose(raster, before)
    fixed = model(order="raster")
    fixed.load_state_dict(net.state_dict())
    torch.testing.assert_close(fixed.infer(image()), raster)
    with instrument.orders_replaced(net, instrument.random):
        at_random = net.infer(image())
    fixed = model(order="random")
    fixed.load_state_dict(net.state_dict())
    torch.testing.assert_close(fixed.infer(image()), at_random)


def test_what_was_recorded_is_walked_window_by_window():
    net = model()
    own = net.infer(image())
    tape = instrument.record_orders(net, image())
    (calls,) = tape.orders.values()
    assert len(calls) == 2  # windows of 8 over 12 voxels
    with instrument.orders_replaced(net, tape.player()):
        assert torch.equal(net.infer(image()), own)
        with pytest.raises(IndexError):
            net.infer(image())
    other = instrument.record_orders(net, image(1))
    with instrument.orders_replaced(net, other.player()):
        assert not torch.allclose(net.infer(image()), own)
    small = instrument.record_orders(net, image(1, (4, 8, 8)))
    small.orders = {name: [calls[0][..., :8]] for name, calls in small.orders.items()}
    with instrument.orders_replaced(net, small.player()), pytest.raises(ValueError, match="recorded"):
        net.infer(image())


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    one, other = (np.stack([[rng.permutation(9) for _ in range(2)] for _ in range(3)]) for _ in range(2))
    found = instrument.rank_correlation(torch.from_numpy(one), torch.from_numpy(other))
    for g in range(3):
        for b in range(2):
            # the time of token t is its place in the order
            want = stats.spearmanr(np.argsort(one[g, b]), np.argsort(other[g, b])).statistic
            assert found[g, b] == pytest.approx(want)
    assert torch.equal(
        instrument.rank_correlation(torch.arange(5)[None, None], torch.arange(5).flip(0)[None, None]),
        torch.tensor([[-1.0]], dtype=torch.float64),
    )


def test_a_map_says_when_each_voxel_is_visited():
    net = model(order="raster")
    maps = instrument.order_maps(net, image(shape=PATCH))
    (one,) = maps.values()
    assert one.shape == (3, *PATCH)
    # 2 x 4 x 4 tokens in raster order, each of 2 x 2 x 2 voxels
    times = (np.arange(32) / 31).reshape(2, 4, 4)
    want = times.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    np.testing.assert_allclose(one, np.broadcast_to(want, one.shape), rtol=1e-6)
    two = next(iter(instrument.order_maps(net, image()).values()))
    assert two.shape == (3, 4, 8, 12)
    # where only the first window looks, it alone counts
    np.testing.assert_allclose(two[..., :4], one[..., :4], rtol=1e-6)


def test_shares_of_the_terms():
    shares = next(iter(instrument.score_shares(model(), image()).values()))
    assert shares["individual"] + shares["group"] == pytest.approx(1)
    assert 0 < shares["individual"] < 1
    only = next(iter(instrument.score_shares(model(score_terms="group"), image()).values()))
    assert (only["individual"], only["group"], only["group_rank"]) == pytest.approx((0, 1, 1))
    only = next(iter(instrument.score_shares(model(score_terms="individual", num_groups=1), image()).values()))
    assert (only["individual"], only["group"], only["individual_rank"]) == pytest.approx((1, 0, 1))

    flat = model(score_terms="individual", num_groups=1)
    with torch.no_grad():
        next(iter(instrument.adaptive_blocks(flat).values())).score.head.weight.zero_()
    equal = next(iter(instrument.score_shares(flat, image()).values()))
    assert np.isnan(equal["individual"])
    assert np.isnan(equal["individual_rank"])
    assert equal["distinct"] == pytest.approx(1 / 32)
    assert shares["distinct"] > 0.9


def test_transplant_reports_what_is_lost():
    net, cases = model(), [example(0), example(1, (6, 8, 8))]
    protocol = instrument.OrderTransplant()
    scores = protocol(net, cases)
    own = protocol.volume(net, cases)
    for which in ("raster", "random", "other"):
        lost = scores[f"order_{which}/drop/mean"]
        assert lost == pytest.approx(own["dice/mean"] - scores[f"order_{which}/dice/mean"])
        parts = [scores[f"order_{which}/drop/{name}"] for name in ("A", "B")]
        assert lost == pytest.approx(np.mean(parts))
    fixed = model(order="raster")
    fixed.load_state_dict(net.state_dict())
    assert scores["order_raster/dice/mean"] == pytest.approx(protocol.volume(fixed, cases)["dice/mean"])
    # A net in raster order loses nothing by it, and all images are walked alike.
    same = protocol(fixed, cases)
    assert same["order_raster/drop/mean"] == 0
    assert same["order/rank_correlation"] == pytest.approx(1)
    assert instrument.OrderTransplant()(torch.nn.Linear(1, 1), cases) == {}
    with pytest.raises(ConfigError, match="raster, random and other"):
        instrument.OrderTransplant(["spiral"])


def test_a_walker_takes_the_orders_of_the_image_that_is_named():
    net, cases = model(), [example(0), example(1), example(2)]
    images = [case["image"] for case in cases]
    walker, late = instrument.Walker(net, "other", cases), instrument.Walker(net, "other", cases, first=2)
    with torch.no_grad():
        for index, donor in ((0, 1), (1, 2), (2, 0)):
            tape = instrument.record_orders(net, images[donor])
            with instrument.orders_replaced(net, tape.player()):
                want = net.infer(images[index])
            assert torch.equal(walker.infer(images[index]), want)
            assert not torch.equal(net.infer(images[index]), want)
        assert torch.equal(late.infer(images[2]), want)
        for which, replace in (("raster", instrument.raster), ("random", instrument.random)):
            with instrument.orders_replaced(net, replace):
                want = net.infer(images[0])
            assert torch.equal(instrument.Walker(net, which, cases).infer(images[0]), want)


def test_correlations_are_those_of_a_case_and_the_other_one():
    net, cases = model(), [example(0), example(1)]
    with torch.no_grad():  # as initialised, images hardly matter
        next(iter(instrument.adaptive_blocks(net).values())).score.head.weight.mul_(20)
    tapes = [instrument.record_orders(net, case["image"]) for case in cases]
    ((block, own),), other = tapes[0].orders.items(), tapes[1].orders
    by_hand = [
        stats.spearmanr(a[g, 0].argsort(), b[g, 0].argsort()).statistic
        for a, b in zip(own, other[block], strict=True)
        for g in range(3)
    ]
    assert len(by_hand) == 6
    assert instrument.OrderTransplant()(net, cases)["order/rank_correlation"] == pytest.approx(np.mean(by_hand))
    assert np.mean(by_hand) < 0.9


def test_the_other_image():
    cases = [example(0), example(1, (6, 8, 8))]
    other = instrument.other_image(cases, 0)
    assert torch.equal(other[0, :, :, 2:10], cases[1]["image"][0, 1:5])
    assert other[..., :2].abs().sum() == other[..., 10:].abs().sum() == 0
    assert torch.equal(instrument.other_image(cases[:1], 0), cases[0]["image"].flip(1, 2))
    assert random_order(1, 4).shape == (1, 4)
