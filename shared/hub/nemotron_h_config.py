"""config.json of nemotron_h checkpoints, of any age, to a HybridConfig and back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import BadDataError, MissingDataError
from bestiary.shared.language.hybrid.config import OURS, HybridConfig

MODEL_TYPE = "nemotron_h"

_LETTERS = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "mlp": "-",
    "moe": "E",
}
"""Names of layers in ``layers_block_type``, those of older files too."""

_ALIASES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "mamba_proj_bias": "use_bias",
    "attention_head_dim": "head_dim",
    "num_local_experts": "n_routed_experts",
    "norm_eps": "layer_norm_epsilon",
    "rms_norm_eps": "layer_norm_epsilon",
}
"""Names of older files; where both stand, the new one wins."""

_ASSUMED = {
    "mamba_hidden_act": ("silu",),
    "mlp_hidden_act": ("relu2",),
    "hidden_dropout": (0, 0.0, None),
    "attention_dropout": (0, 0.0, None),
    "sliding_window": (None,),
}
"""What the stack here takes for granted; a checkpoint that says otherwise is refused."""


def read_config(path: str | Path) -> tuple[HybridConfig, dict[str, Any]]:
    """The shape of a checkpoint.

    Args:
        path: its folder.

    Returns:
        The config, and all of config.json that is not in it (token ids, lengths …), which a saved copy keeps.

    Raises:
        MissingDataError: if there is no config.json.
        BadDataError: if it is another kind of model's, or asks for what the stack does not have.
    """
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        raise MissingDataError(f"{path} has no config.json: it is no checkpoint folder")
    try:
        raw = decode_floats(json.loads(file.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadDataError(f"{file} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise BadDataError(f"{file} is not a JSON object")
    if raw.get("model_type") != MODEL_TYPE:
        raise BadDataError(f"{file}: model_type is {raw.get('model_type')!r}, not {MODEL_TYPE}")
    return parse_config(raw, str(file))


def parse_config(raw: dict[str, Any], where: str = "config.json") -> tuple[HybridConfig, dict[str, Any]]:
    """The same from a dict, see :func:`read_config`."""
    values = dict(raw)
    for old, new in _ALIASES.items():
        if old in values:
            value = values.pop(old)
            values.setdefault(new, value)
    for name, allowed in _ASSUMED.items():
        if values.get(name, allowed[0]) not in allowed:
            raise BadDataError(f"{where}: {name} is {values[name]!r}; there is {allowed[0]!r} alone here")
    pattern: Any = _pattern(values, "hybrid_override_pattern", ("layers_block_type", "layer_types"), where)
    mtp: Any = _pattern(values, "mtp_hybrid_override_pattern", ("mtp_layers_block_type",), where, optional=True)
    count = values.pop("num_hidden_layers", None)
    if count is not None and count != len(pattern):
        raise BadDataError(f"{where}: num_hidden_layers is {count}, and the pattern has {len(pattern)} layers")
    if "E" not in pattern + (mtp or ""):
        values |= {"n_routed_experts": 0, "num_experts_per_tok": 0}
    # A pattern without dense MLPs stores the experts' width there, or nothing of use.
    if values.get("n_shared_experts", 1) == 0:
        values["moe_shared_expert_intermediate_size"] = 0
    found = {name: values.pop(name) for name in HybridConfig.names() if name in values and name != "pattern"}
    known: dict[str, Any] = {k: v for k, v in found.items() if v is not None or k == "moe_latent_size"}
    if mtp is not None:
        known["mtp_pattern"] = mtp
    for name in ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "auto_map"):
        values.pop(name, None)
    return HybridConfig(pattern=pattern, **known), values


def _pattern(
    values: dict[str, Any], name: str, lists: tuple[str, ...], where: str, optional: bool = False
) -> str | Any | None:
    text = values.pop(name, None)
    kinds = [values.pop(key, None) for key in lists]
    names = next((k for k in kinds if k), None)
    if names:
        unknown = [k for k in names if k not in _LETTERS]
        if unknown:
            raise BadDataError(f"{where}: layers of kind {unknown[0]!r} are not known; there are {', '.join(_LETTERS)}")
        return "".join(_LETTERS[k] for k in names)
    if text:
        return text.replace("|", "")  # Megatron-Bridge marks pipeline stages so
    if optional:
        return None
    raise BadDataError(f"{where}: neither {name} nor {lists[0]} says which layers there are")


def write_config(folder: Path, config: HybridConfig, extra: dict[str, Any], dtype: str) -> None:
    """Write config.json as transformers and the released remote code read it.

    Args:
        folder: of the checkpoint.
        config: the shape.
        extra: the rest, see :func:`read_config`.
        dtype: of the weights, for example ``bfloat16``.
    """
    values: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "hybrid_override_pattern": config.layers,
        "num_hidden_layers": len(config.layers),
        "mamba_hidden_act": "silu",
        "mlp_hidden_act": "relu2",
        "n_shared_experts": int(config.moe_shared_expert_intermediate_size > 0),
        **{k: v for k, v in config.to_dict().items() if k not in (*OURS, "pattern", "mtp_pattern")},
    }
    if config.num_nextn_predict_layers:
        values["mtp_hybrid_override_pattern"] = config.mtp_pattern
    if "E" not in config.layers + config.mtp_pattern * bool(config.num_nextn_predict_layers):
        for name in [n for n in values if "expert" in n or n.startswith("moe_")]:
            del values[name]
    if "-" not in config.layers and config.intermediate_size == 0:
        values["intermediate_size"] = config.moe_intermediate_size or config.hidden_size
    merged = {**extra, **values}
    (folder / "config.json").write_text(json.dumps(encode_floats(merged), indent=2, sort_keys=True) + "\n")


def decode_floats(value: Any) -> Any:
    """``{"__float__": "Infinity"}``, as transformers writes what JSON has no number for, to a float; in any depth."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {k: decode_floats(v) for k, v in value.items()}
    if isinstance(value, list):
        return [decode_floats(v) for v in value]
    return value


def encode_floats(value: Any) -> Any:
    """The inverse of :func:`decode_floats`."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {k: encode_floats(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode_floats(v) for v in value]
    return value
