"""A segmentation network as a Model: batches, sliding windows, and prediction from file to file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bestiary.shared.core.errors import BadDataError, ConfigError, UserError, require
from bestiary.shared.core.examples import Batch, Example, Mode, SegBatch
from bestiary.shared.core.protocols import Output, Rollout, Sampling
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.data import preprocess as pre
from bestiary.shared.vision.predict_files import predict_files
from bestiary.shared.vision.windows import Windows, windowed_labels

_SCHEMES = ("zscore", "ct", "none", "zscore_whole", "minmax")  # by the number in a checkpoint: add at the end
_CODES = "?LRPAIS"
"""Axis codes by the number that stands for them in the buffer ``orientation``."""


class SegProcessor:
    """Stacks examples into a SegBatch; it holds nothing and can be sent to a loader's workers."""

    def __call__(self, examples: Sequence[Example], mode: Mode) -> SegBatch:
        """Stack.

        Args:
            examples: of one shape.
            mode: makes no difference here.

        Returns:
            ids, image (B, C, *S) float32 and, where every example has one, label (B, 1, *S) int64.

        Raises:
            BadDataError: if the shapes differ.
        """
        items: Sequence[Any] = examples  # the keys of a TypedDict are optional to a type checker
        shapes = {tuple(item["image"].shape) for item in items}
        if len(shapes) != 1:
            raise BadDataError(
                f"a batch needs images of one shape, these are {sorted(shapes)}: cut patches, or batch 1"
            )
        batch: SegBatch = {
            "ids": [item["id"] for item in items],
            "image": torch.stack([item["image"] for item in items]).float(),
        }
        if all("label" in item for item in items):
            batch["label"] = torch.stack([item["label"] for item in items]).long()
        return batch


