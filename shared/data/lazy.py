"""Examples that are made when they are looked at."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from bestiary.shared.core.examples import Example


class LazyExamples(Sequence[Example]):
    """A sequence whose subclass says how many examples there are and makes one by its number, from 0."""

    @abstractmethod
    def example(self, at: int) -> Example:
        """Example ``at``."""

    def __getitem__(self, index: Any) -> Any:
        """One example, or a list of them for a slice."""
        places = range(len(self))[index]
        return self.example(places) if isinstance(places, int) else [self.example(at) for at in places]
