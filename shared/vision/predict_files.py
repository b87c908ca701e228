"""From NIfTI files to label maps, pictures and volumes: whatever the orientation, many files, and again after a stop.

A model is asked for three things, so an ensemble of models fits as well as one: ``spec``, ``schemes()`` and
``infer(image)``; and, where it has them, ``axes()`` and ``infer_labels(image, shape)``.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bestiary.shared.core.checkpoint import aside_of, make_folder
from bestiary.shared.core.errors import BadDataError, UserError
from bestiary.shared.data import preprocess as pre
from bestiary.shared.data.nnunet_layout import check_same_grid
from bestiary.shared.vision.prediction_folder import VolumeTable, describe, file_identity, made_from, model_identity
from bestiary.shared.viz.overlay import save_overlay

_NIFTI = re.compile(r"(?P<case>.*?)(_(?P<channel>\d{4}))?\.nii(\.gz)?")


class PartlyPredicted(UserError):
    """Some files could not be predicted; the message lists them.

    Attributes:
        written: the paths that were written for the others.
    """

    def __init__(self, message: str, written: list[Path]) -> None:
        super().__init__(message)
        self.written = written


@dataclass
class _Case:
    """One image: its name, the files of its channels, where its label goes and what made it."""

    name: str
    channels: list[Path]
    label: Path
    made_from: str = ""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def predict_files(
    model: Any,
    inputs: Sequence[Path | str],
    out_dir: Path | str,
    overwrite: bool = False,
    say: Callable[[str], None] = _to_stderr,
) -> list[Path]:
    """Segment NIfTI files.

    A file may lie in any orientation: it is brought to that of the training data, and its label back to its own grid.
    A case whose label is there, whole, and made by this very model from this very file, is skipped. A bad file costs
    the others nothing. Labels are written aside and renamed, and last: after a stop the same call goes on. Several
    processes may write into one folder.

    Args:
        model: see the top of the file; evaluation mode is switched on meanwhile.
        inputs: NIfTI files, and folders of them. An image of several channels is given by the file of the first,
            ``<case>_0000.nii.gz``, with the others beside it.
        out_dir: gets ``<case>_seg.nii.gz``, class numbers on the input's own grid; ``<case>_overlay.png``; one
            ``volumes.csv``; and ``dataset.json``, which names the class numbers.
        overwrite: replace what another model, or this one from another file, has made.
        say: takes a line about each case.

    Returns:
        The labels, pictures and table written.

    Raises:
        UserError: if there is nothing to do, two inputs would be written to one name, or the folder cannot be written
            or holds predictions of other classes.
        MissingDataError: if the only file is not there.
        BadDataError: if the only file cannot be read or has other axes or channels than the model.
        PartlyPredicted: after all others are done, if some of several could not be predicted.
    """
    out_dir = Path(out_dir)
    cases = _collect(inputs, out_dir, model.spec.in_channels)
    failed: dict[str, UserError] = {}

    def attempt(case: _Case, step: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return step(case, model, *arguments)
        except UserError as error:
            if len(cases) == 1:
                raise
            failed[case.name] = error
            say(f"not predicted: {error}")
            return None

    maker = model_identity(model)
    # What is bad is said before hours of work, and not after.
    todo = [case for case in cases if attempt(case, _check, maker) is not None]
    written: list[Path] = []
    if todo:
        make_folder(out_dir, "out=…")
        describe(out_dir, model.spec)
        table = VolumeTable(out_dir / "volumes.csv")
        training = model.training
        model.eval()
        try:
            for number, case in enumerate(todo, start=1):
                began = time.perf_counter()
                paths = attempt(case, _predict, out_dir, table, overwrite)
                if paths is None:
                    continue
                written += paths
                took = (
                    f"{time.perf_counter() - began:.1f} s" if paths else "done before (delete its label to repeat it)"
                )
                if len(todo) > 1 or not paths:
                    say(f"{number} of {len(todo)}: {case.name}: {took}")
        finally:
            model.train(training)
        if table.changed:
            written.append(table.path)
    if failed:
        listed = "".join(f"\n  {error}" for error in failed.values())
        raise PartlyPredicted(f"{len(failed)} of {len(cases)} images were not predicted:{listed}", written)
    return written


def segment(model: Any, raw: np.ndarray, header: pre.Header) -> np.ndarray:
    """Class numbers of an image, on its grid.

    Args:
        model: see the top of the file.
        raw: (C, *S) voxels as in the file, in the orientation of the training data.
        header: its grid.

    Returns:
        (*S) integers.
    """
    image = np.stack([pre.normalize(c, s) for c, s in zip(raw, model.schemes(), strict=True)])
    if pre.needs_resampling(header.spacing, model.spec.spacing):
        shape = pre.target_shape(header.shape, header.spacing, model.spec.spacing)
        image = pre.resample_image(image, shape, pre.coarse_axis(header.spacing))
    bounded = getattr(model, "infer_labels", None)
    if bounded is not None:
        return bounded(torch.from_numpy(image), header.shape)
    return pre.resampled_argmax(model.infer(torch.from_numpy(image)), header.shape).cpu().numpy()


def _collect(inputs: Sequence[Path | str], out_dir: Path, channels: int) -> list[_Case]:
    files: list[Path] = []
    for item in map(Path, inputs):
        files += _in_folder(item, out_dir) if item.is_dir() else [item]
    if not files:
        raise UserError("nothing to predict: give NIfTI files, or folders of them")
    cases: dict[str, _Case] = {}
    for file in files:
        match = _NIFTI.fullmatch(file.name)
        paths, name = [file], re.sub(r"\.nii(\.gz)?$", "", file.name)
        if match and match["channel"] == "0000":
            name = match["case"]
            paths = [file.with_name(file.name.replace("_0000.nii", f"_{c:04d}.nii")) for c in range(channels)]
        if name in cases and cases[name].channels == paths:
            continue
        if name in cases:
            both = f"{file} and {cases[name].channels[0]}"
            raise UserError(f"{both} would both be written to {name}_seg.nii.gz: rename one")
        cases[name] = _Case(name, paths, out_dir / f"{name}_seg.nii.gz")
    return list(cases.values())


def _in_folder(folder: Path, out_dir: Path) -> list[Path]:
    """The images of a folder, by name: of several channels the first."""
    if folder.resolve() == out_dir.resolve():
        raise UserError(f"{folder}: is read and written at once. Give another folder with out=…")
    names = sorted(p.name for p in folder.iterdir() if _NIFTI.fullmatch(p.name) and not p.name.startswith("."))
    if not names:
        raise UserError(f"{folder}: holds no .nii.gz or .nii file. Give the folder that the images lie in.")
    later = {n for n in names if (m := re.search(r"_(\d{4})\.nii", n)) and m[1] != "0000"}
    firsts = {re.sub(r"_\d{4}\.nii", "_0000.nii", n) for n in later} & set(names)
    return [folder / n for n in names if n not in later or re.sub(r"_\d{4}\.nii", "_0000.nii", n) not in firsts]


def _check(case: _Case, model: Any, maker: str) -> _Case:
    """Headers alone: the files are there, have the model's axes and channels, and lie on each other."""
    channels, first = model.spec.in_channels, case.channels[0]
    if len(case.channels) != channels:
        raise BadDataError(
            f"{first}: this model takes {channels} channels ({', '.join(model.spec.modalities)}). Name their files "
            f"<case>_0000.nii.gz to <case>_{channels - 1:04d}.nii.gz in that order, and give the first."
        )
    extra = first.with_name(first.name.replace("_0000.nii", f"_{channels:04d}.nii"))
    if extra != first and extra.is_file():
        raise BadDataError(
            f"{first}: {extra.name} lies beside it, and this model takes {channels} channel{'s' * (channels > 1)}. "
            "Take it away."
        )
    headers = [pre.read_header(path, model.spec.spatial_dims, _axes(model)) for path in case.channels]
    for path, header in zip(case.channels[1:], headers[1:], strict=True):
        check_same_grid(path, header, first, headers[0])
    pre.check_grid(first, headers[0], model.spec.spacing)
    case.made_from = f"bestiary {maker} {file_identity(case.channels)}"
    return case