class SegmentationModel(nn.Module):
    """Wraps a network that maps (B, C, *S) to logits.

    In training mode the network may return a list of logits from full to lowest resolution; in evaluation mode it
    returns the full resolution alone. A network that needs fp32 somewhere under AMP sees to that itself.

    Prediction repeats what the data set did to its images: each channel's normalisation (kept in the checkpoint, as the
    buffer ``normalization``; z-score over non-zero voxels unless :meth:`use_normalization` was called), its orientation
    (the buffer ``orientation``; unless :meth:`use_axes` was called a file is taken as it lies), and resampling to
    ``spec.spacing`` where a voxel size differs by more than 1 % (0 there keeps the file's own grid). Nothing is
    cropped.

    Args:
        network: the network.
        spec: of the data it is trained on.
        sw_overlap: overlap of neighbouring windows, a share of the patch.
        mirror_tta: average over all mirrorings (2**d passes), as nnU-Net does.
        sw_batch: windows that go through the network at once.
        normalize: a scheme for each channel (see :mod:`bestiary.shared.data.preprocess`); None is z-score.
        logits_mb: 10^6 bytes that logits may take in :meth:`infer_labels`, besides those of a window.
    """

    tasks = ("seg",)
    normalization: torch.Tensor
    orientation: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        spec: DataSpec,
        sw_overlap: float = 0.5,
        mirror_tta: bool = True,
        sw_batch: int = 1,
        normalize: Sequence[pre.Normalization] | None = None,
        logits_mb: float = 2000,
    ) -> None:
        super().__init__()
        if spec.task != "seg":
            raise ConfigError(f"a segmentation model needs data of task seg, not {spec.task}")
        if not 0 <= sw_overlap < 1 or sw_batch < 1:
            raise ConfigError(f"sw_overlap {sw_overlap} must be in [0, 1), and sw_batch {sw_batch} 1 or more")
        self.network = network
        self.spec = spec
        self.sw_overlap, self.mirror_tta, self.sw_batch = sw_overlap, mirror_tta, sw_batch
        self.register_buffer("normalization", torch.zeros(spec.in_channels, 5))
        self.use_normalization(normalize or [pre.ZSCORE] * spec.in_channels)
        self.logits_mb = logits_mb
        self.register_buffer("orientation", torch.zeros(spec.spatial_dims, dtype=torch.int8))
        self.register_load_state_dict_pre_hook(_without_orientation)

    def use_normalization(self, schemes: Sequence[pre.Normalization]) -> None:
        """Take over what the data set does (``source.normalization()``), so that the checkpoint carries it.

        Raises:
            ConfigError: if there is not one scheme a channel.
        """
        if len(schemes) != self.spec.in_channels:
            raise ConfigError(f"{len(schemes)} normalisations for {self.spec.in_channels} channels")
        rows = []
        for scheme in map(pre.check_normalization, schemes):
            numbers = [float(scheme.get(key, 0.0)) for key in ("lower", "upper", "mean", "std")]
            rows.append([float(_SCHEMES.index(scheme["scheme"])), *numbers])
        self.normalization.copy_(torch.tensor(rows))

    def use_axes(self, codes: str) -> None:
        """Take over how the data set's volumes lie (``source.axes()``), so that the checkpoint carries it.

        Raises:
            ConfigError: if there is not one code an axis.
        """
        if not pre.are_codes(codes, self.spec.spatial_dims):
            raise ConfigError(
                f"{codes!r} is no orientation in {self.spec.spatial_dims}D: one of LR, PA, IS each, as RAS"
            )
        self.orientation.copy_(torch.tensor([_CODES.index(code) for code in codes]))

    def axes(self) -> str | None:
        """Axis codes of the volumes it was trained on; None where they are not known."""
        codes = "".join(_CODES[i] for i in self.orientation.tolist())
        return None if "?" in codes else codes

    def adapt_to(self, source: Any) -> None:
        """Take over normalisation and orientation of the data set a run begins with."""
        self.use_normalization(source.normalization())
        self.use_axes(source.axes())

    def schemes(self) -> list[pre.Normalization]:
        """The normalisation of each channel."""
        out: list[pre.Normalization] = []
        for code, lower, upper, mean, std in self.normalization.float().tolist():
            name = _SCHEMES[int(code)]
            numbers = {"lower": lower, "upper": upper, "mean": mean, "std": std}
            out.append({"scheme": name, **(numbers if name == "ct" else {})})
        return out

    def processor(self) -> SegProcessor:
        """What turns examples into batches."""
        return SegProcessor()

    def forward(self, batch: Batch) -> Output:
        """Image (B, C, *S) to logits (B, num_classes, *S), with the lower resolutions in training mode."""
        logits = self.network(batch["image"])  # type: ignore[typeddict-item]
        if isinstance(logits, torch.Tensor):
            return Output(logits)
        return Output(logits[0], list(logits[1:]))

    @torch.no_grad()
    def infer(self, image: torch.Tensor) -> torch.Tensor:
        """Logits of a whole image, from overlapping windows with Gaussian weights.

        Args:
            image: (C, *S), preprocessed; smaller than the patch is padded with 0.

        Returns:
            (num_classes, *S) float32, on the model's device.

        Raises:
            BadDataError: if channels or dimensions are not the spec's.
        """
        self._fits(image)
        inferers = require("monai.inferers", "medical")
        device = self.normalization.device
        return inferers.sliding_window_inference(
            image[None].to(device, torch.float32),
            roi_size=self.spec.patch_size,
            sw_batch_size=self.sw_batch,
            predictor=self._window,
            overlap=self.sw_overlap,
            mode="gaussian",
        )[0]

    def infer_labels(self, image: torch.Tensor, shape: Sequence[int]) -> np.ndarray:
        """Class numbers on another grid over the same field, as from :meth:`infer` but for ties, in bounded memory.

        Args:
            image: (C, *S), preprocessed.
            shape: the grid wanted.

        Returns:
            (*shape) integers.

        Raises:
            BadDataError: if channels or dimensions are not the spec's.
        """
        return windowed_labels(
            [self.windows(image)],
            self.spec.num_classes,
            shape,
            memory_mb=self.logits_mb,
            device=self.normalization.device,
        )

    def windows(self, image: torch.Tensor) -> Windows:
        """How it goes over an image (C, *S); BadDataError if channels or dimensions are not the spec's."""
        self._fits(image)
        return Windows(self._window, image, self.spec.patch_size, self.sw_overlap, self.sw_batch)

    def _fits(self, image: torch.Tensor) -> None:
        if image.ndim != self.spec.spatial_dims + 1 or image.shape[0] != self.spec.in_channels:
            raise BadDataError(
                f"an image of shape {tuple(image.shape)} for a model of {self.spec.in_channels} channels in "
                f"{self.spec.spatial_dims}D"
            )

    def _window(self, x: torch.Tensor) -> torch.Tensor:
        axes = range(2, x.ndim)
        flips = [f for n in range(x.ndim - 1) for f in itertools.combinations(axes, n)] if self.mirror_tta else [()]
        total: torch.Tensor | None = None
        for flip in flips:
            out = self.network(x.flip(flip) if flip else x)
            out = out if isinstance(out, torch.Tensor) else out[0]
            out = (out.flip(flip) if flip else out).float()
            total = out if total is None else total + out
        assert total is not None
        return total / len(flips)

    def generate(self, batch: Batch, n: int, sampling: Sampling) -> Rollout:
        """Not for this kind of model."""
        raise UserError("a segmentation model labels voxels and does not generate text; use predict")

    def predict(self, inputs: Sequence[Path | str], out_dir: Path, overwrite: bool = False) -> list[Path]:
        """Segment NIfTI files and folders of them; see :func:`~bestiary.shared.vision.predict_files.predict_files`."""
        return predict_files(self, inputs, out_dir, overwrite)

    def wrap_policy(self) -> set[type[nn.Module]]:
        """The network's own choice, where it has one."""
        policy = getattr(self.network, "wrap_policy", None)
        return policy() if callable(policy) else set()  # type: ignore[return-value]


def _without_orientation(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints from before orientations were kept say nothing of them."""
    state.setdefault(f"{prefix}orientation", torch.zeros_like(module.orientation))  # type: ignore[arg-type]
