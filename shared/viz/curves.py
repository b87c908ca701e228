"""Learning curves from the metrics.csv that Lightning's CSVLogger writes, several stages in one picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import BadDataError, MissingDataError, require

HELD_OUT = ("val", "test", "eval", "held_out")
"""Prefixes of the columns that are measured on held-out data."""

Series = dict[str, list[tuple[float, float]]]
"""``{column: [(step, value), ...]}``"""


def read_metrics(path: Path | str) -> Series:
    """Read one metrics.csv; empty cells and repeated header lines are skipped, NaN is kept out.

    Raises:
        MissingDataError: if there is no such file.
        BadDataError: if it has no column ``step``.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingDataError(f"{path}: there is no such file. It is written during training by logger=csv.")
    out: Series = {}
    with open(path, newline="") as handle:
        reader = csv.DictReader(handle)
        if "step" not in (reader.fieldnames or []):
            raise BadDataError(f"{path}: has no column 'step'; it is not a metrics.csv of Lightning's CSVLogger")
        for row in reader:
            step = _number(row["step"])
            for key, text in row.items():
                value = _number(text)
                if key in (None, "step", "epoch") or step is None or value is None:
                    continue
                out.setdefault(key, []).append((step, value))
    return out


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def find_metrics(run: Path | str) -> dict[str, Path]:
    """All metrics.csv under a run's folder by the name of their stage, the oldest first."""
    run = Path(run)
    files = sorted(run.rglob("metrics.csv"), key=lambda p: (p.stat().st_mtime, str(p)))
    if not files:
        raise MissingDataError(f"{run}: holds no metrics.csv. Train with logger=csv, or name the run's own folder.")
    return {str(file.parent.relative_to(run)) if file.parent != run else run.name: file for file in files}


def plot_curves(metrics: Path | str | Mapping[str, Path | str], path: Path | str, title: str = "") -> Path:
    """Draw training losses on the left and held-out metrics on the right; stages follow each other along the steps.

    Args:
        metrics: one metrics.csv, a run's folder, or ``{stage: metrics.csv}`` in the order they were run.
        path: the PNG to write.
        title: of the picture.

    Returns:
        The path written.

    Raises:
        MissingDataError: if nothing is there to draw.
    """
    figure_module: Any = require("matplotlib.figure", "zoo")
    require("matplotlib.backends.backend_agg", "zoo")
    if isinstance(metrics, Mapping):
        files = {stage: Path(file) for stage, file in metrics.items()}
    else:
        files = find_metrics(metrics) if Path(metrics).is_dir() else {"": Path(metrics)}
    stages = {stage: read_metrics(file) for stage, file in files.items()}
    figure = figure_module.Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    offset, drawn = 0.0, 0
    for stage, series in stages.items():
        end = offset
        for key, points in sorted(series.items()):
            held_out = key.startswith(HELD_OUT)
            if not held_out and "loss" not in key:
                continue
            steps = [offset + step for step, _ in points]
            marker = "o" if held_out or len(points) == 1 else None
            name = f"{stage}: {key}" if len(stages) > 1 else key
            (right if held_out else left).plot(steps, [v for _, v in points], marker=marker, markersize=3, label=name)
            drawn += 1
            end = max(end, steps[-1])
        if offset:
            for axis in (left, right):
                axis.axvline(offset, color="0.8", linewidth=0.8)
        offset = end + 1
    if not drawn:
        raise MissingDataError(f"{', '.join(map(str, files.values()))}: no losses or held-out metrics in it yet")
    for axis, name in ((left, "training loss"), (right, "held-out metrics")):
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    if title:
        figure.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
