"""A protocol on a data set that is not the run's own: how far what was learnt here goes elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bestiary.shared.core.examples import Example
from bestiary.shared.core.protocols import DataSource, EvalProtocol


class OtherData:
    """Another protocol's numbers on the held-out examples of another source, whatever the run's own are.

    Args:
        source: the other data set; it is checked when this is built, so that a run does not end in a missing file.
        protocol: how to score it.
        label: put before the names of the numbers.
        split: ``val`` or ``test``. part: of the source, or None.

    Raises:
        MissingDataError: if the other data set is not there.
    """

    def __init__(
        self, source: DataSource, protocol: EvalProtocol, label: str, split: str = "test", part: str | None = None
    ):
        source.check()
        self.source, self.protocol, self.label, self.split, self.part = source, protocol, label, split, part
        self.name, self.version = protocol.name, protocol.version

    def __call__(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """The protocol's numbers; the run's own ``examples`` are not looked at."""
        values = self.protocol(model, self.source.held_out(self.split, self.part))
        return {f"{self.label}/{name}": value for name, value in values.items()}
