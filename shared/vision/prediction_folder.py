"""What a folder of predictions tells besides label maps: the names of their values, volumes, and what made them."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from bestiary.shared.core.checkpoint import aside_of, write_json
from bestiary.shared.core.errors import UserError
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.data.nifti_open import open_nifti
from bestiary.shared.data.nnunet_description import read_dataset_json

COLUMNS = ("case", "class_id", "class_name", "voxels", "volume_ml")
Volumes = Iterable[tuple[int, str, int, float]]
"""(class, name, voxels, ml) of each foreground class."""


def describe(out_dir: Path, spec: DataSpec) -> None:
    """Write ``dataset.json``, which names the values of the label maps, as nnU-Net does beside its predictions.

    A model may number its classes otherwise than the files that it is scored against.

    Raises:
        UserError: if there is one that says otherwise: the folder holds predictions of other classes, or a data set.
    """
    path = out_dir / "dataset.json"
    labels = {name: value for value, name in enumerate(spec.class_names)}
    if path.is_file():
        if (there := read_dataset_json(path).get("labels")) != labels:
            raise UserError(f"{path}: names other values, {there}, than this model's {labels}. Give another out=…")
        return
    channels = {str(number): name for number, name in enumerate(spec.modalities)}
    write_json(path, {"channel_names": channels, "labels": labels, "file_ending": ".nii.gz"})


class VolumeTable:
    """``volumes.csv``: a line for each class of each case, written as soon as the case is done.

    Several processes may add to one file. What it holds already is kept, but for lines that a stop cut short.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.changed = path, False

    def _read(self) -> dict[str, list[list[str]]]:
        rows: dict[str, list[list[str]]] = {}
        if self.path.is_file():
            with open(self.path, encoding="utf-8", errors="surrogateescape", newline="") as handle:
                for row in list(csv.reader(handle))[1:]:
                    if len(row) == len(COLUMNS):
                        rows.setdefault(row[0], []).append(row)
        return rows

    def add(self, case: str, volumes: Volumes) -> bool:
        """Add a case, or replace what the table says of it; whether it said otherwise before."""
        wanted = [[case, str(c), name, str(voxels), f"{ml:.6g}"] for c, name, voxels, ml in volumes]
        with _locked(self.path):
            rows = self._read()  # another process may have added to it
            if rows.get(case) == wanted:
                return False
            rows[case] = wanted
            with (
                aside_of(self.path) as aside,
                open(aside, "w", encoding="utf-8", errors="surrogateescape", newline="") as handle,
            ):
                lines = csv.writer(handle, lineterminator="\n")
                lines.writerow(COLUMNS)
                lines.writerows(row for of_case in rows.values() for row in of_case)
                handle.flush()
                os.fsync(handle.fileno())
        self.changed = True
        return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file that others may replace while one waits for it; it is made where it is not there."""
    while True:
        with open(path, "ab") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # released when the file closes, also by a kill
            try:
                ours = os.path.samestat(os.fstat(handle.fileno()), os.stat(path))
            except FileNotFoundError:
                ours = False
            if ours:
                yield
                return


def model_identity(model: torch.nn.Module) -> str:
    """What a model answers depends on: weights, spec and windows, as 12 hex digits; of an ensemble, those of each."""
    digest = hashlib.sha256()
    for part in (model, *getattr(model, "members", ())):
        options = [getattr(part, name, None) for name in ("sw_overlap", "mirror_tta")]
        digest.update(repr((asdict(part.spec), options)).encode())  # type: ignore[call-overload]
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def file_identity(paths: Sequence[Path]) -> str:
    """Size and content of each file, as 12 hex digits.

    Of a gzip file both ends are read, as the last bytes are a checksum of all it holds.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as handle:
            if path.name.endswith(".gz"):
                digest.update(handle.read(1 << 16))
                handle.seek(max(size - (1 << 16), 0))
                digest.update(handle.read())
            else:
                while block := handle.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()[:12]


def made_from(label: Path) -> str:
    """What :func:`~bestiary.shared.data.preprocess.write_label` noted; empty for a file that cannot be read."""
    try:
        return bytes(open_nifti(label).header["descrip"]).rstrip(b"\0").decode("ascii", "replace")
    except UserError:
        return ""
