"""The scan order as an instrument: where it leads, what it is made of, and what is lost when another takes its place.

All of it works on trained weights, which stay as they are.

Shape legend: G score groups, B windows, L tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bestiary.kernels import invert_order
from bestiary.projects.asm_unet.adaptive_scan import AdaptiveScanMamba
from bestiary.shared.core.errors import ConfigError, require
from bestiary.shared.core.examples import Example
from bestiary.shared.data.volumes import crop_or_pad
from bestiary.shared.metrics.segmentation import VolumeProtocol
from bestiary.shared.nn.mixers import random_order, to_tokens

Replace = Callable[[str, torch.Tensor], torch.Tensor]
"""(name of the block, its orders (G, B, L)) to the orders it shall walk by."""


def adaptive_blocks(model: nn.Module) -> dict[str, AdaptiveScanMamba]:
    """The adaptive scan blocks of a model by name, in the order of its modules; none is an empty dict."""
    return {name: block for name, block in model.named_modules() if isinstance(block, AdaptiveScanMamba)}


@contextmanager
def orders_replaced(model: nn.Module, replace: Replace) -> Iterator[None]:
    """Within, every block of the model walks by what ``replace`` returns; scores and their channel stay as they are."""
    blocks = adaptive_blocks(model)
    before = {name: block.transplant for name, block in blocks.items()}
    try:
        for name, block in blocks.items():
            block.transplant = partial(replace, name)
        yield
    finally:
        for name, block in blocks.items():
            block.transplant = before[name]


def raster(name: str, orders_GBL: torch.Tensor) -> torch.Tensor:
    """The last axis fastest."""
    return torch.arange(orders_GBL.shape[-1], device=orders_GBL.device).expand_as(orders_GBL)


def random(name: str, orders_GBL: torch.Tensor) -> torch.Tensor:
    """A fixed random order for each group, as ``backbone=random_order`` has."""
    G, _, L = orders_GBL.shape
    return random_order(G, L).to(orders_GBL.device)[:, None].expand_as(orders_GBL)


@dataclass
class Tape:
    """The orders of one pass over an image, to be walked by in a pass over another image of that shape.

    Attributes:
        orders: (G, B, L) of each call, by block.
    """

    orders: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def record(self, name: str, orders_GBL: torch.Tensor) -> torch.Tensor:
        """Keep the orders and leave them."""
        self.orders.setdefault(name, []).append(orders_GBL)
        return orders_GBL

    def player(self) -> Replace:
        """Replaces call after call by what was recorded."""
        calls = dict.fromkeys(self.orders, 0)

        def play(name: str, orders_GBL: torch.Tensor) -> torch.Tensor:
            recorded = self.orders[name][calls[name]]
            calls[name] += 1
            if recorded.shape != orders_GBL.shape:
                raise ValueError(f"recorded orders {tuple(recorded.shape)} for {tuple(orders_GBL.shape)}")
            return recorded

        return play


def record_orders(model: Any, image: torch.Tensor) -> Tape:
    """The orders of every window of an image.

    Args:
        model: a SegmentationModel.
        image: (C, *S), preprocessed.
    """
    tape = Tape()
    with orders_replaced(model, tape.record):
        model.infer(image)
    return tape


def rank_correlation(one_GBL: torch.Tensor, other_GBL: torch.Tensor) -> torch.Tensor:
    """Spearman's correlation of the times at which two orders visit each token, (G, B) float64 in [-1, 1]."""
    ranks = [_ranks(orders).double() for orders in (one_GBL, other_GBL)]
    n = ranks[0].shape[-1]
    return 1 - 6 * (ranks[0] - ranks[1]).square().sum(-1) / (n * (n**2 - 1))


def _ranks(orders_GBL: torch.Tensor) -> torch.Tensor:
    """When each token is visited, (G, B, L) int64."""
    return invert_order(orders_GBL.flatten(0, -2)).view_as(orders_GBL)


def tape_correlation(one: Tape, other: Tape) -> dict[str, float]:
    """Mean rank correlation of the orders of two images at the same windows, by block."""
    out = {}
    for name, calls in one.orders.items():
        pairs = zip(calls, other.orders[name], strict=True)
        out[name] = float(torch.cat([rank_correlation(a, b).flatten() for a, b in pairs]).mean())
    return out


