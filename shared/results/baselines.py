"""Rows that need no training: what a data set's own baseline scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bestiary.shared.core.errors import UserError


def measure(overrides: Sequence[str], name: str, split: str = "test") -> dict[str, Any]:
    """Score a baseline of the data set that these overrides select, as training does at its end.

    Args:
        overrides: Hydra overrides, those of the row it stands beside, so that the data are the same.
        name: which of ``source.baselines()``.
        split: the part of the data that is scored.

    Returns:
        Metrics with the split in front (``test/dice/mean``), and ``data_revision``.

    Raises:
        UserError: if the data set is not there or has no such baseline.
    """
    from bestiary.shared.core.build import build
    from bestiary.shared.core.config import compose
    from bestiary.shared.core.stages import read_evaluations

    cfg, _ = compose(list(overrides))
    source = build(cfg.dataset)
    source.check()
    protocols = [protocol for protocol, _ in read_evaluations(cfg).values()]
    found = source.baselines(split, protocols[0]) if hasattr(source, "baselines") else {}
    if name not in found:
        raise UserError(f"the data set has no baseline {name!r}; it has: {', '.join(found) or 'none'}")
    return {f"{split}/{key}": value for key, value in found[name].items()} | {"data_revision": source.revision}
