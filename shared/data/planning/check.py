"""A whole folder in nnU-Net's raw layout, every file of it: all that is wrong, in one report."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from bestiary.shared.core.errors import BadDataError, UserError
from bestiary.shared.data import preprocess as pre
from bestiary.shared.data.nnunet_folder import NnUNetFolder
from bestiary.shared.data.nnunet_layout import Found, cases_of, image_names, layout_faults
from bestiary.shared.data.planning.cases import CaseFiles, CaseRecord, Examined, examine

ORDER = ("dataset.json", "pairs", "duplicates", "files", "geometry", "labels", "images")


@dataclass
class Report:
    """What a folder is like.

    Attributes:
        root: the folder.
        cases: how many training cases there are.
        dims: 2 or 3.
        faults: what must be mended. warnings: what may be meant so.
        records: of the training cases without a fault, by id.
    """

    root: Path
    cases: int = 0
    dims: int = 3
    faults: Found = field(default_factory=list)
    warnings: Found = field(default_factory=list)
    records: dict[str, CaseRecord] = field(default_factory=dict)

    def text(self) -> str:
        """All faults and warnings, by kind."""
        lines = [
            f"{self.root}: {_count(self.faults, 'error')} and {_count(self.warnings, 'warning')} in {self.cases} cases"
        ]
        for title, found in (("errors", self.faults), ("warnings", self.warnings)):
            for kind in sorted({kind for kind, _ in found}, key=ORDER.index):
                texts = [text for k, text in found if k == kind]
                lines.append(f"{title}, {kind} ({len(texts)}):")
                lines += [f"  {text.replace(f'{self.root}{os.sep}', '')}" for text in texts]
        return "\n".join(lines)

    def refuse(self) -> None:
        """Raise BadDataError with the whole report, if there is a fault."""
        if self.faults:
            raise BadDataError(f"{self.text()}\nnothing was written: mend the errors, and run this again")


def _count(found: Found, noun: str) -> str:
    return f"{len(found)} {noun}{'' if len(found) == 1 else 's'}"


def check_folder(source: NnUNetFolder, workers: int = 1) -> Report:
    """Read every file of a folder and report all that is wrong with it.

    What was read of a case without faults is kept under ``$BESTIARY_DATA/cache``: after a stop, or with more cases,
    only the others are read.

    Args:
        source: the folder; its split does not matter.
        workers: processes that read.

    Raises:
        MissingDataError: if the folder is not there.
    """
    source.require_root()
    report = Report(source.root)
    report.faults += _description_faults(source)
    top = None if report.faults else max(source.description["labels"].values())
    if (source.root / "imagesTr").is_dir():  # a data set as it was downloaded has its own names
        if report.faults:
            source = _guessed(source)
        description = source.description
        names, notes = layout_faults(source.root, description["file_ending"], len(description["channel_names"]))
        report.faults += names
        report.warnings += notes
        number, there = source.number_of_cases(), len(cases_of(source.root))
        if number is not None and number != there:
            text = f"{source.root / 'dataset.json'}: numTraining is {number}, and there are {there} training cases"
            report.warnings.append(("dataset.json", text))
    elif report.faults:
        return report
    try:
        train, test = source.listing["Tr"], source.listing["Ts"]
    except UserError as error:
        report.faults.append(("pairs", str(error)))
        return report
    report.cases, report.dims = len(train), _dims(source)
    jobs = [CaseFiles(c, tuple(source.images_of(c)), source.label_of(c), report.dims, top) for c in train]
    for case in test:
        label = source.label_of(case)
        jobs.append(CaseFiles(case, tuple(source.images_of(case)), label if label.exists() else None, report.dims, top))
    learnt = set(train)
    for done in _examined(jobs, workers):
        report.faults += done.faults
        report.warnings += done.warnings
        if done.record is not None and done.id in learnt:
            report.records[done.id] = done.record
    _whole(report)
    return report


def _examined(jobs: list[CaseFiles], workers: int) -> Iterator[Examined]:
    if workers < 2:
        yield from map(examine, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(examine, jobs)


def _whole(report: Report) -> None:
    """What only all cases together show."""
    records = list(report.records.values())
    if records and not report.faults and not any(record.foreground for record in records):
        report.faults.append(("labels", f"{report.root / 'labelsTr'}: every label is empty: there is nothing to learn"))
    codes = Counter(record.axes for record in records)
    if len(codes) > 1:
        shown = ", ".join(f"{name} {n}" for name, n in codes.most_common())
        report.warnings.append(("geometry", f"{report.root / 'imagesTr'}: orientations are mixed ({shown} cases)"))


def _description_faults(source: NnUNetFolder) -> Found:
    try:
        source.description  # noqa: B018 - reading it checks it
    except UserError as error:
        return [("dataset.json", str(error))]
    return []


def _guessed(source: NnUNetFolder) -> NnUNetFolder:
    """The folder as its file names describe it, where dataset.json does not: so that the rest can be checked too."""
    found = image_names(source.root / "imagesTr")
    channels = max((int(match["channel"]) for match in found), default=0) + 1
    endings = Counter(match["ending"] for match in found).most_common(1)
    return NnUNetFolder(
        source.root,
        labels={"background": 0, "?": 1},
        channel_names=["?"] * channels,
        file_ending=endings[0][0] if endings else ".nii.gz",
    )


def _dims(source: NnUNetFolder) -> int:
    """2 if no image has more than one slice, else 3."""
    for case in source.listing["Tr"]:
        try:
            pre.read_header(source.images_of(case)[0], 2)
        except BadDataError:
            return 3
        except UserError:
            continue
    return 2
