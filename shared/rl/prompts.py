"""Which prompts a step plays: the stream's samples from a cursor on, less those that a controller turns away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bestiary.shared.core.errors import BadDataError, UserError
from bestiary.shared.core.examples import Example, check_example
from bestiary.shared.core.loader import StageData
from bestiary.shared.rl.controllers.pass_rates import PassRates

MAX_REFUSED = 2000
"""Candidates turned away in a row, after which the run says that there is nothing left to play."""


class Prompts:
    """Draws prompts for all processes alike; a process then plays its share.

    Args:
        data: where they come from.
        controllers: each may turn a candidate away (``admit``).
        rates: what is known of each prompt.

    Attributes:
        cursor: the next sample of the stream.
    """

    def __init__(self, data: StageData, controllers: Sequence[Any], rates: PassRates):
        self.data, self.controllers, self.rates = data, list(controllers), rates
        self.cursor = 0

    def draw(self, step: int, count: int) -> list[Example]:
        """The next ``count`` prompts that every controller lets pass.

        Raises:
            UserError: if too many in a row are turned away.
            BadDataError: for an example that is no chat.
        """
        found: list[Example] = []
        refused = 0
        while len(found) < count:
            k, self.cursor = self.cursor, self.cursor + 1
            example = self.data.source.train_example(k, self.data.stream, self.data.part)
            if "messages" not in example:
                raise BadDataError(f"example {example.get('id')!r} is no chat: reinforcement learning needs prompts")
            record = self.rates.get(example["id"])
            rng = self.data.stream.rng(k, "admit")
            if all(c.admit(step, example, record, rng) for c in self.controllers):
                found.append(check_example(example))
                refused = 0
            else:
                refused += 1
                if refused > MAX_REFUSED:
                    raise UserError(
                        f"stage {self.data.stream.stage}, step {step}: the controllers turned {MAX_REFUSED:,} prompts "
                        "in a row away. The policy may have learned the task: end the stage here, give it harder "
                        "prompts, or widen the filter"
                    )
        return found
