"""Checkpoints of Music Flamingo and Audio Flamingo 3, transformers' layout, in and out.

Three layouts are read: transformers' present names (``model.audio_tower.…``), those of the released files
(``audio_tower.…``, ``language_model.model.…``), and NVIDIA's own folders ``llm``, ``sound_tower`` and
``sound_mm_projector``. The released files' names are written. A tensor ``pos_emb.freqs`` is dropped wherever it stands:
rotary time is computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bestiary.shared.audio.frozen import FrozenEncoder
from bestiary.shared.core.errors import BadDataError, ConfigError, require
from bestiary.shared.hub.stored import stored_tensors

FOLDERS = {"llm": "language_model.", "sound_tower": "audio_tower.", "sound_mm_projector": "multi_modal_projector."}
"""NVIDIA's folders, and the prefix of their tensors in the released files."""

RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
    (r"^model\.", ""),
    (r"^audio_tower\.(audio_tower\.)?(sound_tower\.)?", "encoder."),
    (r"^multi_modal_projector\.(layers\.)?", "projector."),
    (r"^projector\.0\.", "projector.linear_1."),
    (r"^projector\.2\.", "projector.linear_2."),
    (r"^language_model\.", "backbone.lm.model."),
    (r"^lm_head\.", "backbone.lm.lm_head."),
)
"""Applied in order to a tensor's name on disk; what comes out is the name of a parameter of ours."""


def our_name(key: str) -> str | None:
    """The parameter of MusicFlamingo that a tensor on disk belongs to; None for one that is dropped."""
    if key.endswith("pos_emb.freqs"):
        return None
    for pattern, new in RENAMES:
        key = re.sub(pattern, new, key)
    return key


