"""``prepare`` steps: pure functions Model -> Model that change the module tree between stages.

Each is a config node, recorded in structure.json; loading a checkpoint replays them in order, then loads the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

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
    """Put low-rank adapters on linear layers, and on stacked weights of experts (peft); they start as no change.

    Names to match, of a Llama-like model: ``*.q_proj``, ``*.v_proj`` …; of a hybrid stack: ``*.mixer.in_proj``,
    ``*.mixer.out_proj``, ``*.mixer.q_proj``, ``*.mixer.up_proj`` …, and of all experts of a layer
    ``*.experts.up_proj`` and ``*.experts.down_proj`` (which ``*.up_proj`` and ``*.down_proj`` match too), where each
    expert has a low-rank update of its own, which is written out in full for each forward pass.

    A model that has these very adapters, from the stage or the run before, keeps them as they are.

    Args:
        model: any model.
        targets: globs over full names of linear modules or of parameters with three dimensions.
        r: rank.
        alpha: the update is scaled by ``alpha / r``.
        dropout: on the adapter's input; experts have none.

    Returns:
        The same model, adapters injected; the base weights are frozen by the stage's ``trainable: ["*lora_*"]``.

    Raises:
        ConfigError: if nothing matches, for a dropout on experts, or if layers that match have other adapters.

    Paper: arXiv:2106.09685.
    """
    peft = require("peft", "zoo")

    def wanted(name: str) -> bool:
        return matches(name, targets) and ".base_layer" not in name and ".lora_" not in name

    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and wanted(n)]
    shared = shared_weights(model)
    if tied := [n for n in names if f"{n}.weight" in shared]:
        raise ConfigError(f"lora: {tied[0]} shares its weight with another layer, which a merge would change too")
    stacked = [n for n, p in model.named_parameters() if p.ndim == 3 and "conv" not in n and wanted(n)]
    if has := {name: scales for name, scales in adapters(model).items() if matches(name, targets)}:
        if not names and not stacked and set(has.values()) == {(r, alpha)}:
            return model
        name, (rank, scale) = next(iter(has.items()))
        raise ConfigError(
            f"lora: the model has other adapters already ({name}: r {rank}, alpha {scale:g}); put merge_lora before it"
        )
    if stacked and dropout:
        raise ConfigError(f"lora: adapters on experts ({stacked[0]}, …) have no dropout")
    if not names and not stacked:
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise ConfigError(
            f"lora: no linear layer and no expert matches {list(targets)}; there are, for example, {linear[:6]}"
        )
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, target_parameters=stacked or None
    )
    peft.inject_adapter_in_model(config, model)
    return model


def adapters(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Full name of each layer or parameter that :func:`lora` has put an adapter on, to its rank and alpha."""
    found = {}
    module: Any
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and getattr(module, "r", None):
            # Two adapters on the experts of one layer stand one in the other.
            inner = [name.replace(".base_layer", ""), getattr(module, "parameter_name", None)]
            found[".".join(filter(None, inner))] = (module.r["default"], module.lora_alpha["default"])
    return found


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold the adapters of :func:`lora` into the layers they sit on and take them out.

    Raises:
        ConfigError: if the model has none.
    """
    layers = [(n, m) for n, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "merge")]
    if not layers:
        raise ConfigError("merge_lora: the model has no adapters")
    # Two adapters on the experts of one layer stand one in the other: the inner one goes first.
    for name, layer in reversed(layers):
        layer.merge()
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], layer.base_layer)
    return model


def shared_weights(model: nn.Module) -> set[str]:
    """Names of parameters that stand in more than one place."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    return {name for names in places.values() if len(names) > 1 for name in names}


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
