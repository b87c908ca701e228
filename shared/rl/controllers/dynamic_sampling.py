"""Drawing further prompts in place of those that teach nothing."""

from __future__ import annotations

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.rl.controllers.base import Controller


class DynamicSampling(Controller):
    """Tells the trainer to replace groups whose scores are all equal by further prompts, a number of times a step.

    The drawing is the trainer's. After the last round the step goes on with the groups it has.

    Paper: arXiv:2503.14476 (DAPO) Sec. 3.2; arXiv:2512.13607 (Cascade) uses it for instruction following.

    Args:
        max_rounds: how often a step draws again at most.

    Attributes:
        rounds: the same, as the trainer reads it.
    """

    def __init__(self, max_rounds: int = 4):
        if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 1:
            raise ConfigError(f"DynamicSampling.max_rounds is a whole number, 1 or more, not {max_rounds!r}")
        self.rounds = max_rounds
