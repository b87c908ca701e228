"""Pictures of a segmentation: the image in grey with labels over it, in three planes."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.core.errors import require

OPACITY = 0.5
LEGEND_ENTRIES = 36
ANATOMICAL = {
    "z": ("axial", "A", "P", "L", "R"),
    "y": ("coronal", "S", "I", "L", "R"),
    "x": ("sagittal", "S", "I", "P", "A"),
}
"""What a plane across an axis of a volume that lies as RAS is called; and its top, bottom, left and right."""


def save_overlay(
    path: Path | str,
    image: np.ndarray,
    prediction: np.ndarray,
    class_names: Sequence[str],
    spacing: Sequence[float] | None = None,
    reference: np.ndarray | None = None,
    dice: Mapping[str, float] | None = None,
    title: str = "",
    axes: str | None = None,
) -> Path:
    """Draw the prediction, and the reference in the row below where there is one.

    A volume is cut through the middle of its labelled voxels; a 2D image is drawn whole. The legend names the classes
    that are to be seen, the largest first where there are many.

    Args:
        path: the PNG to write.
        image: (*S) one channel, (z, y, x) or (y, x).
        prediction: (*S) class numbers.
        class_names: background first.
        spacing: mm of each axis, for the proportions.
        reference: (*S) class numbers.
        dice: ``{class name: Dice}`` for the caption.
        title: first line of the caption.
        axes: how the volume lies; one that lies as ``RAS`` gets its planes' names and sides.

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
    planes = middle_planes(labels.get("reference", labels["prediction"]))
    low, high = np.percentile(image, [0.5, 99.5])
    grey = np.clip((image - low) / max(float(high - low), 1e-8), 0, 1)
    colours = class_colours(len(class_names))

    figure = figure_module.Figure(figsize=(3.6 * len(planes) + 0.4, 3.5 * len(labels) + 1.0), layout="constrained")
    panels = figure.subplots(len(labels), len(planes), squeeze=False)
    for row, (kind, label) in zip(panels, labels.items(), strict=True):
        for axis, (cut, name, shown) in zip(row, planes, strict=True):
            aspect = spacing[shown[0]] / spacing[shown[1]]
            axis.imshow(_blend(grey[cut], label[cut], colours), origin="lower", aspect=aspect, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"{kind}, {name}" if name else kind, fontsize=9)
            if axes == "RAS" and label.ndim == 3:
                _name_sides(axis, name[0], f"{kind}, {{}}, {name}")
    seen = np.concatenate([label[cut].ravel() for label in labels.values() for cut, _, _ in planes])
    counts = np.bincount(seen, minlength=len(class_names))[: len(class_names)]
    counts[0] = 0
    present = sorted(np.argsort(-counts, kind="stable")[: min(int((counts > 0).sum()), LEGEND_ENTRIES)].tolist())
    handles = [patches.Patch(color=colours[c], label=class_names[c]) for c in present]
    left_out = int((counts > 0).sum()) - len(present)
    if left_out:
        handles.append(patches.Patch(color="none", label=f"and {left_out} more"))
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8, frameon=False
        )
    caption = [title] if title else []
    if dice:
        scores = [f"{name} {value:.3f}".replace(" ", "\xa0") for name, value in dice.items()]
        caption += textwrap.wrap("Dice  " + "  ".join(scores), 150, max_lines=4, placeholder=" …")
    # A file's name may hold a $, and signs that no font here has.
    figure.suptitle("\n".join(caption), fontsize=10, parse_math=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=110)
    return path


def _name_sides(axis: Any, across: str, title: str) -> None:
    effects: Any = require("matplotlib.patheffects", "zoo")
    outline = [effects.withStroke(linewidth=2, foreground="black")]
    plane, *sides = ANATOMICAL[across]
    axis.set_title(title.format(plane), fontsize=9)
    for side, (x, y) in zip(sides, ((0.5, 0.97), (0.5, 0.03), (0.03, 0.5), (0.97, 0.5)), strict=True):
        style = {"color": "white", "fontsize": 8, "ha": "center", "va": "center", "path_effects": outline}
        axis.text(x, y, side, transform=axis.transAxes, **style)


def class_colours(classes: int) -> np.ndarray:
    """RGB of each class, (classes, 3) in 0 to 1; class 0 is not drawn."""
    matplotlib: Any = require("matplotlib", "zoo")
    if classes <= 11:
        colours = np.array(matplotlib.colormaps["tab10"].colors)
    else:
        colours = np.array(matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, classes - 1)))[:, :3]
    return np.concatenate([np.zeros((1, 3)), colours])[:classes]


def middle_planes(label: np.ndarray) -> list[tuple[tuple[Any, ...], str, tuple[int, int]]]:
    """The planes through the middle of what is labelled: (index, name, the two axes shown) of each; 2D has one.

    Args:
        label: (*S) class numbers.
    """
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
