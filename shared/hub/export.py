"""A trained language model as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bestiary.shared.core.checkpoint import find_checkpoint, load_checkpoint
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.prepare import merge_lora
from bestiary.shared.hub.nemotron_h import save_pretrained
from bestiary.shared.language.hf_causal_lm import HFCausalLM
from bestiary.shared.language.hybrid.model import HybridLM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(checkpoint: str, out: Path, dtype: str | None = None, shard_gb: float | str = 5.0) -> list[str]:
    """Write a checkpoint's backbone, or a whole audio-language model, its adapters merged, with config and tokenizer.

    Args:
        checkpoint: a run folder or stage folder.
        out: a folder without a checkpoint in it.
        dtype: a name of :data:`DTYPES`, or None for the weights' own.
        shard_gb: largest file in 2^30 bytes.

    Returns:
        Lines to print.

    Raises:
        ConfigError: for a dtype or size that is none, or a model without a language backbone.
        BadDataError: if ``out`` holds a checkpoint already.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    try:
        shard_bytes = int(float(shard_gb) * 2**30)
    except ValueError as error:
        raise ConfigError(f"shard_gb must be a number, not {shard_gb!r}") from error
    if shard_bytes < 1:
        raise ConfigError(f"shard_gb must be positive, not {shard_gb}")
    if out.exists() and not out.is_dir():
        raise BadDataError(f"{out} is a file; give a folder")
    if (out / "config.json").exists():
        raise BadDataError(f"{out} holds a checkpoint already; give another folder")
    model, _ = load_checkpoint(find_checkpoint(checkpoint))
    backbone: Any = getattr(model, "backbone", None)
    if not isinstance(backbone, HybridLM | HFCausalLM):
        raise ConfigError(f"{checkpoint}: its model has no language backbone that transformers knows")
    lines = []
    if any("lora_" in name for name, _ in backbone.named_parameters()):
        merge_lora(backbone)
        lines.append("adapters    merged into the weights")
    if hasattr(model, "encode_audio"):
        from bestiary.shared.hub.music_flamingo import save_pretrained as save_audio

        save_audio(model, out, DTYPES[dtype] if dtype else None, shard_bytes)
        name = "MusicFlamingo" if model.rotary_time is not None else "AudioFlamingo3"
        return [
            *lines,
            f"checkpoint  {out}",
            f"load it     transformers.{name}ForConditionalGeneration.from_pretrained(…)",
        ]
    if isinstance(backbone, HybridLM):
        save_pretrained(backbone, out, DTYPES[dtype] if dtype else None, shard_bytes)
    else:
        if dtype:
            backbone.lm.to(DTYPES[dtype])
        backbone.lm.save_pretrained(out, max_shard_size=shard_bytes)
        if hasattr(backbone.tokenizer, "hf"):
            backbone.tokenizer.hf.save_pretrained(out)
    if not hasattr(backbone.tokenizer, "hf"):
        lines.append(f"tokenizer   {backbone.tokenizer.key}: transformers has no files for it, so none are written")
    return [*lines, f"checkpoint  {out}", "load it     transformers.AutoModelForCausalLM.from_pretrained(…)"]
