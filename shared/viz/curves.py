"""Curves of a run: training loss and held-out metrics over steps, stage after stage."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import BadDataError, require

Series = dict[str, tuple[list[float], list[float]]]
"""Metric to (steps, values)."""

MOST_CURVES = 6

COUNTS = {"bytes", "prompts"}


def read_metrics(file: Path) -> tuple[Series, list[tuple[str, float]]]:
    """Read a run's metrics.csv.

    Args:
        file: columns ``stage`` and ``step``, then one a metric, blank where it was not measured.

    Returns:
        The metrics over steps that count on through the stages, and (name, first step) of each stage.

    Raises:
        BadDataError: if the file is not there or has other columns.
    """
    try:
        with open(file, newline="") as handle:
            rows = list(csv.DictReader(handle))
    except OSError as error:
        raise BadDataError(f"{file}: {error.strerror}") from error
    series: Series = {}
    stages: list[tuple[str, float]] = []
    offset = last = 0.0
    for row in rows:
        if "stage" not in row or "step" not in row:
            raise BadDataError(f"{file} has no columns stage and step")
        if not stages or stages[-1][0] != row["stage"]:
            offset = last
            stages.append((row["stage"], offset))
        last = offset + float(row["step"])
        for name, text in row.items():
            if name not in ("stage", "step") and text:
                steps, values = series.setdefault(name, ([], []))
                steps.append(last)
                values.append(float(text))
    return series, stages


def plot_curves(runs: Mapping[str, Path], path: Path, title: str = "") -> Path:
    """Draw training loss (left) and held-out metrics (right) of one run, or of several over each other.

    Args:
        runs: name to the run's metrics.csv.
        path: the PNG to write.
        title: above it.

    Returns:
        The path written.
    """
    figure: Any = require("matplotlib.figure", "zoo").Figure(figsize=(11, 4), layout="constrained")
    require("matplotlib.backends.backend_agg", "zoo")
    left, right = figure.subplots(1, 2)
    rewards = left.twinx()
    stages: list[tuple[str, float]] = []
    for number, (name, file) in enumerate(runs.items()):
        series, own_stages = read_metrics(file)
        stages = stages or own_stages
        loss = series.get("train/loss")
        if loss:
            left.plot(*loss, label=name, color=f"C{number}", linewidth=1.4)
        if "train/reward" in series:  # rollouts: the surrogate says nothing, the reward does, on a scale of its own
            rewards.plot(
                *series["train/reward"],
                label="reward" if len(runs) == 1 else f"{name}: reward",
                color=f"C{number}",
                linestyle="--",
                linewidth=1.4,
            )
        for index, metric in enumerate(shown_metrics(series, means=len(runs) > 1)):
            label = f"{name}: {metric}" if len(runs) > 1 else metric
            right.plot(*series[metric], "o-", label=label, color=f"C{index + number}", markersize=4)
    for axis, heading in ((left, "training"), (right, "held out (val)")):
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        for stage, first in stages if len(stages) > 1 else []:
            axis.axvline(first, color="0.6", linewidth=0.8)
            axis.annotate(stage, (first, 1), xycoords=("data", "axes fraction"), fontsize=8, va="top")
        lines = [*axis.lines, *(rewards.lines if axis is left else [])]
        lines = [line for line in lines if not line.get_label().startswith("_")]
        if lines:
            axis.legend(handles=lines, fontsize=8, frameon=False)
    for axis, what in ((left, "loss"), (rewards, "reward")):
        axis.set_ylabel(what)
        axis.yaxis.set_visible(any(not line.get_label().startswith("_") for line in axis.lines))
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
    return path


def shown_metrics(series: Series, means: bool = False) -> list[str]:
    """Which held-out metrics are drawn: Dice where there is any (other units would hide it), else the first few.

    How much a metric rests on (bytes, prompts) is no metric.

    Args:
        series: what there is.
        means: only the first mean, so that several runs can be told apart.
    """
    held_out = [name for name in series if name.startswith("val/") and not COUNTS & set(name.split("/"))]
    passed = [name for name in held_out if name.endswith("/pass@1")]
    shown = [name for name in held_out if "/dice/" in name] or passed or held_out
    if means:
        return ([name for name in shown if name.endswith("/mean")] or shown)[:1]
    return shown[:MOST_CURVES]
