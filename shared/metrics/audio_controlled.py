"""Any protocol on audio that is not the example's own: what a model knows without listening."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.core.protocols import EvalProtocol
from bestiary.shared.data.audio_controls import MODES, controlled


class AudioControlled:
    """Another protocol's numbers with silence, or with another clip, in place of each clip.

    Args:
        protocol: any.
        audio: ``silent`` or ``swapped``, see :mod:`bestiary.shared.data.audio_controls`; it is put before the numbers'
            names. ``real`` changes nothing.
        seed: of the swap.

    Raises:
        ConfigError: for another kind of audio.
    """

    def __init__(self, protocol: EvalProtocol, audio: str, seed: int = 0):
        if audio not in MODES:
            raise ConfigError(f"audio is {', '.join(MODES)}, not {audio!r}")
        self.protocol, self.audio, self.seed = protocol, audio, seed
        self.name, self.version = protocol.name, protocol.version

    def __call__(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """The protocol's numbers, each with the kind of audio before its name; none for a swap of a single clip."""
        heard = controlled(examples, self.audio, self.seed)
        try:
            heard[0]
        except ConfigError:  # of a single clip, as in a debug run
            return {}
        values = self.protocol(model, heard)
        prefix = "" if self.audio == "real" else f"{self.audio}/"
        return {f"{prefix}{name}": value for name, value in values.items()}
