"""Scores of segmentations: Dice, 95 % Hausdorff distance and normalised surface Dice, case by case.

The surface metrics are MONAI's. A rule says what an absent class means, and it is part of the protocol: numbers under
different rules must not be compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from bestiary.shared.core.errors import BadDataError, ConfigError, require
from bestiary.shared.core.examples import Example
from bestiary.shared.data.preprocess import resampled_argmax

Pair = tuple[Any, Any, Sequence[float]]
"""(prediction (*S), reference (*S), spacing in mm): arrays or tensors of class numbers."""

NAN = float("nan")
# What (dice, hd95, nsd) are where a class is absent: from both, from the prediction, from the reference.
EMPTY_RULES = {
    "nnunet": {"both": (NAN, NAN, NAN), "prediction": (0.0, NAN, 0.0), "reference": (0.0, NAN, 0.0)},
    "transunet": {"both": (0.0, 0.0, 0.0), "prediction": (0.0, 0.0, 0.0), "reference": (1.0, 0.0, 1.0)},
}


class VolumeProtocol:
    """Scores whole volumes: each class in each case, the mean over cases without NaN, then the mean over classes.

    Keys are ``dice/<class>``, ``hd95/<class>`` (mm), ``nsd/<class>`` and ``<metric>/mean`` over the foreground classes;
    a class that no case defines is NaN, and so is then the mean. A case that was resampled for the network (see
    ``source_label`` in :class:`bestiary.shared.data.volumes.Volume`) is scored on its source grid, a case with a
    ``region`` within it alone. No case, no keys.

    Rules for an absent class (``empty_rule``):
        nnunet: absent from both, NaN and ignored; absent from one, Dice and NSD 0. HD95 has no value where a surface is
            missing and is ignored, so read it beside Dice.
        transunet: absent from the reference only, Dice and NSD 1 and HD95 0; absent from the prediction, or from both,
            all 0. It rewards a predicted structure that is not there; for comparing with tables made so, only.

    Attributes:
        first: (id, class numbers (*S)) of the first case of the last call, for a picture.

    Args:
        class_names: background first; None takes them from ``model.spec``.
        empty_rule: see above.
        hd95: whether to compute it (slow).
        nsd: whether to compute it (slow).
        nsd_tolerance_mm: surface distance that counts as agreement.
        by_volume: also report ``<metric>/quarter_1`` (the smallest quarter of the classes) to ``<metric>/quarter_4``,
            means over classes sorted by their volume in the references; it takes four classes or more.
        skip_undefined: means leave out classes that no case defines, instead of being NaN; for a part that holds few of
            them.
        mean_over: the classes whose mean is ``<metric>/mean``, where a network learns more than a table scores; None is
            every foreground class.

    Source: TransUNet arXiv:2102.04306 and nnU-Net arXiv:1809.10486 for the rules; MONAI for HD95 and NSD.
    """

    name = "volume"
    version = "1"

    def __init__(
        self,
        class_names: Sequence[str] | None = None,
        empty_rule: str = "nnunet",
        hd95: bool = True,
        nsd: bool = True,
        nsd_tolerance_mm: float = 1.0,
        by_volume: bool = False,
        skip_undefined: bool = False,
        mean_over: Sequence[str] | None = None,
    ) -> None:
        if empty_rule not in EMPTY_RULES:
            raise ConfigError(f"there is no empty_rule {empty_rule!r}; there are {', '.join(EMPTY_RULES)}")
        if not nsd_tolerance_mm >= 0:  # nor is NaN
            raise ConfigError(f"nsd_tolerance_mm must be 0 or more, not {nsd_tolerance_mm}")
        self.class_names = None if class_names is None else tuple(class_names)
        self.empty_rule = empty_rule
        self.metrics = ("dice", *(["hd95"] if hd95 else []), *(["nsd"] if nsd else []))
        self.nsd_tolerance_mm, self.by_volume = nsd_tolerance_mm, by_volume
        self.skip_undefined = skip_undefined
        self.mean_over = None if mean_over is None else tuple(mean_over)
        self.first: Any = None

    def __call__(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """Score a model.

        Args:
            model: ``model.infer(image (C, *S))`` gives logits (num_classes, *S) or class numbers (*S).
            examples: whole volumes with labels.

        Returns:
            ``{metric/class: value}``.
        """
        names = self.class_names or tuple(model.spec.class_names)  # type: ignore[union-attr]
        training = model.training
        model.eval()
        self.first = None
        try:
            with torch.no_grad():
                return self.score((self._predict(model, example) for example in examples), names)
        finally:
            model.train(training)

    def _predict(self, model: nn.Module, example: Any) -> Pair:
        image, meta = example["image"], example["meta"]
        answer = model.infer(image)  # type: ignore[operator]
        reference, spacing = example["label"][0], meta.get("spacing") or (1.0,) * (image.ndim - 1)
        if "source_label" in meta:
            reference, spacing = torch.as_tensor(meta["source_label"])[0], meta["source_spacing"]
        if answer.ndim == image.ndim:
            answer = resampled_argmax(answer, reference.shape)
        if self.first is None:
            self.first = (example["id"], answer.cpu().numpy())
        if "region" in meta:
            answer, reference = answer[meta["region"]], reference[meta["region"]]
        return answer.cpu(), reference, spacing

    def score(self, pairs: Iterable[Pair], class_names: Sequence[str]) -> dict[str, float]:
        """Score predictions that are there already; baselines use it.

        Args:
            pairs: see :data:`Pair`.
            class_names: background first.

        Returns:
            ``{metric/class: value}``, empty where there are no pairs.

        Raises:
            BadDataError: if a prediction's shape is not the reference's.
            ConfigError: if ``mean_over`` names what is no class.
        """
        self._averaged(class_names)  # before the work
        return self.summary([self.score_case(*pair, num_classes=len(class_names)) for pair in pairs], class_names)

    def summary(self, cases: Sequence[dict[str, list[float]]], class_names: Sequence[str]) -> dict[str, float]:
        """Means over cases, from what :meth:`score_case` gives; empty where there are none."""
        if not cases:
            return {}
        averaged = self._averaged(class_names)
        volumes = np.sum([case["volume"] for case in cases], axis=0)
        quarters = np.array_split(np.argsort(volumes, kind="stable"), 4)
        out: dict[str, float] = {}
        for metric in self.metrics:
            table = np.array([case[metric] for case in cases])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a column of NaN is an answer here
                per_class = np.nanmean(table, axis=0)
            out |= {f"{metric}/{name}": float(v) for name, v in zip(class_names[1:], per_class, strict=True)}
            out[f"{metric}/mean"] = self._mean(np.array([out[f"{metric}/{name}"] for name in averaged]))
            if self.by_volume and len(per_class) >= 4:
                out |= {f"{metric}/quarter_{n}": self._mean(per_class[q]) for n, q in enumerate(quarters, start=1)}
        return out

    def _mean(self, values: np.ndarray) -> float:
        """Over classes; NaN where one is, unless those are to be left out."""
        if self.skip_undefined:
            values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else NAN

    def _averaged(self, class_names: Sequence[str]) -> Sequence[str]:
        averaged = class_names[1:] if self.mean_over is None else self.mean_over
        if not averaged or not set(averaged) <= set(class_names[1:]):
            raise ConfigError(f"mean_over {list(averaged)}: each must be one of {', '.join(class_names[1:])}")
        return averaged

    def score_case(
        self, prediction: Any, reference: Any, spacing: Sequence[float], num_classes: int
    ) -> dict[str, list[float]]:
        """One case: ``{metric: [value of class 1, class 2, ...]}``, and ``volume``, mm^3 of each in the reference."""
        predicted, truth = torch.as_tensor(prediction).cpu(), torch.as_tensor(reference).cpu()
        if predicted.shape != truth.shape:
            raise BadDataError(f"a prediction of shape {tuple(predicted.shape)} for a reference {tuple(truth.shape)}")
        for what, labels in (("prediction", predicted), ("reference", truth)):
            low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
            if low < 0 or high >= num_classes:
                raise BadDataError(f"a {what} holds classes {low} to {high}; there are {num_classes}")
        # One pass over the voxels for every class: with a hundred classes a mask for each would take minutes.
        pairs = predicted.flatten().long() * num_classes + truth.flatten().long()
        joint = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
        out: dict[str, list[float]] = {metric: [] for metric in self.metrics}
        out["volume"] = [float(n) * float(np.prod(spacing)) for n in joint.sum(0)[1:]]
        for index in range(1, num_classes):
            size_p, size_y, both = (int(n) for n in (joint[index].sum(), joint[:, index].sum(), joint[index, index]))
            values: dict[str, float]
            if size_p and size_y:
                values = {"dice": 2 * both / (size_p + size_y)}
                if len(self.metrics) > 1:
                    values |= self._surface(predicted == index, truth == index, spacing)
            else:
                case = "prediction" if size_y else "reference" if size_p else "both"
                values = dict(zip(("dice", "hd95", "nsd"), EMPTY_RULES[self.empty_rule][case], strict=True))
            for metric in self.metrics:
                out[metric].append(values[metric])
        return out

    def _surface(self, p: torch.Tensor, y: torch.Tensor, spacing: Sequence[float]) -> dict[str, float]:
        """HD95 and NSD of two masks that are not empty, as far as they are wanted."""
        monai = require("monai.metrics", "medical")
        box = _box(p | y)
        masks: dict[str, Any] = {"y_pred": p[box][None, None], "y": y[box][None, None]}
        masks |= {"include_background": True, "spacing": [float(s) for s in spacing]}
        values = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MONAI warns of an argument that it passes itself
            if "hd95" in self.metrics:
                values["hd95"] = float(monai.compute_hausdorff_distance(percentile=95, **masks))
            if "nsd" in self.metrics:
                values["nsd"] = float(monai.compute_surface_dice(class_thresholds=[self.nsd_tolerance_mm], **masks))
        return values


def _box(mask: torch.Tensor) -> tuple[slice, ...]:
    """The smallest box around a mask with one voxel to spare, so that surfaces at its edge stay surfaces."""
    found = mask.nonzero()
    low, high = found.min(0).values, found.max(0).values
    return tuple(slice(max(int(a) - 1, 0), min(int(b) + 2, n)) for a, b, n in zip(low, high, mask.shape, strict=True))