def order_maps(model: Any, image: torch.Tensor) -> dict[str, np.ndarray]:
    """When each voxel is visited: 0 first, 1 last, the mean over the windows that see it.

    A voxel has the time of its token, which at a coarse level stands for many voxels.

    Args:
        model: a SegmentationModel.
        image: (C, *S), preprocessed.

    Returns:
        (G, *S) float32 by block.
    """
    inferers = require("monai.inferers", "medical")
    network, blocks = model.network, adaptive_blocks(model)
    seen: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {}

    def windows(x: torch.Tensor) -> torch.Tensor:
        tape = Tape()
        with orders_replaced(model, tape.record), _inputs_of(blocks) as inputs:
            network(x)
        maps = []
        for name, (orders,) in tape.orders.items():
            spatial = inputs[name].shape[2:]
            time = _ranks(orders).float() / max(orders.shape[-1] - 1, 1)
            time = time.transpose(0, 1).unflatten(-1, spatial)
            maps.append(F.interpolate(time, size=x.shape[2:], mode="nearest"))
            seen[name] = (orders, tuple(spatial))
        return torch.cat(maps, dim=1)

    with torch.no_grad():
        device = next(network.parameters()).device
        stacked = inferers.sliding_window_inference(
            image[None].to(device, torch.float32), model.spec.patch_size, model.sw_batch, windows, model.sw_overlap
        )[0]
    sizes = [len(orders) for orders, _ in seen.values()]
    return {name: part.cpu().numpy() for name, part in zip(seen, stacked.split(sizes), strict=True)}


