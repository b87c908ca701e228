"""Trained models of nnU-Net v2: the checkpoint with its plans and dataset.json, read without running what is in it."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bestiary.shared.core.errors import BadDataError, MissingDataError
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.data.nnunet_description import checked_description
from bestiary.shared.data.nnunet_paths import nnunet_folder_of
from bestiary.shared.data.planning.plan import Plan, plan_from

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth")
"""What is taken from a folder, the first that is there."""


@dataclass(frozen=True)
class NnUNetModel:
    """A trained model of nnU-Net.

    Attributes:
        file: the checkpoint.
        weights: the network's state dict under nnU-Net's names, its axes those of the plan.
        plans: its plans, as nnU-Net wrote them.
        plan: what it was planned as, in our axis order (see :class:`~bestiary.shared.data.planning.plan.Plan`).
        class_names: background first. channel_names: in order.
        fold: which fold it was trained for.
        mirror_axes: of its network's axes, those that training mirrored; empty for none.
    """

    file: Path
    weights: dict[str, torch.Tensor]
    plans: dict[str, Any]
    plan: Plan
    class_names: tuple[str, ...]
    channel_names: tuple[str, ...]
    fold: str
    mirror_axes: tuple[int, ...]

    def spec(self) -> DataSpec:
        """The data that it was trained on."""
        network = self.plan.network
        return DataSpec(
            task="seg",
            modalities=self.channel_names,
            spatial_dims=len(network.patch_size),
            in_channels=len(self.channel_names),
            num_classes=len(self.class_names),
            class_names=self.class_names,
            spacing=network.spacing,
            patch_size=network.patch_size,
            strides=network.strides,
            kernel_sizes=network.kernel_sizes,
        )


def read_nnunet(path: Path | str, fold: int | str | None = None) -> NnUNetModel:
    """Read a trained model.

    Args:
        path: a ``.pth`` file, the folder of a fold, that of a trained model
            (``nnUNetTrainer__nnUNetPlans__3d_fullres``), or such a folder below ``$nnUNet_results``.
        fold: which fold, where there are several (``0`` … or ``all``).

    Raises:
        MissingDataError: if there is no checkpoint. BadDataError: if it cannot be read, or holds more than data.
        ConfigError: for a network or normalisation that is not known.
    """
    file = find_nnunet(path, fold)
    values = _load(file)
    arguments = _part(values, "init_args", file)
    plans, description = _part(arguments, "plans", file), _part(arguments, "dataset_json", file)
    configuration, weights = str(arguments.get("configuration")), dict(_part(values, "network_weights", file))
    # A model folder can hold newer copies; what the checkpoint was trained with is in itself.
    plan = plan_from(plans, file, configuration)
    found = checked_description({**description, "file_ending": ".nii.gz"}, file)
    labels = sorted(found["labels"].items(), key=lambda item: item[1])
    if not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise BadDataError(f"{file}: its network_weights are not tensors alone")
    return NnUNetModel(
        file=file,
        weights=weights,
        plans=dict(plans),
        plan=plan,
        class_names=tuple(name for name, _ in labels),
        channel_names=tuple(found["channel_names"]),
        fold=str(arguments.get("fold")),
        mirror_axes=tuple(values.get("inference_allowed_mirroring_axes") or ()),
    )


def find_nnunet(path: Path | str, fold: int | str | None = None) -> Path:
    """The checkpoint file that a path means; see :func:`read_nnunet`."""
    given, results = Path(str(path)).expanduser(), nnunet_folder_of("results")
    if not given.exists() and results is not None and (results / str(path)).exists():
        given = results / str(path)
    if given.is_file():
        return given
    where = f"{given}{'' if results is None else f' (nor in {results})'}"
    if not given.is_dir():
        raise MissingDataError(
            f"{where}: there is no such model of nnU-Net. Give a checkpoint_final.pth, its fold_0, or the folder above."
        )
    folds = sorted(folder.name for folder in given.glob("fold_*") if folder.is_dir())
    if folds:
        wanted = f"fold_{fold}" if fold is not None else folds[0]
        if wanted not in folds or (fold is None and len(folds) > 1):
            raise MissingDataError(f"{given}: has {', '.join(folds)}: say which with fold=")
        given = given / wanted
    for name in CHECKPOINTS:
        if (given / name).is_file():
            return given / name
    raise MissingDataError(f"{given}: has none of {', '.join(CHECKPOINTS)}")


def _part(values: Mapping[str, Any], name: str, file: Path) -> Mapping[str, Any]:
    part = values.get(name)
    if not isinstance(part, Mapping):
        raise BadDataError(f"{file}: is no checkpoint of nnU-Net v2: it has no {name}. Give a checkpoint_final.pth.")
    return part


def _load(file: Path) -> Mapping[str, Any]:
    """The checkpoint's dict, with weights_only; besides torch's types only numpy's numbers, as in its curves, pass."""
    # Files that numpy 1 and numpy 2 wrote name the same functions by different modules.
    scalar: Any = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.dtype, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a pickle that is no checkpoint
            values = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise BadDataError(
            f"{file}: holds more than tensors, numbers and texts{what}, or is no checkpoint, and is not loaded: "
            "that could run what is in it. If you trust it, keep what bestiary reads, in nnU-Net's own environment: "
            'c = torch.load(f, weights_only=False); torch.save({k: c[k] for k in ("network_weights", "init_args", '
            '"inference_allowed_mirroring_axes")}, g)'
        ) from error
    except Exception as error:  # torch raises many kinds for what is no checkpoint, or a damaged one
        reason = " ".join(str(error).split())[:200]
        raise BadDataError(
            f"{file}: cannot be read as a checkpoint ({type(error).__name__}: {reason}). It is none, or damaged: "
            "get the file again."
        ) from error
    if not isinstance(values, Mapping):
        raise BadDataError(f"{file}: is no checkpoint of nnU-Net v2, which is a dict. Give a checkpoint_final.pth.")
    return values


def in_our_axes(weights: Mapping[str, torch.Tensor], order: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A network's weights for arrays whose axes were not exchanged.

    Args:
        weights: names to tensors; kernels are (out, in, *S) in the network's axes.
        order: for each of these, which axis of the files' arrays it is.
    """
    back = [order.index(axis) for axis in range(len(order))]

    def turned(value: torch.Tensor) -> torch.Tensor:
        if value.ndim != len(order) + 2:
            return value
        return value.permute(0, 1, *(2 + axis for axis in back)).contiguous()

    return {name: turned(value) for name, value in weights.items()}