def _axes(model: Any) -> str | None:
    axes = getattr(model, "axes", None)
    return axes() if axes is not None else None


def _predict(case: _Case, model: Any, out_dir: Path, table: VolumeTable, overwrite: bool) -> list[Path]:
    """Predict one case; what is finished already gives no paths."""
    names, first = model.spec.class_names, case.channels[0]
    if case.label.exists():
        if made_from(case.label) == case.made_from:
            if (found := _whole(case.label, model.spec.spatial_dims)) is not None:
                # The table may have been thrown away, or its lines be of what another model answered.
                table.add(case.name, _volumes(*found, names))
                return []
        elif not overwrite:
            raise UserError(
                f"{case.label}: is there, and of another model or another image. Give another out=…, or overwrite=true."
            )
    read = [pre.read_volume(path, model.spec.spatial_dims, _axes(model)) for path in case.channels]
    raw, header = np.stack([array for array, _ in read]), read[0][1]
    label = segment(model, raw, header)
    upright = "RAS" if label.ndim == 3 else pre.axis_codes(header).translate(str.maketrans("LPI", "RAS"))
    overlay = out_dir / f"{case.name}_overlay.png"
    picture, placed = pre.reorient(np.stack([raw[0], label]), header, upright)
    with _aside(overlay, ".png") as aside:
        save_overlay(
            aside,
            picture[0],
            picture[1].astype(label.dtype),
            names,
            placed.spacing,
            title=case.name,
            axes=upright,
        )
    table.add(case.name, _volumes(label, header, names))
    own = pre.read_header(first, model.spec.spatial_dims)
    label, _ = pre.reorient(label, header, pre.axis_codes(own))
    # Last: a label that is there says that all of its case is.
    with _aside(case.label, ".nii.gz") as aside:
        pre.write_label(aside, label, own, like=first, note=case.made_from)
    return [case.label, overlay]


@contextmanager
def _aside(file: Path, ending: str) -> Iterator[Path]:
    """A path of this process and with this ending, which takes the file's place once it is on the disk."""
    with aside_of(file) as plain:
        aside = plain.with_name(plain.name + ending)
        try:
            yield aside
            with open(aside, "rb") as handle:
                os.fsync(handle.fileno())
            aside.replace(plain)
        finally:
            aside.unlink(missing_ok=True)


def _whole(label: Path, dims: int) -> tuple[np.ndarray, pre.Header] | None:
    """A label map and its grid; None if it is cut short, which its header does not show."""
    try:
        values, header = pre.read_volume(label, dims)
    except BadDataError:
        return None
    return values.astype(np.int64), header


def _volumes(label: np.ndarray, header: pre.Header, names: Sequence[str]) -> list[tuple[int, str, int, float]]:
    """(class, name, voxels, ml) of each foreground class, those that do not occur included."""
    voxel_ml = abs(float(np.linalg.det(header.affine[:3, :3]))) / 1000
    counts = np.bincount(label.ravel(), minlength=len(names))
    return [(c, name, int(counts[c]), int(counts[c]) * voxel_ml) for c, name in enumerate(names) if c]
