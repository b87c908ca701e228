"""Masks against references, folder against folder, whoever made them: no model and no run is needed."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.core.checkpoint import aside_of, make_folder, write_json
from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError, UserError
from bestiary.shared.data import preprocess as pre
from bestiary.shared.data.nifti_open import why_no_file
from bestiary.shared.data.nnunet_description import read_dataset_json
from bestiary.shared.data.nnunet_layout import check_same_grid, names_in
from bestiary.shared.data.user_files import first_faults
from bestiary.shared.metrics.segmentation import VolumeProtocol

_NAME = re.compile(r"(?P<case>.+?)\.nii(?:\.gz)?")
MOST_VALUES = 4096
"""Classes that are taken from the values alone; larger values are no labels, or need names."""


@dataclass(frozen=True)
class Classes:
    """Names, background first, and the class number of each value that a file may hold."""

    names: tuple[str, ...]
    numbers: np.ndarray


def score_folders(options: Any) -> dict[str, float]:
    """What tools/eval_model.py does with ``predictions=``: score, print, and write scores.csv and scores.json.

    Args:
        options: conf/score.yaml with its arguments.

    Returns:
        The means, as :class:`VolumeProtocol` names them.

    Raises:
        MissingDataError: if a reference has no prediction; the message lists them.
        BadDataError: for files that cannot be read, lie on other grids, or hold other values.
        ConfigError: for an option that cannot be.
    """
    predictions, labels = (Path(str(options[key])).expanduser() for key in ("predictions", "labels"))
    pairs, extra = pair_up(predictions, labels)
    protocol = VolumeProtocol(
        empty_rule=str(options.empty_rule),
        hd95=_flag(options, "hd95"),
        nsd=_flag(options, "nsd"),
        nsd_tolerance_mm=_number(options, "nsd_tolerance_mm"),
    )
    out = predictions if options.out is None else Path(str(options.out)).expanduser()
    make_folder(out, "out=…")
    wanted = _names(options.classes)
    joined = find_classes(predictions, labels, options.dataset_json, wanted)
    answers, classes = joined or (_by_value(pairs, wanted),) * 2
    scores: dict[str, dict[str, list[float]]] = {}
    faults: list[str] = []
    for case, (predicted, reference) in pairs.items():
        try:
            scores[case] = _score(predicted, reference, answers, classes, protocol)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise BadDataError(f"{len(faults)} of {len(pairs)} cases cannot be scored:\n{first_faults(faults)}")
    means = protocol.summary(list(scores.values()), classes.names)
    rows = [
        {"case": case, "class": name, **{m: found[m][index] for m in protocol.metrics}}
        for case, found in scores.items()
        for index, name in enumerate(classes.names[1:])
    ]
    _write_csv(out / "scores.csv", rows)
    rule = {"name": protocol.name, "version": protocol.version, "empty_rule": protocol.empty_rule}
    rule["nsd_tolerance_mm"] = protocol.nsd_tolerance_mm  # type: ignore[assignment]
    write_json(out / "scores.json", {"protocol": rule, "cases": len(scores), "metrics": means})
    _print(means, classes.names, protocol, len(scores))
    if extra:
        print(f"{len(extra)} predictions have no reference and are not scored: {', '.join(extra[:5])}")
    print(f"written to {out / 'scores.csv'} and {out / 'scores.json'}")
    return means


def pair_up(predictions: Path, labels: Path) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Prediction and reference of each case by name, and the predictions that have no reference.

    Raises:
        MissingDataError: for a folder that is not there or empty, and for references without a prediction.
        BadDataError: for two files of one case, and for a name with no file behind it.
    """
    wanted, found = _files(labels), _files(predictions)
    pairs: dict[str, tuple[Path, Path]] = {}
    missing = []
    for case, reference in wanted.items():
        # A reference may itself be named <case>_seg, as BraTS's are: then so is the prediction, or <case>_seg_seg.
        names = [case] if f"{case}_seg" in wanted else [case, f"{case}_seg"]
        there = [found[name] for name in names if name in found]
        if len(there) > 1:
            raise BadDataError(f"{predictions}: {there[0].name} and {there[1].name} are both of case {case}. Keep one.")
        if there:
            pairs[case] = (there[0], reference)
        else:
            missing.append(case)
    if missing:
        raise MissingDataError(
            f"{predictions}: {len(missing)} of {len(wanted)} references have no prediction "
            f"(<case>.nii.gz or <case>_seg.nii.gz):\n{first_faults(missing)}"
        )
    used = {prediction for prediction, _ in pairs.values()}
    return pairs, [name.removesuffix("_seg") for name, path in found.items() if path not in used]


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise MissingDataError(f"{folder}: there is no such folder")
    out: dict[str, Path] = {}
    for name in names_in(folder):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        if not (folder / name).is_file():
            raise BadDataError(f"{folder / name}: {why_no_file(folder / name)}")
        case = match["case"]
        if case in out:
            raise BadDataError(f"{folder}: {out[case].name} and {name} are both of case {case}. Keep one.")
        out[case] = folder / name
    if not out:
        raise MissingDataError(f"{folder}: holds no NIfTI file")
    return out


