"""Several segmentation models as one: the mean of their probabilities, as nnU-Net joins its folds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bestiary.shared.core.checkpoint import find_checkpoint, load_checkpoint
from bestiary.shared.core.errors import ConfigError, UserError
from bestiary.shared.core.examples import Batch
from bestiary.shared.core.protocols import Output, Rollout, Sampling
from bestiary.shared.data import preprocess as pre
from bestiary.shared.vision.predict_files import predict_files
from bestiary.shared.vision.segmentation import SegmentationModel, SegProcessor
from bestiary.shared.vision.windows import windowed_labels


class Ensemble(nn.Module):
    """Answers with the mean of its members' softmax.

    Members must agree on all that says what an image is and what a voxel can be: channels, classes, spacing, kind of
    normalisation, orientation. Patches may differ, and so may the numbers of a CT normalisation, which each fold has
    its own of: an image comes normalised as the first member's, and is brought to each other's (where the first clips
    less far, its clipping stays).

    Differs from nnU-Net: probabilities are resampled to the grid of the file after they were averaged, not before.

    Args:
        members: two or more models.
        names: what they are called in messages; None numbers them.

    Raises:
        ConfigError: if they do not agree; the message says on what.
    """

    tasks = ("seg",)

    def __init__(self, members: Sequence[SegmentationModel], names: Sequence[str] | None = None) -> None:
        super().__init__()
        if len(members) < 2:
            raise ConfigError("an ensemble needs two models or more")
        names = names or [f"model {number}" for number in range(1, len(members) + 1)]
        for member, name in zip(members, names, strict=True):
            if not isinstance(member, SegmentationModel):
                raise ConfigError(f"{name} is a {type(member).__name__}: an ensemble joins segmentation models")
        first = _agreed_on(members[0])
        for member, name in zip(members[1:], names[1:], strict=True):
            for what, value in _agreed_on(member).items():
                if value != first[what]:
                    raise ConfigError(
                        f"{names[0]} and {name} differ in {what}, and make no ensemble: {first[what]}, {value}"
                    )
        self.members = nn.ModuleList(members)
        self.spec = members[0].spec

    @property
    def _models(self) -> list[SegmentationModel]:
        return list(self.members)  # type: ignore[arg-type]

    def schemes(self) -> list[pre.Normalization]:
        """The normalisation of each channel that an image must come with: the first member's."""
        return self._models[0].schemes()

    def axes(self) -> str | None:
        """The members' orientation; see :class:`SegmentationModel`."""
        return self._models[0].axes()

    def processor(self) -> SegProcessor:
        """What turns examples into batches."""
        return SegProcessor()

    def forward(self, batch: Batch) -> Output:
        """Not for this kind of model."""
        raise UserError("an ensemble is not trained: train its members one by one")

    def generate(self, batch: Batch, n: int, sampling: Sampling) -> Rollout:
        """Not for this kind of model."""
        raise UserError("a segmentation model labels voxels and does not generate text; use predict")

    @torch.no_grad()
    def infer(self, image: torch.Tensor) -> torch.Tensor:
        """Probabilities of a whole image, the mean over the members.

        Args:
            image: (C, *S), preprocessed as :meth:`schemes` says.

        Returns:
            (num_classes, *S) float32, on the members' device.
        """
        total: torch.Tensor | None = None
        for member in self._models:
            share = member.infer(self._as_seen_by(member, image)).softmax(0)
            total = share if total is None else total.add_(share)
        assert total is not None
        return total / len(self.members)

    def infer_labels(self, image: torch.Tensor, shape: Sequence[int]) -> np.ndarray:
        """Class numbers on another grid over the same field, as from :meth:`infer` but for ties, in bounded memory.

        Args:
            image: (C, *S), preprocessed as :meth:`schemes` says.
            shape: the grid wanted.

        Returns:
            (*shape) integers.
        """
        members = self._models
        return windowed_labels(
            [member.windows(self._as_seen_by(member, image)) for member in members],
            self.spec.num_classes,
            shape,
            memory_mb=min(member.logits_mb for member in members),
            device=members[0].normalization.device,
        )

    def _as_seen_by(self, member: SegmentationModel, image: torch.Tensor) -> torch.Tensor:
        have, want = self.schemes(), member.schemes()
        if have == want:
            return image
        return torch.stack([_as(c, a, b) for c, a, b in zip(image, have, want, strict=True)])

    def predict(self, inputs: Sequence[Path | str], out_dir: Path, overwrite: bool = False) -> list[Path]:
        """Segment NIfTI files and folders of them; see :func:`~bestiary.shared.vision.predict_files.predict_files`."""
        return predict_files(self, inputs, out_dir, overwrite)


def _agreed_on(model: SegmentationModel) -> dict[str, Any]:
    spec = model.spec
    return {
        "channels": spec.modalities,
        "classes": spec.class_names,
        "spacing": tuple(round(s, 4) for s in spec.spacing),
        "normalisation": [scheme["scheme"] for scheme in model.schemes()],
        "orientation": model.axes(),
    }


def _as(channel: torch.Tensor, have: pre.Normalization, want: pre.Normalization) -> torch.Tensor:
    """A channel that was normalised by one CT scheme, as another would have it."""
    if have == want or have["scheme"] != "ct":
        return channel
    raw = channel * max(have["std"], 1e-8) + have["mean"]
    return (raw.clamp(want["lower"], want["upper"]) - want["mean"]) / max(want["std"], 1e-8)


def member_paths(text: str) -> list[str]:
    """The checkpoints that ``checkpoint=`` names: one path as it stands, or ``[A,B,…]``.

    Raises:
        ConfigError: for an empty list, or an empty name in it.
    """
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    paths = [part.strip().strip("'\"") for part in text[1:-1].split(",")]
    if not all(paths):
        raise ConfigError(f"checkpoint={text}: give one path, or several in brackets with commas between")
    return paths


def load_models(text: str) -> nn.Module:
    """The model of one checkpoint, or the :class:`Ensemble` of several (``[A,B,…]``), on the CPU in eval mode.

    Raises:
        BadDataError: if one is not there. ConfigError: if they make no ensemble.
    """
    paths = member_paths(text)
    folders = [find_checkpoint(path) for path in paths]  # before any is read
    models: list[Any] = [load_checkpoint(folder)[0] for folder in folders]
    return models[0] if len(models) == 1 else Ensemble(models, paths).eval()


def refuse_seen(cases: Sequence[str], trained_on: Sequence[Any], names: Sequence[str]) -> None:
    """Refuse to score an ensemble on what one of its members was trained on.

    Args:
        cases: ids of what would be scored. trained_on: the data source of each member. names: of the members.

    Raises:
        ConfigError: if a case is in the training part of a member.
    """
    for source, name in zip(trained_on, names, strict=True):
        seen = sorted(set(cases) & set(source.case_ids("train")))
        if seen:
            raise ConfigError(
                f"{len(seen)} of the {len(cases)} cases ({', '.join(seen[:3])}{' …' if len(seen) > 3 else ''}) were "
                f"trained on by {name}: score folds one by one on their val part, and their ensemble on split=test"
            )
