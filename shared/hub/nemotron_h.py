"""nemotron_h checkpoints in and out, a tensor at a time.

On disk: ``backbone.embeddings``, ``backbone.layers.i.…``, ``backbone.norm_f``, ``lm_head``, the experts one by one, and
``mtp.layers.k.…`` with k counting through the layers of all MTP modules. transformers in memory: ``model.`` instead of
``backbone.``, and the experts of a layer stacked. Both are read; the form on disk is written.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.hub.nemotron_h_config import write_config
from bestiary.shared.hub.stored import stored_tensors
from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.hybrid.model import HybridLM

_EXPERT = re.compile(r"(.*mixer\.experts)\.(\d+)\.(up_proj|down_proj)\.weight")
_STACKED = re.compile(r"(.*mixer\.experts)\.(up_proj|down_proj)(?:\.weight)?")
_MTP = re.compile(r"mtp\.layers\.(\d+)\.(.*)")
_OF_MODULE = ("eh_proj.", "enorm.", "hnorm.", "final_layernorm.")
"""Tensors of an MTP module itself, which stand under its first or last layer on disk."""


def our_name(key: str, config: HybridConfig) -> tuple[str, int | None]:
    """The parameter of HybridLM that a tensor on disk belongs to, and which expert of it it is.

    Args:
        key: with either prefix; experts stacked or one by one.
        config: the shape.
    """
    name = re.sub(r"^(backbone|model)\.", "", key)
    if match := _MTP.fullmatch(name):
        module, layer = divmod(int(match[1]), len(config.mtp_pattern))
        rest = match[2]
        name = f"mtp.{module}.{rest}" if rest.startswith(_OF_MODULE) else f"mtp.{module}.layers.{layer}.{rest}"
    if match := _EXPERT.fullmatch(name):
        return f"{match[1]}.{match[3]}", int(match[2])
    if match := _STACKED.fullmatch(name):
        return f"{match[1]}.{match[2]}", None
    return name, None


def disk_names(name: str, config: HybridConfig) -> list[str]:
    """The inverse of :func:`our_name`: the tensors on disk, one for each expert where there are experts."""
    inner = name
    if name.startswith("mtp."):
        _, module, rest = name.split(".", 2)
        length = len(config.mtp_pattern)
        if rest.startswith("layers."):
            _, layer, rest = rest.split(".", 2)
        else:
            layer = str(length - 1 if rest.startswith("final_layernorm") else 0)
        inner = f"mtp.layers.{int(module) * length + int(layer)}.{rest}"
    elif not name.startswith("lm_head."):
        inner = f"backbone.{name}"
    if match := _STACKED.fullmatch(inner):
        return [f"{match[1]}.{j}.{match[2]}.weight" for j in range(config.n_routed_experts)]
    return [inner]


def load_weights(model: HybridLM, path: str | Path) -> None:
    """Fill a model from a checkpoint, a tensor at a time: memory stays within a shard of the model's own.

    Args:
        model: of the checkpoint's shape.
        path: the folder.

    Raises:
        MissingDataError: if a file is not there.
        BadDataError: if a tensor is missing, too many, or of another shape.
    """
    folder = Path(path).expanduser()
    state = tensors_of(model)
    left = {name: (model.config.n_routed_experts if _STACKED.fullmatch(name) else 1) for name in state}
    strange: list[str] = []
    for key, tensor in stored_tensors(folder):
        name, expert = our_name(key, model.config)
        if name not in state:
            if not (model.config.tie_word_embeddings and name == "lm_head.weight"):
                strange.append(key)
            continue
        whole = state[name]
        target = whole if expert is None else whole[expert] if expert < len(whole) else None
        if target is None or target.shape != tensor.shape:
            want = None if target is None else tuple(target.shape)
            raise BadDataError(f"{folder}: {key} is {tuple(tensor.shape)}, and config.json asks for {want}")
        with torch.no_grad():
            target.copy_(tensor)
        left[name] -= left[name] if expert is None else 1
    missing = [name for name, count in left.items() if count > 0]
    for what, names in (("lacks", missing), ("has what config.json does not ask for:", strange)):
        if names:
            if what == "lacks" and all(name.startswith("mtp.") for name in names):
                what = "has no MTP weights (transformers drops them): set num_nextn_predict_layers to 0. It lacks"
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise BadDataError(f"{folder} {what} {', '.join(names[:4])}{more}")


def tensors_of(model: HybridLM) -> dict[str, torch.Tensor]:
    """Parameters and stored buffers by name; a tied head is the embedding and not named."""
    state: dict[str, torch.Tensor] = dict(model.named_parameters())
    stored = set(model.state_dict(keep_vars=True))
    state |= {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return state


def save_pretrained(
    model: HybridLM, folder: str | Path, dtype: torch.dtype | None = None, shard_bytes: int = 5 * 2**30
) -> list[Path]:
    """Write a folder that transformers' AutoModelForCausalLM, and :func:`load_pretrained`, read; its tokenizer too.

    A tokenizer that is not transformers' (bytes) is only named, under ``bestiary_tokenizer`` in config.json.

    Args:
        model: without adapters.
        folder: made if it is not there; a checkpoint in it is replaced, once the new one is written.
        dtype: of the weights, their own by default; routers and selection biases stay as they are.
        shard_bytes: a file is not longer than this, unless one tensor is.

    Returns:
        The files written.

    Raises:
        BadDataError: if the model has parameters that the format has no name for (adapters), or lacks what transformers
            takes for granted (a shared expert).
    """
    from safetensors.torch import save_file

    state = tensors_of(model)
    if "E" in model.config.layers and not model.config.moe_shared_expert_intermediate_size:
        raise BadDataError("transformers' nemotron_h has a shared expert in every MoE layer, and this model has none")
    odd = [name for name in state if "lora_" in name or ".base_layer." in name]
    if odd:
        raise BadDataError(f"the model has adapters ({odd[0]}, …): merge them first (prepare: merge_lora)")
    folder = Path(folder).expanduser()
    aside = folder / ".partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if model.config.tie_word_embeddings:
        # transformers 5.24 ties nothing in nemotron_h: it takes the head from the file, or makes one up.
        state["lm_head.weight"] = model.lm_head.weight.detach().clone()
    shards = _shards(model, state, dtype, shard_bytes)
    written, weight_map, total = [], {}, 0
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: _stored(state[name], expert, key, dtype) for key, (name, expert) in names.items()}
        save_file(tensors, aside / file, {"format": "pt"})
        written.append(file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
        written.append("model.safetensors.index.json")
    extra = {k: v for k, v in model.extra_config.items() if not k.startswith("bestiary_")}
    if hasattr(model.tokenizer, "hf"):
        model.tokenizer.hf.save_pretrained(aside)
    else:  # a tokenizer that transformers has no files for: its name, so that we find it again
        extra["bestiary_tokenizer"] = model.tokenizer_name
        extra["bestiary_added_tokens"] = list(model.tokenizer.added_tokens)
    kind = dtype or next(iter(state.values())).dtype
    write_config(aside, model.config, extra, str(kind).removeprefix("torch."))
    for old in (*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"):
        old.unlink(missing_ok=True)
    for file in aside.iterdir():
        file.replace(folder / file.name)
    aside.rmdir()
    return [folder / name for name in (*written, "config.json")]


def _shards(
    model: HybridLM, state: Mapping[str, torch.Tensor], dtype: torch.dtype | None, shard_bytes: int
) -> list[dict[str, tuple[str, int | None]]]:
    """Names on disk by file, each with the parameter and the expert it comes from."""
    shards: list[dict[str, tuple[str, int | None]]] = [{}]
    used = 0
    for name, tensor in state.items():
        keys = disk_names(name, model.config)
        size = tensor.numel() * (dtype.itemsize if dtype else tensor.element_size()) // len(keys)
        for expert, key in enumerate(keys):
            if used and used + size > shard_bytes:
                shards.append({})
                used = 0
            shards[-1][key] = (name, expert if _STACKED.fullmatch(name) else None)
            used += size
    return shards


def _stored(tensor: torch.Tensor, expert: int | None, key: str, dtype: torch.dtype | None) -> torch.Tensor:
    value = tensor.detach() if expert is None else tensor.detach()[expert]
    keep = key.endswith(("gate.weight", "e_score_correction_bias"))  # transformers keeps these in float32
    return value.to("cpu", None if keep else dtype).contiguous()