def find_classes(
    predictions: Path, labels: Path, dataset_json: str | None, wanted: Sequence[str] | None
) -> tuple[Classes, Classes] | None:
    """Classes of the predictions' values and of the references', joined by name; None where nothing names them.

    The predictions' values are those of the dataset.json beside them, which tools/predict.py and nnU-Net write, and of
    the references' without one.

    Args:
        predictions, labels: the folders.
        dataset_json: that of the references; None looks beside them.
        wanted: names of those that are scored; None is all that both sides have.

    Raises:
        BadDataError: for a dataset.json whose labels are not single numbers, and for two that share no name.
        ConfigError: for a name that one lacks, and where the predictions' values alone are named.
    """
    places = [labels / "dataset.json", labels.parent / "dataset.json"]
    path = Path(dataset_json).expanduser() if dataset_json else next((p for p in places if p.is_file()), None)
    theirs = predictions / "dataset.json"
    if path is not None:
        truth = _values(path)
    elif not theirs.is_file():
        return None
    elif wanted is None:
        raise ConfigError(
            f"{labels}: no dataset.json says what its values are, and a model may number them otherwise ({theirs}). "
            "Give dataset_json=FILE, or classes= with the names of the values 1, 2, …"
        )
    else:
        truth = {"background": 0, **{name: value for value, name in enumerate(wanted, start=1)}}
    answers = _values(theirs) if theirs.is_file() else truth
    named = [name for name, value in sorted(truth.items(), key=lambda item: item[1]) if value]
    kept = list(wanted) if wanted is not None else [name for name in named if answers.get(name)]
    if wanted is None and not kept:
        raise BadDataError(f"{theirs} and {path}: have no name in common: {', '.join(answers)}; {', '.join(truth)}")
    for known in (truth, answers):
        foreground = [name for name, value in known.items() if value]
        if not kept or not set(kept) <= set(foreground) or len(set(kept)) != len(kept):
            whose = "" if known is truth else f" of {theirs}"
            raise ConfigError(
                f"classes={','.join(kept)}: must name one or more of {', '.join(foreground)}{whose}, each once"
            )
    if len(kept) < len(named) and wanted is None:
        print(f"not scored, as the predictions do not have them: {', '.join(n for n in named if n not in kept)}")
    return _classes(answers, kept), _classes(truth, kept)


def _values(path: Path) -> dict[str, int]:
    values = read_dataset_json(path).get("labels")
    if not isinstance(values, dict) or not all(type(v) is int and v >= 0 for v in values.values()) or len(values) < 2:
        raise BadDataError(f"{path}: labels must map two names or more to one number each, 0 or more. Correct them.")
    if 0 not in values.values() or len(set(values.values())) < len(values):
        raise BadDataError(f"{path}: labels must name the background, which is 0, and each value once: {values}")
    return values


