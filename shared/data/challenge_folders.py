"""Synapse (BTCV) and ACDC as they are downloaded, or in nnU-Net's layout."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.data import preprocess as pre
from bestiary.shared.data.nifti_open import NIFTI_ENDINGS
from bestiary.shared.data.nnunet_folder import NnUNetFolder
from bestiary.shared.data.nnunet_layout import refuse_ambiguous
from bestiary.shared.data.splits import k_fold, load_split
from bestiary.shared.data.volumes import Volume

Pairs = dict[str, tuple[Path, Path]]
"""Image and label of each case of one channel."""


class ChallengeFolder(NnUNetFolder):
    """A data set that may lie as it was downloaded: a subclass says where its images and labels are then.

    A folder with ``imagesTr`` in it is read as nnU-Net's layout, whatever else it holds.
    """

    layout = ""
    """How the download lies, for the message that it is not there."""

    def find(self) -> dict[str, Pairs]:
        """The cases of the download by part (``Tr``, ``Ts``); empty where there are none."""
        raise NotImplementedError

    @cached_property
    def _downloaded(self) -> dict[str, Pairs] | None:
        """None where the folder is not there, or is in nnU-Net's layout."""
        if not self.root.is_dir() or (self.root / "imagesTr").is_dir():
            return None
        found = self.find()
        if not found.get("Tr"):
            raise MissingDataError(
                f"{self.root}: holds neither {self.layout} nor nnU-Net's layout (imagesTr/<case>_0000.nii.gz, "
                "labelsTr/<case>.nii.gz). Unpack the data set there, or set dataset.root to where it is."
            )
        return found

    @cached_property
    def _pairs(self) -> Pairs:
        return {case: pair for pairs in (self._downloaded or {}).values() for case, pair in pairs.items()}

    @cached_property
    def _listing(self) -> dict[str, tuple[str, ...]]:
        if self._downloaded is None:
            return super()._listing
        return {part: tuple(sorted(self._downloaded.get(part, {}))) for part in ("Tr", "Ts")}

    def images_of(self, case_id: str) -> list[Path]:
        """The file of a case's one channel."""
        return super().images_of(case_id) if self._downloaded is None else [self._pairs[case_id][0]]

    def label_of(self, case_id: str) -> Path:
        """The file of a case's labels."""
        return super().label_of(case_id) if self._downloaded is None else self._pairs[case_id][1]

    @cached_property
    def revision(self) -> str:  # type: ignore[override]
        """A hash over the description, and names and sizes of the files; contents are not read."""
        if self._downloaded is None:
            return super().revision
        digest = hashlib.sha256(json.dumps(self.description, sort_keys=True).encode())
        for case, pair in sorted(self._pairs.items()):
            for path in pair:
                digest.update(f"{case}/{path.name}:{path.stat().st_size if path.is_file() else 'none'}\n".encode())
        return digest.hexdigest()[:16]


