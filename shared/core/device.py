"""Which device to use."""

from __future__ import annotations

import torch

from bestiary.shared.core.errors import ConfigError


def pick_device(wanted: str) -> torch.device:
    """The GPU if there is one and ``auto`` is wanted.

    Raises:
        ConfigError: for a name that is no device of this machine.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={wanted}: there is no such device here ({reason})") from error
