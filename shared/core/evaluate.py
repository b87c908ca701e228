"""evaluate(): one function behind the training callback, tools/eval_model.py and tools/reproduce.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.protocols import DataSource, EvalProtocol


def evaluate(
    model: nn.Module,
    source: DataSource,
    protocol: EvalProtocol,
    split: str = "test",
    part: str | None = None,
    limit: int | None = None,
) -> dict[str, float]:
    """Score a model on the held-out examples of a source.

    Args:
        model: any Model; its mode (train or eval) is restored afterwards.
        source: the data source.
        protocol: how to score.
        split: ``val`` or ``test``.
        part: a part of the source, or None.
        limit: at most so many examples (debug runs).

    Returns:
        Metric names without the split, to values; NaN where a metric is undefined.

    Raises:
        BadDataError: if the split is empty.
    """
    examples: Sequence[Any] = source.held_out(split, part)
    if limit is not None:
        examples = examples[:limit]
    if not len(examples):
        raise BadDataError(f"the {split} part of this data set is empty")
    training = model.training
    # A protocol may sample; what it draws must not move the training's noise.
    state = torch.random.get_rng_state()
    model.eval()
    try:
        with torch.no_grad():
            return dict(protocol(model, examples))
    finally:
        model.train(training)
        torch.random.set_rng_state(state)


def evaluate_all(
    model: nn.Module,
    source: DataSource,
    evaluations: dict[str, tuple[EvalProtocol, str | None]],
    split: str,
    limit: int | None = None,
) -> dict[str, float]:
    """Run several named evaluations on one split and put their metrics into one dict, prefixed by the split.

    Args:
        model: the model.
        source: the data source.
        evaluations: name to (protocol, part); parts without examples in this split are left out.
        split: ``val`` or ``test``.
        limit: at most so many examples each.

    Raises:
        ConfigError: if two evaluations report the same metric.
    """
    result: dict[str, float] = {}
    for name, (protocol, part) in evaluations.items():
        if not len(source.held_out(split, part)):
            continue
        for metric, value in evaluate(model, source, protocol, split, part, limit).items():
            key = f"{split}/{metric}"
            if key in result:
                raise ConfigError(f"evaluation {name!r} reports {metric!r} a second time")
            result[key] = value
    return result
