"""Pictures of a segmentation: the image in grey with labels over it, in three planes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.core.errors import require

OPACITY = 0.5


def save_overlay(
    path: Path | str,
    image: np.ndarray,
    prediction: np.ndarray,
    class_names: Sequence[str],
    spacing: Sequence[float] | None = None,
    reference: np.ndarray | None = None,
    dice: Mapping[str, float] | None = None,
    title: str = "",
) -> Path:
    """Draw the prediction, and the reference in the row below where there is one.

    A volume is cut through the middle of its labelled voxels; a 2D image is drawn whole.

    Args:
        path: the PNG to write.
        image: (*S) one channel, (z, y, x) or (y, x).
        prediction: (*S) class numbers.
        class_names: background first.
        spacing: mm of each axis, for the proportions.
        reference: (*S) class numbers.
        dice: ``{class name: Dice}`` for the caption.
        title: first line of the caption.

    Returns:
        The path written.
    """
    figure_module: Any = require("matplotlib.figure", "zoo")
    patches: Any = require("matplotlib.patches", "zoo")
    require("matplotlib.backends.backend_agg", "zoo")  # no display, and no global state of pyplot
    labels = {"prediction": np.asarray(prediction)}
    if reference is not None:
        labels["reference"] = np.asarray(reference)
    image = np.asarray(image, dtype=np.float32)
    spacing = tuple(spacing or (1.0,) * image.ndim)
    planes = _planes(labels.get("reference", labels["prediction"]))
    low, high = np.percentile(image, [0.5, 99.5])
    grey = np.clip((image - low) / max(float(high - low), 1e-8), 0, 1)
    colours = class_colours(len(class_names))

    figure = figure_module.Figure(figsize=(3.6 * len(planes) + 0.4, 3.5 * len(labels) + 1.0), layout="constrained")
    axes = figure.subplots(len(labels), len(planes), squeeze=False)
    for row, (kind, label) in zip(axes, labels.items(), strict=True):
        for axis, (cut, name, shown) in zip(row, planes, strict=True):
            aspect = spacing[shown[0]] / spacing[shown[1]]
            axis.imshow(_blend(grey[cut], label[cut], colours), origin="lower", aspect=aspect, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"{kind}, {name}" if name else kind, fontsize=9)
    present = sorted({int(v) for label in labels.values() for v in np.unique(label)} - {0})
    handles = [patches.Patch(color=colours[c], label=class_names[c]) for c in present if c < len(class_names)]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8, frameon=False
        )
    caption = [title] if title else []
    if dice:
        caption.append("Dice  " + "  ".join(f"{name} {value:.3f}" for name, value in dice.items()))
    figure.suptitle("\n".join(caption), fontsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def class_colours(classes: int) -> np.ndarray:
    """RGB of each class, (classes, 3) in 0 to 1; class 0 is not drawn."""
    matplotlib: Any = require("matplotlib", "zoo")
    if classes <= 11:
        colours = np.array(matplotlib.colormaps["tab10"].colors)
    else:
        colours = np.array(matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, classes - 1)))[:, :3]
    return np.concatenate([np.zeros((1, 3)), colours])[:classes]


def _planes(label: np.ndarray) -> list[tuple[tuple[Any, ...], str, tuple[int, int]]]:
    """(index, name, the two axes shown) of each plane."""
    if label.ndim == 2:
        return [((slice(None), slice(None)), "", (0, 1))]
    found = np.argwhere(label > 0)
    middle = np.median(found, axis=0).astype(int) if len(found) else np.array(label.shape) // 2
    planes = []
    for axis, name in enumerate("zyx"):
        cut: list[Any] = [slice(None)] * 3
        cut[axis] = int(middle[axis])
        first, second = [a for a in range(3) if a != axis]
        planes.append((tuple(cut), f"{name} = {middle[axis]}", (first, second)))
    return planes


def _blend(grey: np.ndarray, label: np.ndarray, colours: np.ndarray) -> np.ndarray:
    rgb = np.repeat(grey[..., None], 3, axis=-1)
    inside = label > 0
    rgb[inside] = (1 - OPACITY) * rgb[inside] + OPACITY * colours[np.minimum(label[inside], len(colours) - 1)]
    return rgb