def disk_name(name: str) -> str:
    """The name in the released files of a parameter of ours."""
    for ours, theirs in (
        ("encoder.", "audio_tower."),
        ("projector.", "multi_modal_projector."),
        ("backbone.lm.model.", "language_model.model."),
        ("backbone.lm.lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise ConfigError(f"{name} has no place in a checkpoint of Music Flamingo")


def tensors_on_disk(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a checkpoint by their names, NVIDIA's folders with the prefix that the released files have."""
    parts = [folder / name for name in FOLDERS]
    if not all(part.is_dir() for part in parts):
        yield from stored_tensors(folder)
        return
    for part in parts:
        for key, tensor in stored_tensors(part):
            yield FOLDERS[part.name] + key, tensor


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill a MusicFlamingo from a checkpoint, a tensor at a time.

    Args:
        model: of the checkpoint's shape, on transformers' backbone (HFCausalLM).
        path: the folder.

    Raises:
        MissingDataError: if a file is not there.
        BadDataError: if a tensor is missing, too many, or of another shape.
        ConfigError: for a model whose options are not the checkpoint's, or on another backbone.
    """
    folder = Path(path).expanduser()
    check_config(model, folder)
    state = model.state_dict()
    missing, strange = set(state), []
    # The tokenizer of a model may have fewer tokens than the checkpoint's table has rows.
    for key, tensor in tensors_on_disk(folder):
        name = our_name(key)
        if name is None:
            continue
        if name not in state:
            strange.append(key)
            continue
        if state[name].shape != tensor.shape:
            raise BadDataError(
                f"{folder}: {key} is {tuple(tensor.shape)}, and the model wants {tuple(state[name].shape)}"
            )
        with torch.no_grad():
            state[name].copy_(tensor)
        missing.discard(name)
    config: Any = model.backbone.lm.config  # type: ignore[union-attr]
    if config.tie_word_embeddings:
        missing.discard("backbone.lm.lm_head.weight")
    for what, names in (("lacks", sorted(missing)), ("has what the model does not:", strange)):
        if names:
            raise BadDataError(f"{folder} {what} {', '.join(names[:4])}{' …' if len(names) > 4 else ''}")


def check_config(model: Any, folder: Path) -> None:
    """Compare a checkpoint's config.json, where it has one, with a model's options.

    Raises:
        BadDataError: for a file that cannot be read, or of another kind of model.
        ConfigError: for options that differ; the message names each and what to set.
    """
    if not hasattr(model.backbone, "lm"):
        raise ConfigError("a released checkpoint goes into one of transformers' backbones: backbone=qwen2_5_7b")
    file = folder / "config.json"
    if not file.is_file():
        return
    try:
        config = json.loads(file.read_text())
        kind = config.get("model_type")
    except (ValueError, AttributeError) as error:
        raise BadDataError(f"{file} cannot be read: {error}") from error
    if kind not in ("musicflamingo", "audioflamingo3"):
        if any((folder / name).is_dir() for name in FOLDERS):
            return
        raise BadDataError(f"{folder} holds a {kind} model, neither Music Flamingo nor Audio Flamingo 3")
    audio, rope = config.get("audio_config") or {}, config.get("rope_parameters") or {}
    music, rotary, encoder = kind == "musicflamingo", model.rotary_time, model.encoder
    wanted = [
        ("model.boundaries", music, model.boundaries),
        ("model.rotary_time (null or not)", music, rotary is not None),
        ("model.standardise", False, model.channel_norm is not None),
        ("encoder.pool", 2, encoder_of(model).pool),
        ("encoder.front_end.n_mels", audio.get("num_mel_bins", 128), encoder.front_end.n_mels),
        (
            "encoder.heads",
            audio.get("num_attention_heads", audio.get("encoder_attention_heads", 20)),
            heads_of(encoder),
        ),
        ("positions", audio.get("max_source_positions", 1500), encoder.front_end.frames // 2),
        ("audio_token_id", config.get("audio_token_id", model.sound_id), model.sound_id),
    ]
    if music and rotary is not None:
        step = config.get("audio_frame_step", 0.01) * 4
        wanted += [
            ("model.rotary_time.theta", rope.get("rope_theta", 1200.0), rotary.theta),
            ("model.rotary_time.share", int(rope.get("partial_rotary_factor", 0.2) * encoder.out_dim), rotary.dim),
            ("seconds between tokens", round(step, 9), round(encoder.step_seconds, 9)),
        ]
        ends = [config.get(name, own) for name, own in zip(BOUNDARIES, model.boundary_ids, strict=True)]
        wanted.append(("boundary token ids", ends, model.boundary_ids))
    wrong = [f"{name} is {theirs} there, {ours} here" for name, theirs, ours in wanted if theirs != ours]
    if wrong:
        raise ConfigError(
            f"{folder} is not a checkpoint of this model: {'; '.join(wrong)}. Token ids come from its tokenizer "
            "(backbone.tokenizer=FOLDER)"
        )


BOUNDARIES = ("audio_bos_token_id", "audio_eos_token_id")


def heads_of(encoder: Any) -> int:
    """Attention heads of an encoder's layers; 0 without layers."""
    return encoder.layers[0].self_attn.heads if len(encoder.layers) else 0


def save_pretrained(model: Any, out: Path, dtype: torch.dtype | None = None, shard_bytes: int = 5 * 2**30) -> None:
    """Write a MusicFlamingo as transformers' class MusicFlamingo, or AudioFlamingo3 where it has no rotary time.

    Args:
        model: on one of transformers' backbones.
        out: a folder; config.json, the weights, and the tokenizer's files where it has any go there.
        dtype: of the weights, or None for their own.
        shard_bytes: largest file.

    Raises:
        ConfigError: for a model that neither class can hold.
    """
    if not hasattr(model.backbone, "lm"):
        raise ConfigError("transformers' Music Flamingo has one of its own decoders, and this backbone is none")
    between = (model.rotary_time is None) == model.boundaries or model.channel_norm is not None
    if between or encoder_of(model).pool != 2:
        raise ConfigError(
            "transformers has Music Flamingo (rotary time and boundaries) and Audio Flamingo 3 (neither), with a pool "
            "of two in the encoder, whose channels are not standardised; this model is between them"
        )
    out.mkdir(parents=True, exist_ok=True)
    state = state_of(model)
    if model.backbone.lm.config.tie_word_embeddings:
        # The class has no tied weights: the head is written as a copy.
        state["backbone.lm.lm_head.weight"] = state["backbone.lm.model.embed_tokens.weight"].clone()
    named = {disk_name(name): tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    require("huggingface_hub", "zoo").save_torch_state_dict(named, out, max_shard_size=shard_bytes)
    (out / "config.json").write_text(json.dumps(config_of(model, dtype), indent=1))
    if hasattr(model.backbone.tokenizer, "hf"):
        model.backbone.tokenizer.hf.save_pretrained(out)


def encoder_of(model: Any) -> Any:
    """A model's encoder, out of its freezer where it is in one."""
    return model.encoder.encoder if isinstance(model.encoder, FrozenEncoder) else model.encoder


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that the released files have: a frozen encoder's as an encoder's, and no attribute heads."""
    named = ((name.replace("encoder.encoder.", "encoder.", 1), value) for name, value in model.state_dict().items())
    return {name: value for name, value in named if not name.startswith("attribute_heads.")}


def config_of(model: Any, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """config.json of transformers for a MusicFlamingo."""
    encoder, rotary = encoder_of(model), model.rotary_time
    layers = len(encoder.layers)
    kind = dtype or next(model.parameters()).dtype
    config: dict[str, Any] = {
        "architectures": ["AudioFlamingo3ForConditionalGeneration"],
        "model_type": "audioflamingo3",
        "dtype": str(kind).removeprefix("torch."),
        "audio_config": {
            "model_type": "audioflamingo3_encoder",
            "num_mel_bins": encoder.front_end.n_mels,
            "hidden_size": encoder.out_dim,
            "num_hidden_layers": layers,
            "num_attention_heads": heads_of(encoder),
            "intermediate_size": encoder.layers[0].fc1.out_features,
            "max_source_positions": encoder.front_end.frames // 2,
        },
        "text_config": model.backbone.lm.config.to_dict() | {"tie_word_embeddings": False},
        "audio_token_id": model.sound_id,
        "projector_hidden_act": "gelu",
        "projector_bias": model.projector.linear_1.bias is not None,
    }
    if rotary is not None:
        config |= {
            "architectures": ["MusicFlamingoForConditionalGeneration"],
            "model_type": "musicflamingo",
            **dict(zip(BOUNDARIES, model.boundary_ids, strict=True)),
            "audio_frame_step": encoder.front_end.hop / encoder.front_end.rate,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": rotary.theta,
                "partial_rotary_factor": rotary.dim / encoder.out_dim,
            },
        }
    return config
