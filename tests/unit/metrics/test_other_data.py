"""What is scored is the other source's held-out part, by the protocol that is given."""

import pytest

from bestiary.shared.core.errors import MissingDataError
from bestiary.shared.metrics.other_data import OtherData


class Names:
    """How often each example is seen."""

    name, version = "names", "2"

    def __call__(self, model, examples):
        return {e["id"]: 1.0 for e in examples}


class Source:
    """Says of each example where it is from; ``there`` is whether its files are."""

    def __init__(self, there=True):
        self.there = there

    def check(self):
        if not self.there:
            raise MissingDataError("fetch it first")

    def held_out(self, split, part=None):
        return [{"id": f"{split}-{part}-{number}"} for number in range(2)]


def test_the_other_sources_examples_are_scored():
    protocol = OtherData(Source(), Names(), "away", split="val", part="rl")
    assert protocol(None, [{"id": "own"}]) == {"away/val-rl-0": 1.0, "away/val-rl-1": 1.0}
    assert (protocol.name, protocol.version) == ("names", "2")


def test_what_is_not_there_is_said_at_once():
    with pytest.raises(MissingDataError, match="fetch it first"):
        OtherData(Source(there=False), Names(), "away")
