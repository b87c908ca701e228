"""Fresh weights of a hybrid stack."""

from __future__ import annotations

import math

import torch
from torch import nn

from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.hybrid.mamba2 import Mamba2Mixer
from bestiary.shared.language.hybrid.moe import Experts, Router


@torch.no_grad()
def init_weights(model: nn.Module, config: HybridConfig) -> None:
    """Draw all weights anew.

    Linear layers, embeddings, experts and routers are normal with ``initializer_range``. Of a Mamba mixer, A is 1 to H
    over the heads, D is 1, dt_bias is the inverse softplus of log-uniform step sizes, and the output projection is
    PyTorch's uniform one over the square root of the number of layers where ``rescale_prenorm_residual`` says so (MLP
    and attention outputs are not rescaled). The convolution keeps PyTorch's initialisation, as in mamba-ssm.

    Source: transformers' nemotron_h.
    """
    std = config.initializer_range
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding | Router):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Experts):
            nn.init.normal_(module.up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)
    for module in model.modules():
        if isinstance(module, Mamba2Mixer):
            low, high = math.log(config.time_step_min), math.log(config.time_step_max)
            dt = torch.exp(torch.rand_like(module.dt_bias) * (high - low) + low).clamp(min=config.time_step_floor)
            module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            if config.rescale_prenorm_residual:
                nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
                module.out_proj.weight.div_(math.sqrt(len(config.layers)))
