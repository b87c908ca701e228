"""``prepare`` steps: pure functions Model -> Model that change the module tree between stages.

Each is a config node, recorded in structure.json; loading a checkpoint replays them in order, then loads the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from bestiary.shared.core.errors import ConfigError, require


def lora(
    model: nn.Module,
    targets: Sequence[str],
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
) -> nn.Module:
    """Put low-rank adapters on linear layers (peft); they start as no change.

    Args:
        model: any model.
        targets: globs over full module names, for example ``["*.q_proj", "*.v_proj"]``.
        r: rank.
        alpha: the update is scaled by ``alpha / r``.
        dropout: on the adapter's input.

    Returns:
        The same model, adapters injected; the base weights are frozen by the stage's ``trainable: ["*lora_*"]``.

    Raises:
        ConfigError: if no linear layer matches.

    Paper: arXiv:2106.09685.
    """
    peft = require("peft", "zoo")
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and matches(n, targets)]
    if not names:
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise ConfigError(f"lora: no linear layer matches {list(targets)}; there are, for example, {linear[:6]}")
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
    peft.inject_adapter_in_model(config, model)
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold the adapters of :func:`lora` into the layers they sit on and take them out.

    Raises:
        ConfigError: if the model has none.
    """
    layers = [(n, m) for n, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "merge")]
    if not layers:
        raise ConfigError("merge_lora: the model has no adapters")
    for name, layer in layers:
        layer.merge()
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], layer.base_layer)
    return model


def freeze(model: nn.Module, parameters: Sequence[str]) -> nn.Module:
    """Stop the gradients of the parameters whose names match one of the globs.

    Raises:
        ConfigError: if none matches.
    """
    hit = [p for n, p in model.named_parameters() if matches(n, parameters)]
    if not hit:
        raise ConfigError(f"freeze: no parameter matches {list(parameters)}")
    for parameter in hit:
        parameter.requires_grad_(False)
    return model


def set_trainable(model: nn.Module, globs: Sequence[str]) -> list[nn.Parameter]:
    """Let exactly the parameters that match a glob be trained.

    A glob that begins with ``!`` takes back what earlier ones gave. Integer and quantised parameters stay frozen.

    Returns:
        The trainable parameters.

    Raises:
        ConfigError: if nothing is left to train.
    """
    chosen = []
    for name, parameter in model.named_parameters():
        wanted = False
        for glob in globs:
            if fnmatchcase(name, glob.removeprefix("!")):
                wanted = not glob.startswith("!")
        wanted = wanted and torch.is_floating_point(parameter)
        parameter.requires_grad_(wanted)
        if wanted:
            chosen.append(parameter)
    if not chosen:
        names = [n for n, _ in model.named_parameters()]
        raise ConfigError(f"trainable: nothing matches {list(globs)}; parameters are, for example, {names[:4]}")
    return chosen


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether a dotted name matches one of the globs."""
    return any(fnmatchcase(name, glob) for glob in globs)