def _classes(values: dict[str, int], kept: Sequence[str]) -> Classes:
    numbers = np.full(max(values.values()) + 1, -1, dtype=np.int16)
    for name, value in values.items():
        numbers[value] = kept.index(name) + 1 if name in kept else 0
    return Classes(("background", *kept), numbers)


def _by_value(pairs: dict[str, tuple[Path, Path]], wanted: Sequence[str] | None) -> Classes:
    """Classes without a description: the names given, or the values themselves up to the largest of a reference."""
    if wanted is not None and (not wanted or len(set(wanted)) != len(wanted)):
        raise ConfigError(f"classes={','.join(wanted)}: must name the values 1, 2, …, each once")
    if wanted is None:
        tops = {path: int(np.rint(pre.read_volume(path, _dims(path))[0].max())) for _, path in pairs.values()}
        largest = max(tops, key=lambda path: tops[path])
        if (top := tops[largest]) > MOST_VALUES:
            raise BadDataError(f"{largest}: has the value {top}. Is it a label map? Give dataset_json= if it is.")
        wanted = [str(value) for value in range(1, top + 1)]
    if not wanted:
        raise BadDataError(
            f"{next(iter(pairs.values()))[1].parent}: every reference is empty: there is nothing to score"
        )
    return Classes(("background", *wanted), np.arange(len(wanted) + 1, dtype=np.int16))


def _dims(path: Path) -> int:
    try:
        pre.read_header(path, 2)
    except BadDataError:
        return 3
    return 2


def _score(
    predicted: Path, reference: Path, answers: Classes, classes: Classes, protocol: VolumeProtocol
) -> dict[str, list[float]]:
    dims = _dims(reference)
    truth, want = pre.read_volume(reference, dims)
    answer, got = pre.read_volume(predicted, dims)
    check_same_grid(predicted, got, reference, want)
    answered, expected = _numbers(answer, answers, predicted), _numbers(truth, classes, reference)
    return protocol.score_case(answered, expected, want.spacing, num_classes=len(classes.names))


def _numbers(values: np.ndarray, classes: Classes, path: Path) -> np.ndarray:
    whole = np.rint(values)
    if np.abs(values - whole).max() > 1e-3:
        raise BadDataError(f"{path}: has values that are no whole numbers. Was it interpolated, or are they scores?")
    present = np.unique(whole).astype(np.int64)
    wrong = [int(v) for v in present if not 0 <= v < len(classes.numbers) or classes.numbers[v] < 0]
    if wrong:
        raise BadDataError(
            f"{path}: has the values {', '.join(map(str, wrong[:10]))}, which are no class. Correct it or the names."
        )
    return classes.numbers[whole.astype(np.int64)].astype(np.int64)


def _write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    with aside_of(file) as aside, open(aside, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _print(means: dict[str, float], names: Sequence[str], protocol: VolumeProtocol, cases: int) -> None:
    width = max(len(name) for name in (*names[1:], "mean"))
    print(f"{cases} cases, empty_rule {protocol.empty_rule}; HD95 in mm, NSD at {protocol.nsd_tolerance_mm:g} mm")
    print(" " * width + "".join(f"{metric:>9}" for metric in protocol.metrics))
    for name in (*names[1:], "mean"):
        print(f"{name:<{width}}" + "".join(f"{means[f'{metric}/{name}']:>9.4f}" for metric in protocol.metrics))


def _names(value: Any) -> list[str] | None:
    if value in (None, "null"):
        return None
    text = str(value).strip().removeprefix("[").removesuffix("]")
    return [part.strip() for part in text.split(",") if part.strip()]


def _flag(options: Any, key: str) -> bool:
    text = str(options[key]).lower()
    if text not in ("true", "false"):
        raise ConfigError(f"{key} is true or false, not {options[key]!r}")
    return text == "true"


def _number(options: Any, key: str) -> float:
    try:
        return float(options[key])
    except ValueError as error:
        raise ConfigError(f"{key} is a number, not {options[key]!r}") from error
