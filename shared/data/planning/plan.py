"""A plan as a file: bestiary's own (YAML), and nnU-Net's ``nnUNetPlans.json`` read as one.

Everything in a :class:`Plan` is in the order of the files' arrays, (z, y, x). nnU-Net's plans are for arrays whose
coarsest axis was brought to the front (``transpose_forward``); reading one undoes that.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bestiary.shared.core.build import nearest
from bestiary.shared.core.checkpoint import aside_of
from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError, require
from bestiary.shared.data import preprocess as pre
from bestiary.shared.data.planning.intensities import ct_scheme
from bestiary.shared.data.planning.planner import BASE_FEATURES, MAX_FEATURES, Configuration

FILE_NAME = "bestiary_plan.yaml"
FORMAT = 1
DEFAULT_ORDER = ("3d_fullres", "2d")
"""The configuration that is taken where none is named."""


@dataclass(frozen=True)
class Plan:
    """One configuration of a plan file, with what it says of the channels.

    Attributes:
        file: where it was read. name: of the configuration. network: patch, batch and network.
        normalization: a scheme for each channel.
        channel_names: of the data set it was made for; None where the file does not say.
        axes: codes of the files' axes (x, y, z) that it is for; None for however the training files lie.
        order: for the array axes of nnU-Net's network, which of ours each is; identity in bestiary's own plans.
    """

    file: Path
    name: str
    network: Configuration
    normalization: tuple[pre.Normalization, ...]
    channel_names: tuple[str, ...] | None = None
    axes: str | None = None
    order: tuple[int, ...] = ()


def read_plan(file: Path | str, configuration: str | None = None) -> Plan:
    """Read a plan.

    Args:
        file: bestiary's YAML, or nnU-Net's JSON (any ``*Plans.json``, or the ``plans.json`` beside a trained model).
        configuration: ``2d``, ``3d_fullres``, …; None takes ``3d_fullres``, or ``2d`` where that is not there.

    Raises:
        MissingDataError: if there is no such file.
        BadDataError: if it is no plan; the message names the field.
        ConfigError: if it has no such configuration.
    """
    path = Path(file)
    if path.is_dir():
        raise BadDataError(f"{path}: is a folder. Give the plan in it, or dataset.plan=auto.")
    if not path.is_file():
        raise MissingDataError(
            f"{path}: there is no such plan. Make it with: python tools/plan.py dataset.root={path.parent}"
        )
    yaml = require("yaml", "zoo")
    try:
        text = path.read_text()
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise BadDataError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    return plan_from(values, path, configuration)


def plan_from(values: Any, file: Path, configuration: str | None = None) -> Plan:
    """As :func:`read_plan`, from what such a file holds."""
    if not isinstance(values, Mapping) or not isinstance(values.get("configurations"), Mapping):
        raise BadDataError(f"{file}: is no plan: it has no configurations")
    known = [str(name) for name in values["configurations"]]
    name = configuration or next((n for n in DEFAULT_ORDER if n in known), None)
    if name not in known:
        raise ConfigError(f"{file}: has no configuration {name or 'for one stage'}; there are {', '.join(known)}")
    try:
        return _read_nnunet(values, file, name) if "plans_name" in values else _read_own(values, file, name)
    except KeyError as error:
        raise BadDataError(f"{file}: configuration {name} has no {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise BadDataError(f"{file}: configuration {name} cannot be read: {error}") from error


def _read_own(values: Mapping[str, Any], file: Path, name: str) -> Plan:
    if values.get("format") != FORMAT:
        raise BadDataError(f"{file}: has format {values.get('format')}; this version reads {FORMAT}")
    part = values["configurations"][name]
    known = [entry.name for entry in fields(Configuration)]
    for key in part:
        if key not in known:
            raise BadDataError(f"{file}: configuration {name} has a key {key!r}{nearest(str(key), known)}. Correct it.")
    network = Configuration(
        spacing=_floats(part["spacing"]),
        patch_size=_ints(part["patch_size"]),
        median_shape=_floats(part["median_shape"]),
        batch_size=int(part["batch_size"]),
        strides=tuple(_ints(level) for level in part["strides"]),
        kernel_sizes=tuple(_ints(level) for level in part["kernel_sizes"]),
        features=_ints(part["features"]),
        convs=_ints(part["convs"]),
        decoder_convs=_ints(part["decoder_convs"]),
        residual=bool(part["residual"]),
        batch_dice=bool(part["batch_dice"]),
    )
    try:
        schemes = tuple(pre.check_normalization(scheme) for scheme in values["normalization"])
    except ConfigError as error:
        raise BadDataError(f"{file}: {error}") from error
    channels = tuple(str(channel) for channel in values["channel_names"])
    axes = values.get("axes")
    plan = _checked(Plan(file, name, network, schemes, channels, axes, _identity(network)))
    if axes is not None and not pre.are_codes(axes, len(network.patch_size)):
        raise BadDataError(f"{file}: axes {axes!r} must be one of LR, PA, IS each, as RAS. Correct it.")
    return plan


def _read_nnunet(values: Mapping[str, Any], file: Path, name: str) -> Plan:
    part = _inherited(values["configurations"], name, file)
    if part.get("previous_stage"):
        raise ConfigError(f"{file}: {name} is the second stage of a cascade, which is not built; take 3d_fullres")
    net = _network_of(part, file)
    spacing, dims = _floats(part["spacing"]), len(part["spacing"])
    if len(part["patch_size"]) != dims:
        raise ValueError(f"spacing and patch_size do not fit: {spacing}, {part['patch_size']}")
    forward = _ints(values["transpose_forward"])
    # A 2D network sees the planes across the axis that came first.
    order = forward if dims == 3 else tuple(sorted(forward[1:]).index(axis) for axis in forward[1:])
    back = [order.index(axis) for axis in range(dims)]

    def put(items: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(items[i] for i in back)

    network = Configuration(
        spacing=put(spacing),
        patch_size=put(_ints(part["patch_size"])),
        median_shape=put(_floats(part["median_image_size_in_voxels"])),
        batch_size=int(part["batch_size"]),
        strides=tuple(put(_ints(level)) for level in net["strides"]),
        kernel_sizes=tuple(put(_ints(level)) for level in net["kernel_sizes"]),
        features=_ints(net["features"]),
        convs=_ints(net["convs"]),
        decoder_convs=_ints(net["decoder_convs"]),
        residual=net["residual"],
        batch_dice=bool(part.get("batch_dice", False)),
    )
    axes = "RAS" if "WithReorient" in str(values.get("image_reader_writer")) else None
    return _checked(Plan(file, name, network, _schemes(values, part, file), None, axes, order))


def _inherited(parts: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    part = dict(parts[name])
    parent = part.pop("inherits_from", None)
    if parent is None:
        return part
    if parent == name or parent not in parts:
        raise BadDataError(f"{file}: configuration {name} inherits from {parent}, which is not there")
    return {**_inherited({k: v for k, v in parts.items() if k != name}, parent, file), **part}


def _network_of(part: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The network of a configuration, from nnU-Net 2.5's ``architecture`` or from the keys of versions before."""
    if "architecture" not in part:
        levels, dims = len(part["pool_op_kernel_sizes"]), len(part["patch_size"])
        base = int(part.get("UNet_base_num_features", BASE_FEATURES))
        top = int(part.get("unet_max_num_features", MAX_FEATURES[dims]))
        kind = str(part.get("UNet_class_name", "PlainConvUNet"))
        found = {
            "strides": part["pool_op_kernel_sizes"],
            "kernel_sizes": part["conv_kernel_sizes"],
            "features": [min(base * 2**level, top) for level in range(levels)],
            "convs": part["n_conv_per_stage_encoder"],
            "decoder_convs": part["n_conv_per_stage_decoder"],
        }
    else:
        kind = str(part["architecture"]["network_class_name"]).rpartition(".")[2]
        inner = part["architecture"]["arch_kwargs"]
        dims = len(part["patch_size"])
        found = {
            "strides": [_per_axis(level, dims) for level in inner["strides"]],
            "kernel_sizes": [_per_axis(level, dims) for level in inner["kernel_sizes"]],
            "features": inner["features_per_stage"],
            "convs": inner["n_blocks_per_stage"] if "n_blocks_per_stage" in inner else inner["n_conv_per_stage"],
            "decoder_convs": inner["n_conv_per_stage_decoder"],
        }
    if kind not in ("PlainConvUNet", "ResidualEncoderUNet"):
        raise ConfigError(f"{file}: its network is a {kind}; PlainConvUNet and ResidualEncoderUNet are known")
    return {**found, "residual": kind == "ResidualEncoderUNet"}