@contextmanager
def _inputs_of(blocks: dict[str, AdaptiveScanMamba]) -> Iterator[dict[str, torch.Tensor]]:
    """The input of each block's last call."""
    inputs: dict[str, torch.Tensor] = {}

    def keeper(name: str) -> Callable[..., None]:
        return lambda _, arguments: inputs.__setitem__(name, arguments[0])

    handles = [block.register_forward_pre_hook(keeper(name)) for name, block in blocks.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def score_shares(model: Any, image: torch.Tensor) -> dict[str, dict[str, float]]:
    """What the scores of an image are made of, by block.

    ``individual`` and ``group`` are the variances over tokens of either term as shares of their sum, means over groups
    and windows; NaN where the score is the same for all tokens. ``individual_rank`` and ``group_rank`` are the rank
    correlations of the order with the one that the term alone would give: 1 for a term that decides everything, NaN for
    one that is the same for all tokens. ``distinct`` is the number of different individual scores in a window as a
    share of its tokens: near 0 where the score has saturated, and ties are walked in raster order.

    Args:
        model: a SegmentationModel.
        image: (C, *S), preprocessed.
    """
    found: dict[str, list[list[float]]] = {}

    def look(name: str, block: AdaptiveScanMamba, x: torch.Tensor) -> None:
        tokens, _ = to_tokens(x, block.dim, block.spatial_dims)
        individual, group = block.score_parts(tokens)
        scores = block.scores(tokens)
        zero = scores.new_zeros(scores.shape)
        terms = [
            zero if individual is None else individual.expand_as(scores),
            zero if group is None else group[:, None].expand_as(scores),
        ]
        spread = [term.double().var(dim=-1) for term in terms]
        total = spread[0] + spread[1]  # where both are 0, there is no share: NaN
        order = scores.argsort(dim=-1, stable=True)
        ranks = [rank_correlation(order, term.argsort(dim=-1, stable=True)) for term in terms]
        ranks = [r.where(s > 0, math.nan).nanmean() for r, s in zip(ranks, spread, strict=True)]
        kinds = 0 if individual is None else np.mean([len(row.unique()) for row in individual]) / individual.shape[-1]
        values = [(spread[0] / total).nanmean(), (spread[1] / total).nanmean(), *ranks, kinds]
        found.setdefault(name, []).append([float(v) for v in values])

    def keeper(name: str) -> Callable[..., None]:
        return lambda block, arguments: look(name, block, arguments[0])

    handles = [b.register_forward_pre_hook(keeper(name)) for name, b in adaptive_blocks(model).items()]
    try:
        model.infer(image)
    finally:
        for handle in handles:
            handle.remove()
    keys = ("individual", "group", "individual_rank", "group_rank", "distinct")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a block whose scores are all equal
        return {name: dict(zip(keys, np.nanmean(rows, axis=0).tolist(), strict=True)) for name, rows in found.items()}


class OrderTransplant:
    """How much Dice is lost when trained weights walk by another order.

    The orders of every block are replaced, window by window, by ``raster`` order, by fixed ``random`` ones, and by
    those of an ``other`` image: the next case, cropped or padded to the size of this one, or where there is one case
    only, that case turned by half a circle about its last axis (other tissue at every place). The score channel
    stays as it is, so this asks what the order does, and not what the score tells.

    Keys are ``order_<which>/dice/mean``, ``order_<which>/drop/<class>`` and ``order_<which>/drop/mean`` (Dice with its
    own orders minus Dice with others), ``order/rank_correlation`` (own and the other image's orders, mean over blocks)
    and ``order/individual_share`` (see :func:`score_shares`). A model without adaptive blocks yields none.

    Args:
        replacements: which of raster, random and other.
        empty_rule: as :class:`~bestiary.shared.metrics.segmentation.VolumeProtocol`.

    Source: ours; nothing of it is in arXiv:2508.07237.
    """

    name = "order_transplant"
    version = "1"

    def __init__(self, replacements: Sequence[str] = ("raster", "random", "other"), empty_rule: str = "nnunet") -> None:
        unknown = set(replacements) - {"raster", "random", "other"}
        if unknown or not replacements:
            raise ConfigError(f"replacements are some of raster, random and other, not {list(replacements)}")
        self.replacements = tuple(replacements)
        self.volume = VolumeProtocol(empty_rule=empty_rule, hd95=False, nsd=False, skip_undefined=True)

    def __call__(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """Score a model.

        Args:
            model: a SegmentationModel.
            examples: whole volumes with labels.
        """
        if not adaptive_blocks(model):
            return {}
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return self._compare(model, examples)
        finally:
            model.train(training)

    def _compare(self, model: Any, examples: Sequence[Example]) -> dict[str, float]:
        own = self.volume(model, examples)
        out: dict[str, float] = {}
        for which in self.replacements:
            scores = self.volume(Walker(model, which, examples), examples)
            out[f"order_{which}/dice/mean"] = scores["dice/mean"]
            for key, value in own.items():
                out[key.replace("dice/", f"order_{which}/drop/")] = value - scores[key]
        correlations: list[float] = []
        shares: list[dict[str, float]] = []
        for index in range(len(examples)):
            image = examples[index]["image"]  # type: ignore[typeddict-item]
            tapes = [record_orders(model, one) for one in (image, other_image(examples, index))]
            correlations += tape_correlation(*tapes).values()
            shares += score_shares(model, image).values()
        known = [found["individual"] for found in shares if not math.isnan(found["individual"])]
        return out | {
            "order/rank_correlation": float(np.mean(correlations)),
            "order/individual_share": float(np.mean(known or [math.nan])),
            "order/distinct": float(np.mean([found["distinct"] for found in shares])),
        }


class Walker(nn.Module):
    """A model whose ``infer`` walks by other orders, example after example.

    Args:
        model: a SegmentationModel.
        which: raster, random or other.
        examples: those that ``infer`` is called on, in order, and whose images are the other ones.
        first: the index of the first.
    """

    def __init__(self, model: Any, which: str, examples: Sequence[Example], first: int = 0) -> None:
        super().__init__()
        self.model, self.spec, self.which, self.examples = model, model.spec, which, examples
        self.at = first

    def infer(self, image: torch.Tensor) -> torch.Tensor:
        """Logits (num_classes, *S)."""
        replace: Replace = raster if self.which == "raster" else random
        if self.which == "other":
            replace = record_orders(self.model, other_image(self.examples, self.at)).player()
        self.at += 1
        with orders_replaced(self.model, replace):
            return self.model.infer(image)


def other_image(examples: Sequence[Example], index: int) -> torch.Tensor:
    """The next example's image at the size of this one's; alone, this one's turned by half a circle, (C, *S)."""
    image: Any = examples[index]["image"]  # type: ignore[typeddict-item]
    if len(examples) == 1:
        return image.flip(tuple(range(1, image.ndim - 1)))
    donor = np.asarray(examples[(index + 1) % len(examples)]["image"])  # type: ignore[typeddict-item]
    start = [math.floor((had - wanted) / 2) for had, wanted in zip(donor.shape[1:], image.shape[1:], strict=True)]
    return torch.from_numpy(np.ascontiguousarray(crop_or_pad(donor, start, tuple(image.shape[1:]))))
