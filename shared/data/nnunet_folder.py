"""Any data set in nnU-Net's raw layout: ``dataset.json``, ``imagesTr``, ``labelsTr``, and perhaps ``imagesTs``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError, UserError
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.data import preprocess as pre
from bestiary.shared.data.augment import Augment
from bestiary.shared.data.nnunet_description import checked_description, read_dataset_json
from bestiary.shared.data.nnunet_layout import check_case, layout_faults, names_in, refuse_ambiguous
from bestiary.shared.data.nnunet_paths import beside, explain_missing, resolve_root
from bestiary.shared.data.planning.cases import CaseRecord, describe, load_record, save_record, store_of
from bestiary.shared.data.planning.intensities import ct_scheme, statistics
from bestiary.shared.data.planning.plan import FILE_NAME, Plan, read_plan
from bestiary.shared.data.recorded_folder import RecordedFolder
from bestiary.shared.data.splits import k_fold, load_fold, load_split, refuse_repeats
from bestiary.shared.data.user_files import first_faults
from bestiary.shared.data.volumes import Volume, rescaled

MIDDLE_PATCH = (64, 64, 64)
"""Voxels of a patch where neither a config nor a plan says: a middle-sized choice, not a plan."""
MIDDLE_LEVELS = 5
"""Levels, each halving every axis, where neither says and the patch can be halved so often."""


class NnUNetFolder(RecordedFolder):
    """A folder in nnU-Net's raw layout, in 2D or 3D.

    Images are ``imagesTr/<case>_0000.nii.gz`` (channel 0), ``_0001`` and so on; labels ``labelsTr/<case>.nii.gz``. A
    channel called CT is clipped to the 0.5 and 99.5 percentiles of the training cases' foreground and z-scored with its
    mean and deviation; ``noNorm`` is left as it is, ``rescale_to_0_1`` and ``rgb_to_0_1`` are what they say; any other
    is z-scored case by case over its non-zero voxels. A plan says it all itself.

    With ``spacing``, images are resampled with cubic splines and labels class by class linearly, and along an axis more
    than 3 times as coarse as the finest with nearest neighbours; held-out cases keep their label on the source grid
    too, where they are scored. Volumes are not cropped to their non-zero part, and resampling is done each time a case
    is loaded. An ignore label is refused: it would be a class. Every case is brought to the plan's orientation, or
    that of the first case of all folds (axes exchanged and flipped, nothing interpolated), which is that of
    ``patch_size`` and ``spacing``.

    Args:
        root: the data set's folder; or, where ``$nnUNet_raw`` is set, a name or number in it (``Dataset027_ACDC``, 27).
        patch_size: voxels of a training patch, in array order (z, y, x); None: the plan's, or :data:`MIDDLE_PATCH`.
        spacing: mm of each axis in array order, 0 for each case's own; None: the plan's, or each case's own grid.
        strides: of each level of the network, in array order; None: the plan's, or halving every axis four times where
            the patch can be.
        kernel_sizes: of each level; empty is 3 everywhere; None: the plan's, or that.
        plan: a plan (bestiary's, or nnU-Net's JSON); ``auto``: ``bestiary_plan.yaml`` in the folder, or the
            nnUNetPlans.json in it or in ``$nnUNet_preprocessed``. What is given beside it wins.
        configuration: which of the plan's; None: ``3d_fullres``, or ``2d`` where that is not there.
        split: a named split or a file (see :mod:`bestiary.shared.data.splits`); None makes folds, nnU-Net's own.
        fold: which fold is ``val`` where no split is given.
        folds: how many folds.
        split_seed: seed of the folds. Where both are nnU-Net's (5 and 12345), a ``splits_final.json`` in the folder or
            in ``$nnUNet_preprocessed`` comes first.
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
        root: str | Path | int,
        patch_size: Sequence[int] | None = None,
        spacing: Sequence[float] | None = None,
        strides: Sequence[Sequence[int]] | None = None,
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        plan: str | Path | None = None,
        configuration: str | None = None,
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
        self.root = resolve_root(root)
        self._options = {"labels": labels, "channel_names": channel_names, "file_ending": file_ending}
        self._classes = tuple(classes) if classes is not None else None
        self._split = split
        if type(fold) is not int:
            raise ConfigError(
                f"dataset.fold={fold}: must be a whole number. `all` is a dataset.split=FILE with all cases in train"
            )
        self._folds = (fold, folds, split_seed)
        self._request = request
        if plan is None and configuration is not None:
            raise ConfigError(f"configuration={configuration} names a part of a plan: give dataset.plan too")
        self.plan = None if plan is None else read_plan(self._plan_file(str(plan)), configuration)
        if self.plan is not None:
            network = self.plan.network
            spacing = network.spacing if spacing is None else spacing
            strides = network.strides if strides is None else strides
            kernel_sizes = network.kernel_sizes if kernel_sizes is None else kernel_sizes
            patch_size = network.patch_size if patch_size is None else patch_size
        patch = tuple(int(n) for n in (MIDDLE_PATCH if patch_size is None else patch_size))
        if strides is None:
            deep = all(n % 2 ** (MIDDLE_LEVELS - 1) == 0 for n in patch)
            strides = [[1] * len(patch), *[[2] * len(patch)] * (MIDDLE_LEVELS - 1)] if deep else ()
        super().__init__(
            class_names=(),
            modalities=(),
            spacing=spacing if spacing is not None else (0.0,) * len(patch),
            patch_size=patch,
            strides=strides,
            kernel_sizes=kernel_sizes if kernel_sizes is not None else (),
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
        return checked_description(given, self.root / "dataset.json")

    def _dataset_json(self) -> dict[str, Any]:
        self.require_root()
        return read_dataset_json(self.root / "dataset.json")

    def number_of_cases(self) -> int | None:
        """``numTraining`` of dataset.json, or None."""
        try:
            number = read_dataset_json(self.root / "dataset.json").get("numTraining")
        except UserError:
            return None
        return number if isinstance(number, int) else None

    @cached_property
    def _label_map(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """A table from the file's values to class numbers, and the class names."""
        labels = self.description["labels"]
        background = next(name for name, value in labels.items() if value == 0)
        named = [n for n, _ in sorted(labels.items(), key=lambda item: item[1]) if n != background]
        kept = list(self._classes) if self._classes is not None else named
        unknown = [name for name in kept if name not in named]
        if unknown or len(set(kept)) != len(kept) or not kept:
            raise ConfigError(f"dataset.classes={kept}: must list names of {self.root} once: {', '.join(named)}")
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

    def require_root(self) -> None:
        """Raise MissingDataError, with what to do, if the folder is not there."""
        if self.root.is_dir():
            return
        if self._request:
            raise MissingDataError(self._request.strip().replace("{root}", str(self.root)))
        more = explain_missing(self.root)
        raise MissingDataError(
            f"{self.root}: there is no such folder. {more}{' ' if more else ''}Put a data set in nnU-Net's raw layout "
            "there (dataset.json, imagesTr/<case>_0000.nii.gz, labelsTr/<case>.nii.gz), or set dataset.root."
        )

    def _plan_file(self, plan: str) -> Path:
        if plan != "auto":
            return Path(plan).expanduser()
        self.require_root()
        own = self.root / FILE_NAME
        return own if own.is_file() else beside(self.root, "nnUNetPlans.json") or own

    @property
    def listing(self) -> dict[str, tuple[str, ...]]:
        """Case ids of the training folder (``Tr``) and of the test folder (``Ts``)."""
        return self._listing

    @cached_property
    def _listing(self) -> dict[str, tuple[str, ...]]:
        """Case ids by folder: ``Tr`` and ``Ts``."""
        self.require_root()
        ending = "_0000" + self.description["file_ending"]
        found = {}
        for part in ("Tr", "Ts"):
            folder = self.root / f"images{part}"
            found[part] = tuple(name[: -len(ending)] for name in names_in(folder) if name.endswith(ending))
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
            lists = self._present(load_split(self._split), f"the split {self._split}")
            return refuse_ambiguous(self.root, self._listing, lists)
        fold, folds, seed = self._folds
        own = (folds, seed) == (5, 12345)  # nnU-Net's numbers, so what it stored is meant
        if own and (stored := beside(self.root, "splits_final.json")) is not None:
            lists = self._present(load_fold(stored, fold), str(stored))
        else:
            lists = k_fold(known, fold, folds, seed)
        # A test case without a label cannot be scored.
        lists["test"] = [case for case in self._listing["Ts"] if self.label_of(case).is_file()]
        refuse_ambiguous(self.root, self._listing, lists)
        refuse_repeats(lists, f"{self.root}: with the cases of imagesTs as test")
        return lists

    def _present(self, lists: dict[str, list[str]], name: str) -> dict[str, list[str]]:
        everyone = {*self._listing["Tr"], *self._listing["Ts"]}
        absent = [case for cases in lists.values() for case in cases if case not in everyone]
        if absent:
            raise MissingDataError(
                f"{self.root}: {name} names {len(absent)} cases that are not in imagesTr: "
                f"{', '.join(absent[:5])}{' …' if len(absent) > 5 else ''}. Rename them, or give another split."
            )
        return lists

    def case_ids(self, split: str) -> list[str]:
        """See :class:`VolumeSource`."""
        return self.splits[split]

    @cached_property
    def revision(self) -> str:  # type: ignore[override]
        """A hash over the description, and names and sizes of the files; contents are not read."""
        self.require_root()
        digest = hashlib.sha256(json.dumps(self.description, sort_keys=True).encode())
        for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            base = self.root / folder
            for path in sorted(base.iterdir()) if base.is_dir() else []:
                digest.update(f"{folder}/{path.name}:{path.stat().st_size}\n".encode())
        return digest.hexdigest()[:16]

    def check(self) -> None:
        """Check that files, pairs and headers fit, and the values of labels until one has foreground.

        Raises:
            MissingDataError: for what is not there.
            BadDataError: for what is there and wrong; the message names the file.
        """
        self.require_root()
        self.spec()
        if self._split is None and (self.root / "imagesTr").is_dir():
            self._check_names()
        for cases in self.splits.values():
            for case in cases:
                check_case(case, self.images_of(case), self.label_of(case), self.spacing, self.axes())
        table = self._label_map[0]
        if not any(table[self._read_label(case)[0]].any() for case in self.splits["train"]):
            raise BadDataError(
                f"{self.label_of(self.splits['train'][0]).parent}: no training case has a voxel of "
                f"{', '.join(self.class_names[1:])}: there is nothing to learn. Correct the labels, or dataset.classes."
            )

    def _check_names(self) -> None:
        if faults := layout_faults(self.root, self.description["file_ending"], len(self.modalities))[0]:
            lines = first_faults([text for _, text in faults])
            raise BadDataError(f"{self.root}: files do not fit together (a dataset.split picks some):\n{lines}")

    # Voxels

    @cached_property
    def _axes(self) -> str:
        if self.plan is not None and self.plan.axes is not None:
            return self.plan.axes
        named = {case for cases in self.splits.values() for case in cases}
        first = next(case for case in (*self._listing["Tr"], *self._listing["Ts"]) if case in named)  # in every fold
        return pre.axis_codes(pre.read_header(self.images_of(first)[0], len(self.patch_size)))

    def axes(self) -> str:
        """See :class:`VolumeSource`; a header is read, no voxel."""
        return self._axes

    def _read_label(self, case_id: str) -> tuple[np.ndarray, pre.Header]:
        path = self.label_of(case_id)
        values, header = pre.read_volume(path, len(self.patch_size), self.axes())
        top = len(self.description["labels"]) - 1
        whole = np.rint(values)
        if np.abs(values - whole).max() > 1e-3 or whole.min() < 0 or whole.max() > top:
            raise BadDataError(
                f"{path}: label values run from {values.min():g} to {values.max():g}; allowed are whole numbers from 0 "
                f"to {top}. Correct the file or dataset.json."
            )
        return whole.astype(np.int16), header

    def _read_images(self, case_id: str) -> list[np.ndarray]:
        return [pre.read_volume(path, len(self.patch_size), self.axes())[0] for path in self.images_of(case_id)]

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
            affine = rescaled(affine, np.array(label.shape) / np.array(shape))
            image = pre.resample_image(image, shape, apart)
            label = pre.resample_label(label, shape, apart)
            spacing = tuple(t or s for t, s in zip(self.spacing, spacing, strict=True))
        return Volume(id=case_id, image=image, label=label, affine=affine, spacing=spacing, meta=meta)

    def own_normalization(self) -> tuple[pre.Normalization, ...]:
        """See :class:`RecordedFolder`. The first call for a CT channel reads the training cases; the result is kept."""
        names = self.description["channel_names"]
        if self.plan is not None:
            self._fits_plan(names, self.plan)
            return self.plan.normalization
        kinds = [name.casefold() for name in names]
        stats = self._ct_schemes if "ct" in kinds else {}
        return tuple(stats.get(c) or pre.NAMED_CHANNELS.get(kind, pre.ZSCORE) for c, kind in enumerate(kinds))

    def _fits_plan(self, names: list[str], plan: Plan) -> None:
        made_for = plan.channel_names or ("?",) * len(plan.normalization)
        if len(made_for) != len(names) or (plan.channel_names is not None and list(made_for) != names):
            raise ConfigError(
                f"{plan.file}: is a plan for the channels {', '.join(made_for)}, and {self.root.name} has "
                f"{', '.join(names)}"
            )

    @cached_property
    def _ct_schemes(self) -> dict[int, dict[str, Any]]:
        """The normalisation of each CT channel from the training cases' foreground."""
        found = [record.foreground for record in map(self._record, self.splits["train"]) if record.foreground]
        if not found:
            raise BadDataError(f"{self.root / 'labelsTr'}: no training case has foreground, so CT has no statistics")
        names = self.description["channel_names"]
        return {
            c: ct_scheme(statistics([case[c] for case in found]))
            for c, name in enumerate(names)
            if name.casefold() == "ct"
        }

    def _record(self, case_id: str) -> CaseRecord:
        """What the fingerprint takes from a case, read once and kept."""
        files = (*self.images_of(case_id), self.label_of(case_id))
        top, dims = max(self.description["labels"].values()), len(self.patch_size)
        stores = [store_of(files, largest, dims) for largest in (None, top)]
        for store in stores:
            if store is not None and (known := load_record(store)) is not None:
                return known[0]
        values, header = self._read_label(case_id)
        record = describe(self._read_images(case_id), values, header)
        if stores[0] is not None:
            save_record(stores[0], record)
        return record
