"""What each module of the shim offers: ``name: "home[:name there]"``, homes below ``bestiary.kernels``."""

from __future__ import annotations

VERSIONS = {"mamba_ssm": "2.3.2+bestiary", "causal_conv1d": "1.6.0+bestiary"}


OUTSIDE = ("einops",)
"""Homes that are packages of their own, imported where they are asked for."""


def _from(home: str, *names: str, **renamed: str) -> dict[str, str]:
    return {name: home for name in names} | {name: f"{home}:{own}" for name, own in renamed.items()}


_SCAN = _from(
    "shim.ops",
    "bimamba_inner_fn",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_inner_ref",
    "selective_scan_fn",
    "selective_scan_ref",
)
_CONV = _from("shim.ops", "causal_conv1d_fn", "causal_conv1d_update")
_EINOPS = _from("einops", "rearrange", "repeat")  # upstream's modules import them, and some code takes them from there
_MIXER = _from("shim.models", "MambaLMHeadModel", "MixerModel", "create_block")
_NORMS_V1 = _from("shim.norms", "RMSNorm", layer_norm_fn="layer_norm_fn_v1", rms_norm_fn="rms_norm_fn_v1")
_RAW_CONV = _from(
    "shim.raw",
    causal_conv1d_fwd="conv_fwd",
    causal_conv1d_bwd="conv_bwd",
    causal_conv1d_update="conv_update",
)

MODULES: dict[str, dict[str, str]] = {
    "mamba_ssm": {
        **{name: home for name, home in _SCAN.items() if name.endswith("_fn")},
        **_from("shim.mamba", "Mamba"),
        **_from("shim.mamba2", "Mamba2"),
        **_from("shim.models", "MambaLMHeadModel"),
    },
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {
        **_SCAN,
        **_CONV,
        **_from("shim.norms", "rms_norm_forward"),
        **_EINOPS,
    },
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.selective_state_update": {
        **_from("shim.ops", "selective_state_update"),
        **_from("state_update.reference", "selective_state_update_ref"),
    },
    "mamba_ssm.ops.triton.ssd_combined": {
        **_from("shim.ops", "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
    },
    "mamba_ssm.ops.triton.layernorm": _NORMS_V1,
    "mamba_ssm.ops.triton.layer_norm": {
        **_from("shim.norms", "RMSNorm", "layer_norm_fn", "rms_norm_fn", "rms_norm_forward"),
    },
    "mamba_ssm.ops.triton.layernorm_gated": {
        **_from(
            "shim.norms",
            RMSNorm="GatedRMSNorm",
            LayerNorm="GatedLayerNorm",
            rmsnorm_fn="gated_rms_norm_fn",
            layernorm_fn="gated_norm_fn",
        ),
    },
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {
        **_from("shim.mamba", "Mamba", Block="BlockV1"),
        **_SCAN,
        **_CONV,
        **_NORMS_V1,
        **_from("shim.ops", "selective_state_update"),
        **_EINOPS,
    },
    "mamba_ssm.modules.mamba2": _from("shim.mamba2", "Mamba2") | _EINOPS,
    "mamba_ssm.modules.block": _from("shim.mamba", "Block"),
    "mamba_ssm.modules.mlp": _from("shim.mamba", "GatedMLP"),
    "mamba_ssm.modules.ssd_minimal": _from("ssd", "ssd_minimal_discrete"),
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": _from("shim.models", "MambaConfig"),
    "mamba_ssm.models.mixer_seq_simple": _MIXER | _from("shim.models", "MambaConfig"),
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": {
        **_from("shim.generation", "GenerationMixin", "InferenceParams", "decode", "sample"),
    },
    "mamba_ssm.utils.hf": _from("shim.models", "load_config_hf", "load_state_dict_hf"),
    "causal_conv1d": _CONV,
    "causal_conv1d.causal_conv1d_interface": {
        **_CONV,
        **_from("shim.ops", "causal_conv1d_ref"),
        **_from("causal_conv1d.update_reference", "causal_conv1d_update_ref"),
    },
    "causal_conv1d.causal_conv1d_varlen": _from("causal_conv1d.update", "causal_conv1d_varlen_states"),
    "causal_conv1d.cpp_functions": {
        "causal_conv1d_fwd_function": "shim.raw:conv_fwd",
        "causal_conv1d_bwd_function": "shim.raw:conv_bwd",
        "causal_conv1d_update_function": "shim.raw:conv_update",
    },
    "causal_conv1d_cuda": _RAW_CONV,
    "selective_scan_cuda": _from("shim.raw", fwd="scan_fwd", bwd="scan_bwd"),
    "selective_scan_cuda_core": _from("shim.raw", fwd="core_fwd", bwd="core_bwd"),
    "selective_scan_cuda_oflex": _from("shim.raw", fwd="oflex_fwd", bwd="oflex_bwd"),
}
