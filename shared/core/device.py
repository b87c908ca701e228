"""Which device to use."""

from __future__ import annotations

import torch

from bestiary.shared.core.errors import ConfigError


def pick_device(wanted: str) -> torch.device:
    """The GPU if there is one and ``auto`` is wanted.

    Raises:
        ConfigError: for a name that is no kind of device.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device={wanted}: there is no such kind of device") from error
