"""Weights of the official ASM-UNet code and of nnU-Net v2, under our names.

Source: parameter names of the official code of arXiv:2508.07237, which are nnU-Net's for the outer net; those of the
residual encoder were measured on nnunetv2 2.8.1 with dynamic-network-architectures 0.4.4.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bestiary.shared.core.checkpoint import Structure, build_model, save_checkpoint, write_json
from bestiary.shared.core.config import compose, options, resolved
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.hub.nnunet import NnUNetModel, in_our_axes, read_nnunet
from bestiary.shared.vision.segmentation import SegmentationModel

_ENCODER = re.compile(r"encoder\.stages\.(\d+)\.(?:0\.)*(convs|mamba)\.(.+)")
_DECODER = re.compile(r"decoder\.stages\.(\d+)\.(?:0\.)*(convs|mamba)\.(.+)")
_UPSAMPLE = re.compile(r"decoder\.transpconvs\.(\d+)\.(weight|bias)")
_HEAD = re.compile(r"decoder\.seg_layers\.(\d+)\.(weight|bias)")
_STEM = re.compile(r"encoder\.stem\.convs\.0\.((?:conv|norm)\.(?:weight|bias))")
_BLOCK = re.compile(
    r"encoder\.stages\.(\d+)\.(?:0\.)*blocks\.(\d+)\.(conv1|conv2|skip\.\d+)\.((?:conv|norm)\.(?:weight|bias))"
)
_CONV_UNIT = re.compile(r"(\d+)\.(conv|norm)\.(weight|bias)")
_SCORE = re.compile(r"scores_generation\.individual_score_generator\.(\d+)\.(.+)")
_GROUP = re.compile(r"scores_generation\.group_score_embeddings\.(\d+)(?:\.weight)?")
_STACK = re.compile(r"stacked_mamba_layers\.(?:(\d+)\.)?(\d+)\.((?:linear|norm|mamba)\..+|weight|bias)")
_PROJ = re.compile(r"proj_g\.(\d+)\.(weight|bias)")
_UNUSED = re.compile(r"(conv1d|x_proj|dt_proj)_[bs]\.(weight|bias)|A_[bs]_log|D_[bs]")

_SCORE_PARTS = {"0": "norm", "2": "mamba", "3": "head"}
_PROJ_PARTS = {"0": "proj", "1": "proj_norm"}


def from_official(state_dict: Mapping[str, torch.Tensor], deep_supervision: bool = True) -> dict[str, torch.Tensor]:
    """A state dict of the official network, for :class:`~bestiary.projects.asm_unet.model.ASMUNet`.

    All official variants are understood: blocks in the encoder or in encoder and decoder, one stack for all groups
    or one per group ("lmls"), and the plain net; nnU-Net's net with a residual encoder too. Dropped are the aliases
    that nnU-Net's modules write (``*.all_modules.*``, ``decoder.encoder.*``), the prefixes of torch.compile and DDP,
    and the second and third scan branches of the stack's Mamba layers, which the official code creates and never uses.

    Args:
        state_dict: official names to tensors (``network_weights`` of an nnU-Net checkpoint). Not changed.
        deep_supervision: whether the target network has a head at every level; if not, only the
            full-resolution head is kept.

    Returns:
        Our names to tensors; it loads strictly.

    Raises:
        ValueError: if there are names that cannot be placed; the message lists them.
    """
    official = {}
    for name, value in state_dict.items():
        name = name.replace("_orig_mod.", "").removeprefix("module.")
        if ".all_modules." not in name and not name.startswith("decoder.encoder."):
            official[name] = value
    last_head = max((int(m[1]) for m in map(_HEAD.fullmatch, official) if m), default=-1)
    out: dict[str, torch.Tensor] = {}
    groups: dict[str, dict[int, torch.Tensor]] = {}
    unknown = []
    for name, value in official.items():
        if match := _HEAD.fullmatch(name):
            level = last_head - int(match[1])
            if deep_supervision or level == 0:
                out[f"decoder.heads.{level}.{match[2]}"] = value
        elif match := _UPSAMPLE.fullmatch(name):
            out[f"decoder.upsamples.{match[1]}.{match[2]}"] = value
        elif match := _STEM.fullmatch(name):
            out[f"encoder.stem.{match[1]}"] = value
        elif match := _BLOCK.fullmatch(name):
            part = "project" if match[3].startswith("skip") else match[3]
            out[f"encoder.levels.{match[1]}.convs.{match[2]}.{part}.{match[4]}"] = value
        elif match := _ENCODER.fullmatch(name) or _DECODER.fullmatch(name):
            level = f"{name.split('.')[0]}.levels.{match[1]}"
            if match[2] == "convs":
                known = _CONV_UNIT.fullmatch(match[3]) is not None
                target = f"convs.{match[3]}"
            elif group := _GROUP.fullmatch(match[3]):
                groups.setdefault(f"{level}.mixer.group_scores", {})[int(group[1])] = value.reshape(-1)
                continue
            else:
                known, part = _block_name(match[3])
                target = f"mixer.{part}"
            if not known:
                unknown.append(name)
            elif target != "mixer.":
                out[f"{level}.{target}"] = value
        else:
            unknown.append(name)
    if unknown:
        shown = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        raise ValueError(f"not names of the official ASM-UNet: {shown}")
    for name, rows in groups.items():
        if sorted(rows) != list(range(len(rows))):
            raise ValueError(f"group score vectors of {name} are incomplete: {sorted(rows)}")
        out[name] = torch.stack([rows[g] for g in range(len(rows))])
    return out


def _block_name(name: str) -> tuple[bool, str]:
    """Our name of a parameter of the block: (known, name), the name empty for one that is never used."""
    if (match := _SCORE.fullmatch(name)) and match[1] in _SCORE_PARTS:
        return True, f"score.{_SCORE_PARTS[match[1]]}.{match[2]}"
    if (match := _PROJ.fullmatch(name)) and match[1] in _PROJ_PARTS:
        return True, f"{_PROJ_PARTS[match[1]]}.{match[2]}"
    if match := _STACK.fullmatch(name):
        stack, place, rest = match[1] or "0", int(match[2]), match[3]
        layer = f"stacks.{stack}.layers.{place // 2}"
        if place % 2:
            return rest in ("weight", "bias"), f"{layer}.out_norm.{rest}"
        if rest.startswith("mamba.") and _UNUSED.fullmatch(rest.removeprefix("mamba.")):
            return True, ""
        return rest not in ("weight", "bias"), f"{layer}.{rest}"
    return False, name


def from_nnunet(path: Path | str, fold: int | str | None = None) -> SegmentationModel:
    """A trained model of nnU-Net v2 as one of ours: its network, with spacing, patch and normalisation of its plans.

    On the same input the logits are equal. Files are resampled and normalised by our code, which differs from
    nnU-Net's in details (no cropping to the non-zero part, another resampling library).

    Args:
        path: the checkpoint, or a folder with it; see :func:`bestiary.shared.hub.nnunet.read_nnunet`.
        fold: which fold, where there are several.

    Returns:
        The model on the CPU in eval mode.

    Raises:
        MissingDataError: if there is no checkpoint. BadDataError: if it cannot be read or does not fit its plans.
        ConfigError: for a network that is not built here.
    """
    return convert_nnunet(read_nnunet(path, fold))[0]


def convert_nnunet(source: NnUNetModel) -> tuple[SegmentationModel, Structure]:
    """As :func:`from_nnunet`, with the structure that a checkpoint folder of it holds."""
    structure = _structure(source)
    model = build_model(structure)
    assert isinstance(model, SegmentationModel)
    try:
        weights = from_official(in_our_axes(source.weights, source.plan.order))
        model.network.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        raise BadDataError(
            f"{source.file}: its weights are not those of its plans: {' '.join(str(error).split())[:300]}"
        ) from error
    model.use_normalization(source.plan.normalization)
    if source.plan.axes is not None:
        model.use_axes(source.plan.axes)
    return model.eval(), structure


def import_nnunet(path: Path | str, out: Path, fold: int | str | None = None) -> list[str]:
    """Write a trained model of nnU-Net as a checkpoint folder; what tools/import_nnunet.py does.

    Args:
        path: see :func:`from_nnunet`. out: the folder; it must hold no checkpoint. fold: see there.

    Returns:
        Lines on what was written and what can be done with it.

    Raises:
        ConfigError: if ``out`` holds a checkpoint. Else as :func:`from_nnunet`.
    """
    if (out / "structure.json").exists() or (out / "weights.safetensors").exists():
        raise ConfigError(f"{out} holds a checkpoint already: give another out=")
    source = read_nnunet(path, fold)
    model, structure = convert_nnunet(source)
    save_checkpoint(out, model, structure)
    write_json(out / "nnUNetPlans.json", source.plans)
    network = source.plan.network
    spacing = " x ".join(f"{s:.4g}" for s in network.spacing)
    train = [*structure.overrides, "dataset.root=FOLDER", f"dataset.plan={out / 'nnUNetPlans.json'}"]
    train += [f"dataset.configuration={source.plan.name}", f"init_from={out}"]
    return [
        f"{source.file}: {source.plan.name}, fold {source.fold}, {'residual' if network.residual else 'plain'} encoder",
        f"classes {', '.join(source.class_names)}; channels {', '.join(source.channel_names)}",
        f"patch {'x'.join(map(str, network.patch_size))} at {spacing} mm",
        f"written to {out}",
        f"predict:  python tools/predict.py checkpoint={out} inputs=FILE_0000.nii.gz",
        "go on training, on data of the same classes and channels:",
        f"  python tools/train.py {shlex.join(train)}",
    ]


def _structure(source: NnUNetModel) -> Structure:
    """The net as conf/ composes it, with an override for each number that differs from there."""
    network, dims = source.plan.network, len(source.plan.network.patch_size)
    kind = "unet_residual" if network.residual else "unet_plain"
    if kind not in options("encoder"):
        raise ConfigError(f"{source.file}: has a residual encoder, and there is no encoder={kind} here to put it into")
    overrides = ["+project=asm_unet", "dataset=nnunet_folder", f"encoder={kind}", "backbone=none"]
    top = 320 if dims == 3 else 512
    if list(network.features) != [min(32 * 2**level, top) for level in range(len(network.features))]:
        overrides.append(f"encoder.features={_listed(network.features)}")
    overrides.append(f"encoder.convs_per_stage={_listed(network.convs)}")
    overrides.append(f"model.network.decoder_convs={_listed(network.decoder_convs)}")
    if len(source.mirror_axes) != dims:
        overrides.append("model.mirror_tta=false")
    cfg, choices = compose([*overrides, "dataset.root=."])
    values: dict[str, Any] = resolved(cfg)
    return Structure(
        project=values["project"]["name"],
        choices=choices,
        overrides=overrides,
        spec=source.spec().to_dict(),
        parts={name: values.get(name) or None for name in ("model", "encoder", "backbone")},
        seed=values["seed"],
    )


def _listed(values: Sequence[int]) -> str:
    return f"[{','.join(map(str, values))}]"
