"""Any data set in nnU-Net's raw layout: ``dataset.json``, ``imagesTr``, ``labelsTr``, and perhaps ``imagesTs``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import derive_seed
from bestiary.shared.data import preprocess as pre
from bestiary.shared.data.assets import data_root
from bestiary.shared.data.augment import Augment
from bestiary.shared.data.splits import k_fold, load_split
from bestiary.shared.data.volumes import Volume, VolumeSource

SAMPLES_PER_CASE = 10_000
"""Foreground voxels of each training case that the CT statistics rest on (nnU-Net's number)."""


class NnUNetFolder(VolumeSource):
    """A folder in nnU-Net's raw layout, in 2D or 3D.

    Images are ``imagesTr/<case>_0000.nii.gz`` (channel 0), ``_0001`` and so on; labels ``labelsTr/<case>.nii.gz``. A
    channel called CT is clipped to the 0.5 and 99.5 percentiles of the training cases' foreground and z-scored with its
    mean and deviation; ``noNorm`` is left as it is; any other is z-scored case by case over its non-zero voxels.

    With ``spacing``, images are resampled with cubic splines and labels class by class linearly, and along an axis more
    than 3 times as coarse as the finest with nearest neighbours; held-out cases keep their label on the source grid
    too, where they are scored. Volumes are not cropped to their non-zero part, and resampling is done each time a case
    is loaded. An ignore label is refused: it would be a class.

    Args:
        root: the data set's folder.
        patch_size: voxels of a training patch, in array order (z, y, x).
        spacing: mm of each axis in array order; None keeps each case's own grid (the spec then says 0).
        strides: of each level of the network, in array order.
        kernel_sizes: of each level; empty is 3 everywhere.
        split: a named split or a file (see :mod:`bestiary.shared.data.splits`); None makes folds.
        fold: which fold is ``val`` where no split is given.
        folds: how many folds.
        split_seed: seed of the folds.
        classes: the foreground classes to keep, by their name in ``labels`` and in this order; others become
            background. None keeps all.
        labels: ``{name: value}`` with ``background: 0``; None takes it from dataset.json.
        channel_names: names of the channels in order; None takes them from dataset.json.
        file_ending: None takes it from dataset.json.
        augment: what is done to training patches.
        oversample: see :class:`VolumeSource`.
        cache_mb: see :class:`VolumeSource`.
        request: what to say when the folder is not there: where the data is requested, where it goes, how it is laid
            out, what to run then. ``{root}`` in it becomes the folder.

    Raises:
        ConfigError: for options that contradict each other.
    """

    def __init__(
        self,
        root: str | Path,
        patch_size: Sequence[int],
        spacing: Sequence[float] | None = None,
        strides: Sequence[Sequence[int]] = (),
        kernel_sizes: Sequence[Sequence[int]] = (),
        split: str | None = None,
        fold: int = 0,
        folds: int = 5,
        split_seed: int = 12345,
        classes: Sequence[str] | None = None,
        labels: Mapping[str, int] | None = None,
        channel_names: Sequence[str] | None = None,
        file_ending: str | None = None,
        augment: Augment | None = None,
        oversample: float = 0.33,
        cache_mb: float = 4000,
        request: str | None = None,
    ) -> None:
        self.root = Path(root).expanduser()
        self._options = {"labels": labels, "channel_names": channel_names, "file_ending": file_ending}
        self._classes = tuple(classes) if classes is not None else None
        self._split = split
        self._folds = (fold, folds, split_seed)
        self._request = request
        super().__init__(
            class_names=(),
            modalities=(),
            spacing=spacing if spacing is not None else (0.0,) * len(patch_size),
            patch_size=patch_size,
            strides=strides,
            kernel_sizes=kernel_sizes,
            augment=augment,
            oversample=oversample,
            cache_mb=cache_mb,
        )

    # What dataset.json and the options say, read when first needed.

    @cached_property
    def description(self) -> dict[str, Any]:
        """``labels`` {name: value}, ``channel_names`` [...], ``file_ending``; options come before dataset.json."""
        given = {key: value for key, value in self._options.items() if value is not None}
        if len(given) < 3:
            given = {**self._dataset_json(), **given}
        path = self.root / "dataset.json"
        channels, labels = given.get("channel_names"), given.get("labels")
        if isinstance(channels, Mapping):
            channels = [channels[key] for key in sorted(channels, key=int)]
        if not channels or not isinstance(labels, Mapping) or not given.get("file_ending"):
            raise BadDataError(f"{path}: needs channel_names, labels and file_ending (nnU-Net version 2). Add them.")
        if any(not isinstance(value, int) for value in labels.values()):
            raise BadDataError(f"{path}: labels must map each name to one number; region-based labels are not read.")
        if "ignore" in labels:
            raise BadDataError(
                f"{path}: has an ignore label, which is not built: it would be trained as a class of its own. "
                "Give `dataset.labels` without it once no voxel carries it."
            )
        if sorted(labels.values()) != list(range(len(labels))):
            raise BadDataError(f"{path}: label values must be 0 to {len(labels) - 1} without gaps: {dict(labels)}")
        if given["file_ending"] not in pre.NIFTI_ENDINGS:
            raise BadDataError(
                f"{path}: file_ending {given['file_ending']!r} is not read; convert the files to .nii.gz."
            )
        return {
            "labels": dict(labels),
            "channel_names": [str(c) for c in channels],
            "file_ending": given["file_ending"],
        }

    def _dataset_json(self) -> dict[str, Any]:
        self._require_root()
        path = self.root / "dataset.json"
        if not path.is_file():
            raise MissingDataError(f"{path}: is missing. It belongs to nnU-Net's raw layout; write one, or copy it.")
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise BadDataError(f"{path}: is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise BadDataError(f"{path}: must be a JSON object")
        return values

    @cached_property
    def _label_map(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """A table from the file's values to class numbers, and the class names."""
        labels = self.description["labels"]
        background = next(name for name, value in labels.items() if value == 0)
        named = [n for n, _ in sorted(labels.items(), key=lambda item: item[1]) if n != background]
        kept = list(self._classes) if self._classes is not None else named
        unknown = [name for name in kept if name not in named]
        if unknown or len(set(kept)) != len(kept) or not kept:
            raise ConfigError(f"classes {kept} of {self.root.name}: each must be one of {named}, once")
        table = np.zeros(len(labels), dtype=np.int16)
        for number, name in enumerate(kept, start=1):
            table[labels[name]] = number
        return table, (background, *kept)

    def _describe(self) -> None:
        self.modalities = tuple(self.description["channel_names"])
        self.class_names = self._label_map[1]

    def spec(self) -> DataSpec:
        """The spec, from dataset.json and the options; no volume is read."""
        self._describe()
        return super().spec()

    # Files

    def _require_root(self) -> None:
        if self.root.is_dir():
            return
        if self._request:
            raise MissingDataError(self._request.strip().replace("{root}", str(self.root)))
        raise MissingDataError(
            f"{self.root}: there is no such folder. Put a data set in nnU-Net's raw layout there (dataset.json, "
            "imagesTr/<case>_0000.nii.gz, labelsTr/<case>.nii.gz), or set dataset.root to where it is."
        )

    @cached_property
    def _listing(self) -> dict[str, tuple[str, ...]]:
        """Case ids by folder: ``Tr`` and ``Ts``."""
        self._require_root()
        ending = "_0000" + self.description["file_ending"]
        found = {}
        for part in ("Tr", "Ts"):
            folder = self.root / f"images{part}"
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            found[part] = tuple(name[: -len(ending)] for name in names if name.endswith(ending))
        if not found["Tr"]:
            raise MissingDataError(
                f"{self.root / 'imagesTr'}: has no file <case>{ending}. Put the training images there under such names."
            )
        return found

    def images_of(self, case_id: str) -> list[Path]:
        """The files of a case's channels."""
        part = "Ts" if case_id in self._listing["Ts"] and case_id not in self._listing["Tr"] else "Tr"
        ending, n = self.description["file_ending"], len(self.description["channel_names"])
        return [self.root / f"images{part}" / f"{case_id}_{c:04d}{ending}" for c in range(n)]

    def label_of(self, case_id: str) -> Path:
        """The file of a case's labels."""
        part = self.images_of(case_id)[0].parent.name[-2:]
        return self.root / f"labels{part}" / f"{case_id}{self.description['file_ending']}"

    @cached_property
    def splits(self) -> dict[str, list[str]]:
        """The three lists of case ids."""
        known = self._listing["Tr"]
        if self._split is not None:
            lists = load_split(self._split)
            everyone = {*known, *self._listing["Ts"]}
            absent = [name for names in lists.values() for name in names if name not in everyone]
            if absent:
                raise MissingDataError(
                    f"{self.root}: the split names {len(absent)} cases that are not in imagesTr: "
                    f"{', '.join(absent[:5])}{' …' if len(absent) > 5 else ''}. Rename them, or give another split."
                )
            return lists
        fold, folds, seed = self._folds
        lists = k_fold(known, fold, folds, seed)
        # A test case without a label cannot be scored.
        lists["test"] = [case for case in self._listing["Ts"] if self.label_of(case).is_file()]
        return lists

    def case_ids(self, split: str) -> list[str]:
        """See :class:`VolumeSource`."""
        return self.splits[split]

    @cached_property
    def revision(self) -> str:  # type: ignore[override]
        """A hash over the description, and names and sizes of the files; contents are not read."""
        self._require_root()
        digest = hashlib.sha256(json.dumps(self.description, sort_keys=True).encode())
        for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            base = self.root / folder
            for path in sorted(base.iterdir()) if base.is_dir() else []:
                digest.update(f"{folder}/{path.name}:{path.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]

    def check(self) -> None:
        """Check that files, pairs and headers fit, and the values of the first label; voxels are else not read.

        Raises:
            MissingDataError: for what is not there.
            BadDataError: for what is there and wrong; the message names the file.
        """
        self._require_root()
        self.spec()
        cases = [case for names in self.splits.values() for case in names]
        dims = len(self.patch_size)
        for case in cases:
            label = self.label_of(case)
            for path in (*self.images_of(case), label):
                if not path.is_file():
                    raise MissingDataError(f"{path}: is missing for case {case}. Add it, or drop the case.")
            want = pre.read_header(label, dims)
            for path in self.images_of(case):
                got = pre.read_header(path, dims)
                if got.shape != want.shape:
                    raise BadDataError(
                        f"{path}: shape {got.shape} differs from {want.shape} of {label.name}. Put both on one grid."
                    )
                if not np.allclose(got.affine, want.affine, atol=0.05):
                    raise BadDataError(
                        f"{path}: position or voxel size in the header differs from {label.name}. Put both on one grid."
                    )
        self._read_label(cases[0])

    # Voxels

    def _read_label(self, case_id: str) -> tuple[np.ndarray, pre.Header]:
        path = self.label_of(case_id)
        values, header = pre.read_volume(path, len(self.patch_size))
        top = len(self.description["labels"]) - 1
        whole = np.rint(values)
        if np.abs(values - whole).max() > 1e-3 or whole.min() < 0 or whole.max() > top:
            raise BadDataError(
                f"{path}: label values run from {values.min():g} to {values.max():g}; allowed are whole numbers from 0 "
                f"to {top}. Correct the file or dataset.json."
            )
        return whole.astype(np.int16), header

    def _read_images(self, case_id: str) -> list[np.ndarray]:
        return [pre.read_volume(path, len(self.patch_size))[0] for path in self.images_of(case_id)]

    def load_case(self, case_id: str) -> Volume:
        """See :class:`VolumeSource`."""
        self._describe()
        raw, header = self._read_label(case_id)
        label = self._label_map[0][raw]
        channels = self._read_images(case_id)
        if any(channel.shape != label.shape for channel in channels):
            raise BadDataError(f"{self.label_of(case_id)}: shape {label.shape} differs from the image's")
        image = np.stack([pre.normalize(c, s) for c, s in zip(channels, self.normalization(), strict=True)])
        meta: dict[str, Any] = {"file": str(self.images_of(case_id)[0].relative_to(self.root))}
        affine, spacing = header.affine, header.spacing
        if pre.needs_resampling(spacing, self.spacing):
            shape = pre.target_shape(label.shape, spacing, self.spacing)
            apart = pre.coarse_axis(spacing)
            meta |= {"source_label": label.astype(np.int64)[None], "source_spacing": spacing}
            if case_id in self.splits["train"]:
                meta = {"file": meta["file"]}  # nobody scores it there, and it is large
            affine = _rescaled(affine, np.array(label.shape) / np.array(shape))
            image = pre.resample_image(image, shape, apart)
            label, spacing = pre.resample_label(label, shape, apart), self.spacing
        return Volume(id=case_id, image=image, label=label, affine=affine, spacing=spacing, meta=meta)

    def normalization(self) -> tuple[pre.Normalization, ...]:
        """See :class:`VolumeSource`. The first call for a CT channel reads the training cases; the result is kept."""
        names = self.description["channel_names"]
        ct = [name.lower() == "ct" for name in names]
        stats = self._ct_statistics if any(ct) else {}
        plain = [name.lower() == "nonorm" for name in names]
        return tuple(
            stats[str(c)] if ct[c] else {"scheme": "none"} if plain[c] else pre.ZSCORE for c in range(len(names))
        )

    @cached_property
    def _ct_statistics(self) -> dict[str, dict[str, Any]]:
        """Foreground statistics of the training cases by channel, stored so that no later run reads them all again."""
        times = [str(path.stat().st_mtime_ns) for case in self.splits["train"] for path in self.images_of(case)]
        key = hashlib.sha256("\n".join([self.revision, *self.splits["train"], *times]).encode()).hexdigest()[:24]
        store = data_root() / "cache" / "fingerprints" / f"{key}.json"
        if store.is_file():
            return json.loads(store.read_text())
        samples: list[list[np.ndarray]] = [[] for _ in self.description["channel_names"]]
        for case in self.splits["train"]:
            inside = self._read_label(case)[0] > 0
            rng = np.random.default_rng(derive_seed("fingerprint", case))
            for found, channel in zip(samples, self._read_images(case), strict=True):
                values = channel[inside]
                if len(values):
                    found.append(rng.choice(values, SAMPLES_PER_CASE))
        if not samples[0]:
            raise BadDataError(f"{self.root / 'labelsTr'}: no training case has foreground, so CT has no statistics")
        stats = {str(c): _statistics(np.concatenate(found)) for c, found in enumerate(samples)}
        store.parent.mkdir(parents=True, exist_ok=True)
        aside = store.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(stats))
        aside.rename(store)
        return stats


def _statistics(values: np.ndarray) -> dict[str, Any]:
    lower, upper = np.percentile(values, [0.5, 99.5])
    return {
        "scheme": "ct",
        "lower": float(lower),
        "upper": float(upper),
        "mean": float(values.mean(dtype=np.float64)),
        "std": float(values.std(dtype=np.float64)),
    }


def _rescaled(affine: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The affine of a grid that covers the same field with voxels ``factors`` times as large."""
    dims = len(factors)
    out = affine.copy()
    out[:3, :dims] = affine[:3, :dims] * factors
    out[:3, 3] += affine[:3, :dims] @ ((factors - 1) / 2)
    return out
