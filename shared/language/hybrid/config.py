"""The shape of a hybrid stack. Fields are named as in the released ``config.json`` of nemotron_h."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from bestiary.shared.core.errors import ConfigError

KINDS = {"M": "Mamba-2", "*": "attention", "-": "MLP", "E": "mixture of experts"}
"""What a letter of a pattern stands for."""

OURS = ("transformers_clamp", "router_bias_rate", "mtp_depths")
"""Fields that no released config.json has."""


@dataclass(frozen=True)
class HybridConfig:
    """One mixer a layer, named by a letter of ``pattern``; no positional encoding anywhere.

    Source: transformers' nemotron_h and the released configs. Papers: arXiv:2504.03624 (Nemotron-H), arXiv:2508.14444
    (Nano 2), arXiv:2512.20856 (Nemotron 3).

    Attributes:
        pattern: one of ``M * - E`` a layer; None where it is not known: nothing is built from such a config.
        hidden_size: width of the residual stream.
        vocab_size: tokens, or None for the tokenizer's.
        intermediate_size: width of the MLP layers.
        num_attention_heads, num_key_value_heads, head_dim: grouped-query attention.
        mamba_num_heads, mamba_head_dim: their product is the inner width; there is no ``expand``.
        n_groups, ssm_state_size, conv_kernel: of the Mamba-2 mixer.
        chunk_size: tokens that the scan takes at once; speed and rounding alone.
        time_step_min, time_step_max, time_step_floor: range of the step sizes at initialisation.
        time_step_limit: bounds of the step sizes, in prefill and in decoding alike.
        transformers_clamp: bound them as transformers does instead: from below by ``time_step_min``, in prefill alone.
        n_routed_experts, num_experts_per_tok: experts, and how many a token takes.
        moe_intermediate_size: width of an expert. moe_shared_expert_intermediate_size: of the shared one, 0 for none.
        moe_latent_size: width that the experts work in (LatentMoE), or None for ``hidden_size``.
        routed_scaling_factor: multiplies the routed experts' weights. norm_topk_prob: make these sum to one before.
        n_group, topk_group: experts are taken from the best ``topk_group`` of ``n_group`` groups.
        router_bias_rate: step of the selection bias towards balance, after each optimiser step.
        num_nextn_predict_layers: modules that predict further ahead (MTP), 0 for none. mtp_pattern: their layers.
        mtp_depths: how far ahead they are trained; the last module serves all further depths. None: one each.
        layer_norm_epsilon: of all norms. initializer_range: standard deviation of fresh weights.
        rescale_prenorm_residual: shrink the Mamba output projections by the square root of the number of layers.
        use_bias, use_conv_bias, mlp_bias, attention_bias: of Mamba's projections, its convolution, MLPs, attention.
        tie_word_embeddings: the head is the embedding.

    Raises:
        ConfigError: for a pattern or sizes that cannot be.
    """

    pattern: str | None
    hidden_size: int
    vocab_size: int | None = None
    intermediate_size: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 128
    mamba_num_heads: int = 0
    mamba_head_dim: int = 64
    n_groups: int = 8
    ssm_state_size: int = 128
    conv_kernel: int = 4
    chunk_size: int = 128
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    transformers_clamp: bool = False
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_latent_size: int | None = None
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    router_bias_rate: float = 1e-3
    num_nextn_predict_layers: int = 0
    mtp_pattern: str = "*E"
    mtp_depths: int | None = None
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    use_bias: bool = False
    use_conv_bias: bool = True
    mlp_bias: bool = False
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "time_step_limit", tuple(float(x) for x in self.time_step_limit))
        if self.pattern is None:
            return
        layers = self.pattern + (self.mtp_pattern if self.num_nextn_predict_layers else "")
        for letter in layers:
            if letter not in KINDS:
                known = ", ".join(f"{k} ({v})" for k, v in KINDS.items())
                raise ConfigError(f"pattern {self.pattern!r}: {letter!r} is no layer; there are {known}")
        if not self.pattern:
            raise ConfigError("pattern is empty: a model needs a layer")
        modules, depths = self.num_nextn_predict_layers, self.mtp_depths
        if modules < 0 or (depths is not None and depths < max(modules, 1)):
            raise ConfigError(
                f"mtp_depths {depths} is less than num_nextn_predict_layers {modules}, or one is negative"
            )
        if "M" in self.mtp_pattern and self.num_nextn_predict_layers:
            raise ConfigError(f"mtp_pattern {self.mtp_pattern!r}: a head that looks ahead has no Mamba layer here")
        needed = {
            "M": ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "chunk_size"),
            "*": ("num_attention_heads", "num_key_value_heads", "head_dim"),
            "-": ("intermediate_size",),
            "E": ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"),
        }
        names = ["hidden_size", *(n for letter, group in needed.items() if letter in layers for n in group)]
        for name in names:
            if not getattr(self, name) or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more for the pattern {self.pattern!r}")
        if not 0 <= self.time_step_limit[0] <= self.time_step_limit[1]:
            raise ConfigError(f"time_step_limit must be (lowest, highest), not {self.time_step_limit}")
        if "M" in layers:
            self._divides("n_groups", "mamba_num_heads")
        if "*" in layers:
            self._divides("num_key_value_heads", "num_attention_heads")
        if "E" in layers:
            self._divides("n_group", "n_routed_experts")
            if self.topk_group > self.n_group:
                raise ConfigError(f"topk_group {self.topk_group} is more than n_group {self.n_group}")
            if self.num_experts_per_tok > self.n_routed_experts // self.n_group * self.topk_group:
                raise ConfigError(
                    f"num_experts_per_tok {self.num_experts_per_tok} is more than there are to choose from"
                )

    def _divides(self, part: str, whole: str) -> None:
        if getattr(self, whole) % getattr(self, part):
            raise ConfigError(f"{part} {getattr(self, part)} must be a divisor of {whole} {getattr(self, whole)}")

    @property
    def layers(self) -> str:
        """The pattern.

        Raises:
            ConfigError: if it is not known.
        """
        if self.pattern is None:
            raise ConfigError(
                "the order of this model's layers is not known (backbone.config.pattern is null), so it cannot be "
                "built; who knows it gives backbone.config.pattern='…', or the checkpoint: backbone.path=…"
            )
        return self.pattern

    @property
    def depths(self) -> int:
        """How many tokens beyond the next one are predicted in training."""
        if not self.num_nextn_predict_layers:
            return 0
        return self.mtp_depths or self.num_nextn_predict_layers

    @property
    def d_inner(self) -> int:
        """Inner width of the Mamba mixers."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the Mamba mixers' convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the fields."""
        return tuple(f.name for f in fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict."""
        return {name: getattr(self, name) for name in self.names()}