class SynapseFolder(ChallengeFolder):
    """The 30 labelled CTs of "Beyond the Cranial Vault": Synapse, or BTCV.

    The download may lie as it is unpacked (``[Abdomen/]RawData/Training/img/img0001.nii.gz`` and
    ``…/label/label0001.nii.gz``), from ``Training`` or from ``img`` on, or with all files in one folder. Cases are
    called ``img0001`` in every layout.

    Args:
        root: the folder.
        intensity: ``percentiles``, nnU-Net's (clipped to the foreground's 0.5 and 99.5 percentiles over the training
            cases, then z-scored); or ``hu_window``, as 2D methods have it (clipped to a window, scaled to 0 to 1).
        hu_window: that window, in HU.
        **options: those of :class:`NnUNetFolder`.

    Raises:
        ConfigError: for another intensity, or an empty window.
    """

    layout = "the download (img/img0001.nii.gz and label/label0001.nii.gz, perhaps in RawData/Training)"

    def __init__(
        self,
        root: str | Path,
        intensity: str = "percentiles",
        hu_window: Sequence[float] = (-125.0, 275.0),
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        if intensity not in ("percentiles", "hu_window"):
            raise ConfigError(f"dataset.intensity is percentiles or hu_window, not {intensity!r}")
        if len(hu_window) != 2 or hu_window[0] >= hu_window[1]:
            raise ConfigError(f"dataset.hu_window is a lower and a higher number of HU, not {list(hu_window)}")
        self._window = tuple(float(v) for v in hu_window) if intensity == "hu_window" else None

    def own_normalization(self) -> tuple[pre.Normalization, ...]:
        """See :class:`~bestiary.shared.data.recorded_folder.RecordedFolder`."""
        if self._window is None:
            return super().own_normalization()
        # Scaling to [0, 1] is what clipping, shifting and dividing give, which a checkpoint can carry.
        low, high = self._window
        return ({"scheme": "ct", "lower": low, "upper": high, "mean": low, "std": high - low},)

    def find(self) -> dict[str, Pairs]:
        """See :class:`ChallengeFolder`."""
        bases = [self.root / part for part in ("", "Training", "RawData/Training", "Abdomen/RawData/Training")]
        folders = [(base / "img", base / "label") for base in bases] + [(base, base) for base in bases]
        for images, labels in folders:
            found: Pairs = {}
            for name in sorted(os.listdir(images)) if images.is_dir() else []:
                match = re.fullmatch(r"img(\d{4})(\.nii(?:\.gz)?)", name)
                if match:
                    ours = [labels / f"label{match[1]}{ending}" for ending in (match[2], *NIFTI_ENDINGS)]
                    found[f"img{match[1]}"] = images / name, next((p for p in ours if p.is_file()), ours[0])
            if found:
                return {"Tr": found}
        return {}


class ACDCFolder(ChallengeFolder):
    """ACDC: cine MRI of 150 patients, each labelled in end-diastole and end-systole.

    The download may lie as it is unpacked (``[database/]training/patient001/…``, ``testing/patient101/…``) or as the
    folders of the patients alone, which then are all training. A case is a patient's phase, ``patient001_frame01``;
    which frames these are is said by the patient's ``Info.cfg``. In nnU-Net's layout its cases bear the same names, and
    phase and group are not known.

    A split lists patients; both phases of one are always in one part. Folds are made by patient too.
    """

    layout = "the download (training/patient001/patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz, Info.cfg)"

    @cached_property
    def phases(self) -> dict[str, dict[str, str]]:
        """Of each downloaded case: ``patient``, ``phase`` (ED or ES) and ``group`` (DCM, HCM, MINF, NOR or RV)."""
        _ = self._downloaded
        return self._phases

    def find(self) -> dict[str, Pairs]:
        """See :class:`ChallengeFolder`."""
        self._phases: dict[str, dict[str, str]] = {}
        for base in (self.root, self.root / "database"):
            found = {part: self._patients(base / name) for part, name in (("Tr", "training"), ("Ts", "testing"))}
            if found["Tr"]:
                return found
            found = {"Tr": self._patients(base)}
            if found["Tr"]:
                return found
        return {}

    def _patients(self, folder: Path) -> Pairs:
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        cases: Pairs = {}
        for name in names:
            if not re.fullmatch(r"patient\d{3}", name) or not (folder / name).is_dir():
                continue
            info = _info(folder / name / "Info.cfg")
            for phase in ("ED", "ES"):
                case = f"{name}_frame{int(info[phase]):02d}"
                ending = next((e for e in NIFTI_ENDINGS if (folder / name / f"{case}{e}").is_file()), ".nii.gz")
                cases[case] = folder / name / f"{case}{ending}", folder / name / f"{case}_gt{ending}"
                self._phases[case] = {"patient": name, "phase": phase, "group": info.get("Group", "")}
        return cases

    @cached_property
    def splits(self) -> dict[str, list[str]]:
        """The three lists of case ids."""
        known, held = self._listing["Tr"], self._listing["Ts"]
        if self._split is None:
            lists = k_fold(sorted({_patient(case) for case in known}), *self._folds)
            lists["test"] = [case for case in held if self.label_of(case).is_file()]
        else:
            lists = load_split(self._split)
        out = {part: self._cases(part, names, (*known, *held)) for part, names in lists.items()}
        parts: dict[str, str] = {}
        for part, cases in out.items():
            for patient in {_patient(case) for case in cases}:
                if parts.setdefault(patient, part) != part:
                    raise BadDataError(
                        f"split {self._split}: {patient} is in {parts[patient]} with one phase and in {part} with the "
                        "other. List patients, not their phases."
                    )
        return refuse_ambiguous(self.root, self._listing, out)

    def _cases(self, part: str, names: Iterable[str], known: Sequence[str]) -> list[str]:
        """The cases of patients; a case stands for itself."""
        cases, absent = [], []
        for name in names:
            found = [case for case in known if name in (case, _patient(case))]
            cases += found
            absent += [] if found else [name]
        if absent:
            raise MissingDataError(
                f"{self.root}: the split's {part} names {len(absent)} patients that are not there: "
                f"{', '.join(absent[:5])}{' …' if len(absent) > 5 else ''}. Add them, or give another split."
            )
        return cases

    def load_case(self, case_id: str) -> Volume:
        """See :class:`VolumeSource`; ``meta`` tells patient, phase and group where they are known."""
        volume = super().load_case(case_id)
        if self._downloaded is not None:
            volume.meta |= self.phases[case_id]
        return volume


def _patient(case: str) -> str:
    return case.split("_")[0]


def _info(path: Path) -> dict[str, str]:
    """A patient's ``key: value`` lines."""
    if not path.is_file():
        raise MissingDataError(
            f"{path}: is missing, and says which frames are labelled. Copy the patient's folder again."
        )
    lines = (line.partition(":") for line in path.read_text(errors="replace").splitlines())
    values = {key.strip(): value.strip() for key, _, value in lines}
    bad = [key for key in ("ED", "ES") if not values.get(key, "").isdecimal()]
    if bad:
        raise BadDataError(f"{path}: gives no frame number for {' and '.join(bad)}. Copy the patient's folder again.")
    return values
