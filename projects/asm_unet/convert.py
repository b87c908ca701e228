"""Weights of the official ASM-UNet code, under our names.

Source: parameter names of the official code of arXiv:2508.07237, which are nnU-Net's for the outer net.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

_ENCODER = re.compile(r"encoder\.stages\.(\d+)\.(?:0\.)*(convs|mamba)\.(.+)")
_DECODER = re.compile(r"decoder\.stages\.(\d+)\.(?:0\.)*(convs|mamba)\.(.+)")
_UPSAMPLE = re.compile(r"decoder\.transpconvs\.(\d+)\.(weight|bias)")
_HEAD = re.compile(r"decoder\.seg_layers\.(\d+)\.(weight|bias)")
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
    or one per group ("lmls"), and the plain net. Dropped are the aliases that nnU-Net's modules write
    (``*.all_modules.*``, ``decoder.encoder.*``), the prefixes of torch.compile and DDP, and the second and third
    scan branches of the stack's Mamba layers, which the official code creates and never uses.

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
