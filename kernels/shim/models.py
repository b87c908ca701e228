"""``mamba_ssm.models``: the language model of mamba-ssm, its config and its blocks. No attention layers."""

from __future__ import annotations

import json
import math
from collections import namedtuple
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bestiary.kernels.shim.generation import GenerationMixin
from bestiary.kernels.shim.mamba import Block, GatedMLP, Mamba
from bestiary.kernels.shim.mamba2 import Mamba2
from bestiary.kernels.shim.norms import RMSNorm

_MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2}

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


@dataclass
class MambaConfig:
    """The config of :class:`MambaLMHeadModel`, fields as ``mamba_ssm.models.config_mamba.MambaConfig``."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict = field(default_factory=dict)
    attn_layer_idx: list = field(default_factory=list)
    attn_cfg: dict = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


def create_block(
    d_model: int,
    d_intermediate: int | dict | None = 0,
    ssm_cfg: dict | None = None,
    attn_layer_idx: list | None = None,
    attn_cfg: dict | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device=None,
    dtype=None,
) -> Block:
    """One residual block.

    Args:
        d_model: width.
        d_intermediate: inner width of an MLP after the mixer, 0 for none. (In 1.x this was the place of ``ssm_cfg``,
            which is understood.)
        ssm_cfg: ``layer`` ("Mamba1" or "Mamba2") and arguments of that module.
        attn_layer_idx: layers that attend; must not hold this one.
        attn_cfg: not used.
        norm_epsilon: of the norms.
        rms_norm: RMS norms instead of layer norms.
        residual_in_fp32: as :class:`Block`.
        fused_add_norm: as :class:`Block`.
        layer_idx: key of the layer in a cache.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        NotImplementedError: for an attention layer.
        ValueError: for an unknown ``layer``.
    """
    if d_intermediate is None or isinstance(d_intermediate, dict):
        d_intermediate, ssm_cfg = 0, d_intermediate or ssm_cfg
    if attn_layer_idx and layer_idx in attn_layer_idx:
        raise NotImplementedError("the shim's models have no attention layers: attn_layer_idx must be empty")
    options = dict(ssm_cfg or {})
    layer = options.pop("layer", "Mamba1")
    if layer not in _MIXERS:
        raise ValueError(f"ssm_cfg['layer'] must be one of {', '.join(_MIXERS)}, not {layer!r}")
    kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
    block = Block(
        d_model,
        partial(_MIXERS[layer], layer_idx=layer_idx, **options, **kwargs),
        partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **kwargs)
        if d_intermediate
        else nn.Identity,
        partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **kwargs),
        fused_add_norm,
        residual_in_fp32,
    )
    block.layer_idx = layer_idx  # type: ignore[assignment]
    return block


def _init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Normal embeddings, zero biases, and projections into the residual stream scaled by 1/sqrt of their number."""
    if isinstance(module, nn.Linear) and module.bias is not None and not getattr(module.bias, "_no_reinit", False):
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, parameter in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter /= math.sqrt(n_residuals_per_layer * n_layer)


class MixerModel(nn.Module):
    """Embedding, blocks, last norm.

    Args:
        d_model: width.
        n_layer: blocks.
        d_intermediate: as :func:`create_block`.
        vocab_size: rows of the embedding.
        ssm_cfg: as :func:`create_block`, like the rest.
        attn_layer_idx: see there.
        attn_cfg: see there.
        norm_epsilon: see there.
        rms_norm: see there.
        initializer_cfg: arguments of the initialisation.
        fused_add_norm: see there.
        residual_in_fp32: see there.
        device: see there.
        dtype: see there.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict | None = None,
        attn_layer_idx: list | None = None,
        attn_cfg: dict | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocab_size, d_model, **kwargs)
        self.layers = nn.ModuleList(
            create_block(
                d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm,
                residual_in_fp32, fused_add_norm, i, **kwargs,
            )
            for i in range(n_layer)
        )  # fmt: skip
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **kwargs)
        residuals = 2 if d_intermediate else 1
        options = {"n_residuals_per_layer": residuals} | (initializer_cfg or {})
        self.apply(partial(_init_weights, n_layer=n_layer, **options))

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs: Any) -> dict[int, Any]:
        """The states of every layer."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)  # type: ignore[operator]
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids: torch.Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> torch.Tensor:
        """(B, L) tokens to (B, L, d_model)."""
        hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, inference_params=inference_params, **mixer_kwargs)
        total = hidden_states if residual is None else hidden_states + residual
        return self.norm_f(total.to(self.norm_f.weight.dtype))


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """The language model: :class:`MixerModel` and a head, tied to the embedding by default.

    Args:
        config: the sizes; a dict is taken too.
        initializer_cfg: arguments of the initialisation.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self, config: MambaConfig | dict, initializer_cfg: dict | None = None, device=None, dtype=None
    ) -> None:
        super().__init__()
        config = MambaConfig(**config) if isinstance(config, dict) else config
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // multiple) * multiple
        self.backbone = MixerModel(
            d_model=config.d_model,
            n_layer=config.n_layer,
            d_intermediate=config.d_intermediate,
            vocab_size=vocab_size,
            ssm_cfg=config.ssm_cfg,
            attn_layer_idx=config.attn_layer_idx,
            attn_cfg=config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device=device, dtype=dtype)
        self.apply(partial(_init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head be the embedding, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **kwargs: Any) -> dict[int, Any]:
        """The states of every layer."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """(B, L) tokens to ``.logits`` (B, L or num_last_tokens, V); ``position_ids`` are not used."""
        hidden_states = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        return CausalLMOutput(logits=self.lm_head(hidden_states))

    @classmethod
    def from_pretrained(cls, pretrained_model_name: str, device=None, dtype=None, **kwargs: Any) -> MambaLMHeadModel:
        """A model from a local folder with config.json and weights; the network is never asked.

        Raises:
            FileNotFoundError: if there is no such folder, or a file is missing.
        """
        model = cls(MambaConfig(**load_config_hf(pretrained_model_name)), device=device, dtype=dtype, **kwargs)
        weights = load_state_dict_hf(pretrained_model_name, device=device, dtype=dtype)
        if "lm_head.weight" not in weights and model.config.tie_embeddings:
            weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        model.load_state_dict(weights)
        return model

    def save_pretrained(self, save_directory: str) -> None:
        """Write config.json and pytorch_model.bin to a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=4))


def load_config_hf(model_name: str) -> dict[str, Any]:
    """config.json of a local folder.

    Raises:
        FileNotFoundError: if there is none.
    """
    return json.loads((_local(model_name) / "config.json").read_text())


def load_state_dict_hf(model_name: str, device=None, dtype=None) -> dict[str, torch.Tensor]:
    """The weights of a local folder: model.safetensors or pytorch_model.bin.

    Raises:
        FileNotFoundError: if there are none.
    """
    folder = _local(model_name)
    if (folder / "model.safetensors").exists():
        from safetensors.torch import load_file

        weights = load_file(folder / "model.safetensors")
    elif (folder / "pytorch_model.bin").exists():
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    else:
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    return {name: value.to(device=device, dtype=dtype) for name, value in weights.items()}


def _local(name: str) -> Path:
    folder = Path(name)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{name} is no local folder with a config.json; the shim downloads nothing: fetch the model yourself and "
            "pass its folder"
        )
    return folder
