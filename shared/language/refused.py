"""Backbones that a paper used and nobody can build here: their presets say why."""

from __future__ import annotations

from typing import NoReturn

from bestiary.shared.core.errors import ConfigError


def refused(name: str, reason: str) -> NoReturn:
    """Say why a backbone cannot be built, and what could be done.

    Args:
        name: the backbone's.
        reason: why, and what to do.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(f"backbone {name} cannot be built: {reason}")
