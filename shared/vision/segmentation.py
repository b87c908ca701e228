"""A segmentation network as a Model: batches, sliding windows, and prediction from file to file."""

from __future__ import annotations

import itertools
import re
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
from bestiary.shared.viz.overlay import save_overlay

_SCHEMES = ("zscore", "ct", "none")


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
    buffer ``normalization``; z-score over non-zero voxels unless :meth:`use_normalization` was called) and resampling
    to ``spec.spacing`` where a voxel size differs by more than 1 % (0 there keeps the file's own grid). Nothing is
    cropped or reoriented: a file must lie as the training files did.

    Args:
        network: the network.
        spec: of the data it is trained on.
        sw_overlap: overlap of neighbouring windows, a share of the patch.
        mirror_tta: average over all mirrorings (2**d passes), as nnU-Net does.
        sw_batch: windows that go through the network at once.
        normalize: a scheme for each channel (see :mod:`bestiary.shared.data.preprocess`); None is z-score.
    """

    tasks = ("seg",)
    normalization: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        spec: DataSpec,
        sw_overlap: float = 0.5,
        mirror_tta: bool = True,
        sw_batch: int = 1,
        normalize: Sequence[pre.Normalization] | None = None,
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

    def adapt_to(self, source: Any) -> None:
        """Take over the normalisation of the data set a run begins with."""
        self.use_normalization(source.normalization())

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
        if image.ndim != self.spec.spatial_dims + 1 or image.shape[0] != self.spec.in_channels:
            raise BadDataError(
                f"an image of shape {tuple(image.shape)} for a model of {self.spec.in_channels} channels in "
                f"{self.spec.spatial_dims}D"
            )
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

    def predict(self, inputs: Sequence[Path | str], out_dir: Path) -> list[Path]:
        """Segment NIfTI files.

        Args:
            inputs: one file an image; for several channels the file of the first, ``<case>_0000.nii.gz``, with the
                others beside it.
            out_dir: gets ``<case>_seg.nii.gz``, class numbers on the input's own grid, and ``<case>_overlay.png``.

        Returns:
            The paths written.

        Raises:
            UserError: if there is nothing to do, or two inputs would be written to one name.
            MissingDataError: for a file that is not there.
            BadDataError: for one that cannot be read or has other axes or channels than the model.
        """
        files = {}
        for item in map(Path, inputs):
            stem = re.sub(r"(_0000)?\.nii(\.gz)?$", "", item.name)
            if stem in files:
                raise UserError(f"{item} and {files[stem]} would both be written to {stem}_seg.nii.gz: rename one")
            files[stem] = item
        if not files:
            raise UserError("nothing to predict: give one or more NIfTI files")
        read = {stem: self._read(path) for stem, path in files.items()} if len(files) == 1 else None
        if read is None:
            for path in files.values():  # a bad file is reported before any work is done
                for channel in self._channels(path):
                    pre.read_header(channel, self.spec.spatial_dims)
        out_dir = Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        training = self.training
        self.eval()
        written: list[Path] = []
        try:
            for stem, path in files.items():
                raw, header = read[stem] if read else self._read(path)
                label = self._segment(raw, header)
                written.append(pre.write_label(out_dir / f"{stem}_seg.nii.gz", label, header))
                overlay = out_dir / f"{stem}_overlay.png"
                written.append(save_overlay(overlay, raw[0], label, self.spec.class_names, header.spacing, title=stem))
        finally:
            self.train(training)
        return written

    def _channels(self, path: Path) -> list[Path]:
        n = self.spec.in_channels
        if n == 1:
            return [path]
        match = re.fullmatch(r"(.*)_0000(\.nii(?:\.gz)?)", path.name)
        if match is None:
            raise BadDataError(
                f"{path}: this model takes {n} channels ({', '.join(self.spec.modalities)}). Name their files "
                f"<case>_0000.nii.gz to <case>_{n - 1:04d}.nii.gz in that order, and give the first."
            )
        return [path.with_name(f"{match[1]}_{c:04d}{match[2]}") for c in range(n)]

    def _read(self, path: Path) -> tuple[np.ndarray, pre.Header]:
        """All channels (C, *S) of a case as in the files, and the header."""
        arrays, headers = zip(*(pre.read_volume(p, self.spec.spatial_dims) for p in self._channels(path)), strict=True)
        if len({array.shape for array in arrays}) > 1:
            raise BadDataError(f"{path}: its channels differ in shape: {[array.shape for array in arrays]}")
        if any(not np.allclose(h.affine, headers[0].affine, atol=1e-3) for h in headers):
            raise BadDataError(f"{path}: its channels do not lie on each other (their affines differ). Register them.")
        return np.stack(arrays), headers[0]

    def _segment(self, raw: np.ndarray, header: pre.Header) -> np.ndarray:
        image = np.stack([pre.normalize(c, s) for c, s in zip(raw, self.schemes(), strict=True)])
        if pre.needs_resampling(header.spacing, self.spec.spacing):
            shape = pre.target_shape(header.shape, header.spacing, self.spec.spacing)
            image = pre.resample_image(image, shape, pre.coarse_axis(header.spacing))
        logits = self.infer(torch.from_numpy(image))
        return pre.resampled_argmax(logits, header.shape).cpu().numpy()

    def wrap_policy(self) -> set[type[nn.Module]]:
        """The network's own choice, where it has one."""
        policy = getattr(self.network, "wrap_policy", None)
        return policy() if callable(policy) else set()  # type: ignore[return-value]
