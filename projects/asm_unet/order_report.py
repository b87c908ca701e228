"""What tools/analyse_orders.py does: maps, tables and pictures of the scan orders of a trained net."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bestiary.projects.asm_unet import orders as instrument
from bestiary.shared.core.checkpoint import find_checkpoint, write_json
from bestiary.shared.core.device import pick_device
from bestiary.shared.core.errors import ConfigError, UserError, require
from bestiary.shared.core.train import load_run
from bestiary.shared.data.preprocess import write_map
from bestiary.shared.viz.overlay import middle_planes

SPLITS = ("train", "val", "test")


def analyse(options: Any, overrides: Sequence[str]) -> list[str]:
    """Analyse the orders of a checkpoint's net on held-out cases.

    Writes for each case ``<case>_<block>_group<g>.nii.gz`` (0 first visited, 1 last, on the grid that the network
    sees), ``<case>_orders.png``, ``<case>_transplant.csv`` and ``<case>_transplant.png`` (Dice of every structure with
    its own and with other orders), and ``orders.json`` with shares and correlations of all.

    Args:
        options: conf/analyse_orders.yaml with its arguments.
        overrides: changes to the run's stored config.

    Returns:
        Lines to print.

    Raises:
        UserError: for a checkpoint without adaptive scan blocks, or a case that is not there.
    """
    if options.split not in SPLITS:
        raise ConfigError(f"split={options.split}: a data set has {', '.join(SPLITS)}")
    model, source, _, _ = load_run(options.checkpoint, list(overrides))
    if not instrument.adaptive_blocks(model):
        raise UserError(f"{options.checkpoint}: this net has no adaptive scan block, and so no order to look at")
    model.to(pick_device(options.device)).eval()
    folder = Path(options.out) if options.out else find_checkpoint(options.checkpoint) / "orders"
    folder.mkdir(parents=True, exist_ok=True)
    examples: Any = source.held_out(options.split)
    wanted = [index for index in range(len(examples)) if options.case in (None, examples.ids[index])]
    if not wanted:
        raise UserError(f"case={options.case}: {options.split} has {', '.join(examples.ids) or 'no case'}")
    lines, summary = [], {}
    with torch.no_grad():
        for index in wanted:
            case: Any = examples[index]
            # Where a donor is named, it is the only other example there is.
            others = examples if options.donor is None else [case, _donor(source, options.donor)]
            summary[case["id"]], said = _analyse_case(model, others, index if options.donor is None else 0, folder)
            lines += said
    write_json(folder / "orders.json", summary)
    return [*lines, "", f"written to {folder}"]


def _donor(source: Any, name: str) -> Any:
    for split in SPLITS:
        held_out = source.held_out(split)
        if len(held_out) and name in (split, *held_out.ids):
            return held_out[0 if name == split else held_out.ids.index(name)]
    raise UserError(f"donor={name}: there is no such case; give its id, or train, val or test")


def _analyse_case(model: Any, examples: Sequence[Any], index: int, folder: Path) -> tuple[dict[str, Any], list[str]]:
    case: Any = examples[index]
    image, name = case["image"], case["id"]
    maps = instrument.order_maps(model, image)
    for block, groups in maps.items():
        for g, one in enumerate(groups):
            write_map(folder / f"{name}_{_short(block)}_group{g}.nii.gz", one, case["affine"])
    shares = instrument.score_shares(model, image)
    tapes = [instrument.record_orders(model, one) for one in (image, instrument.other_image(examples, index))]
    alike = instrument.tape_correlation(*tapes)
    dice = _transplant(model, examples, index)
    names = tuple(model.spec.class_names[1:])
    volumes = [int((case["label"] == number).sum()) for number in range(1, len(names) + 1)]
    _write_table(folder / f"{name}_transplant.csv", names, volumes, dice)
    draw_maps(folder / f"{name}_orders.png", image[0].numpy(), maps, name)
    draw_drops(folder / f"{name}_transplant.png", names, volumes, dice, name)

    means = {which: scores["dice/mean"] for which, scores in dice.items()}
    lines = [
        name,
        "  share of the score's variance | rank correlation of the order with the term's, and the other image's",
    ]
    for block, s in shares.items():
        own = f"individual {s['individual']:.2f}, group {s['group']:.2f}"
        ranks = f"individual {s['individual_rank']:+.2f}, group {s['group_rank']:+.2f}, other image {alike[block]:+.2f}"
        lines.append(f"  {_short(block):<10} {own} | {ranks} | {s['distinct']:.0%} distinct scores")
    for which, mean in means.items():
        lost = "" if which == "its own" else f"  (lost {means['its own'] - mean:+.3f})"
        lines.append(f"  Dice with {which:<7} orders {mean:.3f}{lost}")
    return {"shares": shares, "rank_correlation": alike, "dice": means}, lines


def _transplant(model: Any, examples: Sequence[Any], index: int) -> dict[str, dict[str, float]]:
    """Metrics of the volume protocol with each kind of order."""
    protocol = instrument.OrderTransplant()
    case = [examples[index]]
    out = {"its own": protocol.volume(model, case)}
    for which in protocol.replacements:
        walker = instrument.Walker(model, which, examples, index)
        out[which] = protocol.volume(walker, case)
    return out


def _short(block: str) -> str:
    """``network.encoder.levels.2.mixer`` as ``encoder2``."""
    parts = [part for part in block.split(".") if part not in ("network", "levels", "mixer")]
    return "".join(parts)


def _write_table(path: Path, names: Sequence[str], volumes: Sequence[int], dice: Mapping[str, Any]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["structure", "voxels", *dice])
        for name, volume in zip(names, volumes, strict=True):
            cells = [scores[f"dice/{name}"] for scores in dice.values()]
            writer.writerow([name, volume, *("" if np.isnan(v) else f"{v:.4f}" for v in cells)])


def draw_maps(path: Path, image: np.ndarray, maps: Mapping[str, np.ndarray], title: str) -> Path:
    """Draw the image and, for each block, when its groups visit each voxel, in planes through the image's middle.

    Args:
        path: the PNG to write.
        image: (*S) one channel.
        maps: (G, *S) in 0 to 1 by block.
        title: above it.
    """
    figure_module: Any = require("matplotlib.figure", "zoo")
    require("matplotlib.backends.backend_agg", "zoo")
    cuts = middle_planes((image > np.median(image)).astype(int))
    groups = max(len(one) for one in maps.values())
    rows = [("image", [image])] + [(_short(block), list(one)) for block, one in maps.items()]
    columns = len(cuts) * groups
    figure = figure_module.Figure(figsize=(1.7 * columns + 1, 1.9 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    drawn = None
    for axis in axes.flat:
        axis.set_axis_off()
    for row, (label, volumes) in zip(axes, rows, strict=True):
        for g, volume in enumerate(volumes):
            for at, (cut, plane, _) in enumerate(cuts):
                axis = row[g * len(cuts) + at]
                if label == "image":
                    axis.imshow(volume[cut], origin="lower", cmap="gray")
                else:
                    drawn = axis.imshow(volume[cut], origin="lower", cmap="viridis", vmin=0, vmax=1)
                axis.set_title(f"{label}{'' if label == 'image' else f', group {g}'}\n{plane}", fontsize=7)
    if drawn is not None:
        figure.colorbar(drawn, ax=axes[1:], shrink=0.6, label="visited (0 first, 1 last)")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    return path


def draw_drops(
    path: Path, names: Sequence[str], volumes: Sequence[int], dice: Mapping[str, Mapping[str, float]], title: str
) -> Path:
    """Draw the Dice that every structure loses under other orders, smallest structures first.

    Args:
        path: the PNG to write.
        names: of the structures.
        volumes: their voxels.
        dice: ``its own`` and other orders to metrics with keys ``dice/<structure>``.
        title: above it.
    """
    figure_module: Any = require("matplotlib.figure", "zoo")
    require("matplotlib.backends.backend_agg", "zoo")
    order = np.argsort(volumes, kind="stable")
    figure = figure_module.Figure(figsize=(max(6.0, 0.16 * len(names) + 2), 4.5), layout="constrained")
    axis = figure.subplots()
    for which, scores in dice.items():
        if which != "its own":
            lost = [dice["its own"][f"dice/{names[i]}"] - scores[f"dice/{names[i]}"] for i in order]
            axis.plot(range(len(names)), lost, "o", markersize=3.5, label=f"{which} (mean {np.nanmean(lost):+.3f})")
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.set_xticks(range(len(names)), [names[i] for i in order], rotation=90, fontsize=5 if len(names) > 60 else 7)
    axis.set_xlim(-1, len(names))
    axis.set_ylabel("Dice lost")
    axis.legend(fontsize=8, frameon=False)
    axis.set_title(f"{title}: its own orders replaced; structures from the smallest to the largest", fontsize=9)
    figure.savefig(path, dpi=110)
    return path
