"""The end of a segmentation run: scores per class beside baselines, an overlay, the curves."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from bestiary.shared.data.preprocess import Header, reorient, resample_image
from bestiary.shared.viz.curves import plot_curves
from bestiary.shared.viz.overlay import save_overlay

MOST_COLUMNS = 14
"""Columns that still fit beside each other."""


def segmentation_report(model: nn.Module, run: Any, name: str) -> list[str]:
    """Draw overlay.png and curves.png into the run folder, and lay the scores out as a table.

    Args:
        model: the trained SegmentationModel.
        run: the :class:`~bestiary.shared.core.runs.FinishedRun`.
        name: what to call the model.

    Returns:
        Lines to print.
    """
    example: Any = run.source.held_out(run.split)[0]
    classes = tuple(model.spec.class_names)  # type: ignore[union-attr]
    _, prediction = next(p.first for p, _ in run.evaluations.values() if getattr(p, "first", None) is not None)
    captioned = [*classes[1:]] if len(classes) <= MOST_COLUMNS else ["mean"]
    dice = {c: run.metrics[key] for c in captioned if (key := f"{run.split}/dice/{c}") in run.metrics}
    image, meta = np.asarray(example["image"][:1]), example["meta"]
    reference, spacing = np.asarray(example["label"][0]), meta.get("spacing")
    if "source_label" in meta:  # scored, and so drawn, on the grid the file had
        reference, spacing = np.asarray(meta["source_label"])[0], meta["source_spacing"]
        image = resample_image(image, reference.shape)
    layers, axes = np.stack([image[0], prediction, reference]), None
    if reference.ndim == 3 and spacing is not None and "affine" in example:
        layers, placed = reorient(layers, Header(reference.shape, tuple(spacing), np.asarray(example["affine"])), "RAS")
        spacing, axes = placed.spacing, "RAS"
    overlay = save_overlay(
        run.folder / "overlay.png",
        layers[0],
        layers[1].astype(np.int64),
        classes,
        spacing,
        reference=layers[2].astype(np.int64),
        dice=dice,
        title=f"{name}, held out: {example['id']}",
        axes=axes,
    )
    files = {name: run.folder, **run.compared}
    curves = plot_curves({k: v / "metrics.csv" for k, v in files.items()}, run.folder / "curves.png", title=name)
    # A source's baselines are keyed by the protocol alone, a run's metrics by the split too.
    rows = {name: run.metrics} | run.baselines
    rows = {label: {k.removeprefix(f"{run.split}/"): v for k, v in row.items()} for label, row in rows.items()}
    where = "held-out Dice" if run.split == "test" else "Dice on the validation part (there is no test part)"
    lines = [where + ("" if run.scope == "full" else f" ({run.scope})")]
    lines += score_table(rows, [*classes[1:], "mean"])
    lines += _surface(rows[name])
    return [*lines, "", f"overlay     {overlay}", f"curves      {curves}"]


def score_table(rows: dict[str, dict[str, float]], columns: list[str]) -> list[str]:
    """Dice as aligned text; where there are many columns, they stand below each other.

    Args:
        rows: row name to metrics with keys ``dice/<column>``.
        columns: classes, and ``mean``.
    """
    if len(columns) > MOST_COLUMNS:
        return _tall_table(rows, columns)
    width = max(len(label) for label in rows)
    cell = max(7, *(len(c) + 1 for c in columns))
    lines = [" " * width + "".join(f"{c:>{cell}}" for c in columns)]
    for label, metrics in rows.items():
        values = [metrics.get(f"dice/{c}", float("nan")) for c in columns]
        lines.append(f"{label:<{width}}" + "".join(f"{v:>{cell}.3f}" for v in values))
    return lines


def _tall_table(rows: dict[str, dict[str, float]], columns: list[str]) -> list[str]:
    """One line a class, one column a row, and the quarters by volume where they were scored."""
    quarters = [f"quarter_{n}" for n in range(1, 5) if any(f"dice/quarter_{n}" in row for row in rows.values())]
    columns = [*columns, *quarters]
    width = max(len(c) for c in columns)
    lines = [" " * width + "".join(f"  {label:>7}" for label in rows)]
    for c in columns:
        cells = (f"{row.get(f'dice/{c}', float('nan')):.3f}".rjust(max(7, len(label))) for label, row in rows.items())
        lines.append(f"{c:<{width}}" + "".join(f"  {cell}" for cell in cells))
    return [*lines, "quarter_1 has the smallest structures"] if quarters else lines


def _surface(metrics: dict[str, float]) -> list[str]:
    shown = {"hd95/mean": "HD95 {:.2f} mm", "nsd/mean": "NSD {:.3f}"}
    found = [text.format(metrics[key]) for key, text in shown.items() if key in metrics]
    return ["mean surface scores: " + ", ".join(found)] if found else []