def _per_axis(level: Any, dims: int) -> Sequence[int]:
    return [level] * dims if isinstance(level, int) else level


def _schemes(values: Mapping[str, Any], part: Mapping[str, Any], file: Path) -> tuple[pre.Normalization, ...]:
    found = values.get("foreground_intensity_properties_per_channel") or {}
    out: list[pre.Normalization] = []
    for number, (name, masked) in enumerate(zip(part["normalization_schemes"], part["use_mask_for_norm"], strict=True)):
        if name == "CTNormalization":
            out.append(ct_scheme(found[str(number)]))
        elif name == "ZScoreNormalization":
            out.append(pre.ZSCORE if masked else pre.ZSCORE_WHOLE)
        elif name in _SCHEMES:
            out.append(_SCHEMES[name])
        else:
            raise ConfigError(f"{file}: the normalisation {name} is not known; there are {', '.join(_SCHEMES)}")
    return tuple(out)


_SCHEMES: dict[str, pre.Normalization] = {
    "CTNormalization": {},
    "ZScoreNormalization": pre.ZSCORE,
    "NoNormalization": pre.UNCHANGED,
    "RescaleTo01Normalization": pre.MINMAX,
    "RGBTo01Normalization": pre.BYTES,
}


def _checked(plan: Plan) -> Plan:
    network, levels = plan.network, len(plan.network.strides)
    lengths = {"kernel_sizes": levels, "features": levels, "convs": levels, "decoder_convs": levels - 1}
    wrong = [key for key, n in lengths.items() if len(getattr(network, key)) != n]
    dims = len(network.patch_size)
    if dims not in (2, 3) or len(network.spacing) != dims:
        wrong.append("spacing")
    if any(len(level) != dims for level in (*network.strides, *network.kernel_sizes)):
        wrong.append("strides")
    if wrong:
        raise BadDataError(f"{plan.file}: configuration {plan.name}: {wrong[0]} does not fit the others in length")
    edges = (network.patch_size, *network.strides, *network.kernel_sizes)
    if not all(0 < size < math.inf for size in network.spacing) or any(n < 1 for edge in edges for n in edge):
        raise BadDataError(
            f"{plan.file}: configuration {plan.name}: spacing, patch, strides and kernels must be over 0"
        )
    total = [math.prod(strides) for strides in zip(*network.strides, strict=True)]
    if any(n % t for n, t in zip(network.patch_size, total, strict=True)):
        raise BadDataError(
            f"{plan.file}: configuration {plan.name}: patch_size {list(network.patch_size)} must be divisible by the "
            f"product of the strides {total}"
        )
    return plan


def _identity(network: Configuration) -> tuple[int, ...]:
    return tuple(range(len(network.patch_size)))


def _ints(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


def _floats(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def write_plan(file: Path, values: Mapping[str, Any], head: Sequence[str]) -> Path | None:
    """Write bestiary's own plan, aside and then renamed.

    Args:
        file: where to. values: what :func:`plan_from` reads. head: comment lines.

    Returns:
        Where another plan that was there is kept now; None where there was none.
    """
    yaml = require("yaml", "zoo")
    body = yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None, width=118, allow_unicode=True)
    text, kept = "".join(f"# {line}\n" for line in head) + body, None
    with aside_of(file) as aside:
        aside.write_text(text)
        if file.is_file() and file.read_bytes() != text.encode():
            names = (file.with_name(f"{file.name}.bak{number or ''}") for number in itertools.count())
            kept = next(name for name in names if not name.exists())
            file.rename(kept)
    return kept
