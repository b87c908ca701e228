"""What a plan says of network, batch and loss, beside what a run composes: a plan sets the data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bestiary.shared.data.planning.plan import Plan
from bestiary.shared.data.planning.planner import BASE_FEATURES, MAX_FEATURES, PRESETS


def differs_from_plan(plan: Plan, config: Mapping[str, Any]) -> list[str]:
    """Settings of a run that are not what its plan was made for, one line each with the override that mends it.

    Args:
        plan: the plan.
        config: the run's config, resolved.
    """
    network, recipe = plan.network, config.get("recipe") or {}
    levels = len(network.strides)
    found: list[tuple[str, Any, Any]] = []
    if (batch := recipe.get("batch_size")) is not None:
        found.append(("recipe.batch_size", batch, network.batch_size))
    for name, stage in (recipe.get("stages") or {}).items():
        if "batch_dice" in (objective := stage.get("objective") or {}):
            found.append((f"recipe.stages.{name}.objective.batch_dice", objective["batch_dice"], network.batch_dice))
    encoder = config.get("encoder") or {}
    if "features" in encoder and "convs_per_stage" in encoder:
        top = MAX_FEATURES[len(network.patch_size)]
        usual = [min(BASE_FEATURES * 2**level, top) for level in range(levels)]
        features = encoder["features"]
        found.append(("encoder.features", usual if features is None else list(features), list(network.features)))
        residual = "residual" in str(encoder.get("_target_"))
        if residual == network.residual:
            found.append(("encoder.convs_per_stage", _convs(encoder, residual, levels), list(network.convs)))
            found += _decoder(config, encoder, residual, network.decoder_convs)
        else:
            kinds = {True: "unet_residual", False: "unet_plain"}
            found.append(("encoder", kinds[residual], kinds[network.residual]))
    return [
        f"{key} is {_shown(have)}, and {plan.file.name} ({plan.name}) has {_shown(want)}: a plan does not set it"
        for key, have, want in found
        if have != want
    ]


def _convs(encoder: Mapping[str, Any], residual: bool, levels: int) -> list[int]:
    given = encoder["convs_per_stage"]
    if given is None:
        blocks = PRESETS["resenc_m" if residual else "default"].blocks
        return [*blocks, *[blocks[-1]] * levels][:levels]
    return [given] * levels if isinstance(given, int) else list(given)


def _decoder(
    config: Mapping[str, Any], encoder: Mapping[str, Any], residual: bool, want: Sequence[int]
) -> list[tuple[str, Any, Any]]:
    network = (config.get("model") or {}).get("network") or {}
    if "decoder_convs" not in network:
        return []
    have = network["decoder_convs"]
    if have is None:  # the encoder's
        given = encoder["convs_per_stage"]
        have = 1 if residual else given if isinstance(given, int) else 2
    return [("model.network.decoder_convs", [have] * len(want) if isinstance(have, int) else list(have), list(want))]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
