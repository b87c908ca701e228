"""What a model can do before it is trained: the row that a gain is measured against."""

from __future__ import annotations

from collections.abc import Sequence

from bestiary.shared.core.build import build
from bestiary.shared.core.checkpoint import Structure, build_model
from bestiary.shared.core.config import compose, resolved
from bestiary.shared.core.evaluate import evaluate_all
from bestiary.shared.core.stages import device_of, read_evaluations


def untrained(overrides: Sequence[str], split: str = "test") -> dict[str, float]:
    """Evaluate the model of a run as it is before its first stage.

    Args:
        overrides: the run's command line.
        split: ``val`` or ``test``.

    Returns:
        Metrics under the names that the run's result would have.
    """
    cfg, choices = compose(list(overrides))
    values = resolved(cfg)
    source = build(cfg.dataset)
    source.check()
    parts = {name: values.get(name) or None for name in ("model", "encoder", "backbone")}
    spec = source.spec().to_dict()
    structure = Structure(values["project"]["name"], choices, list(overrides), spec, parts, seed=values["seed"])
    model = build_model(structure).to(device_of(cfg)).eval()
    limit = dict(cfg.get("debug") or {}).get("max_held_out")
    return evaluate_all(model, source, read_evaluations(cfg), split, limit)
