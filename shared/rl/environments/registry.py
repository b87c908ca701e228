"""Environments by name."""

from __future__ import annotations

import importlib
from typing import Any

from bestiary.shared.core.build import check_arguments, nearest
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.rl.protocols import Environment

_HERE = "bestiary.shared.rl.environments"

ENVIRONMENTS: dict[str, str] = {
    "calculator": f"{_HERE}.calculator:Calculator",
    "python_tool": f"{_HERE}.python_tool:PythonTool",
    "single_turn": f"{_HERE}.single_turn:SingleTurn",
    "workplace": f"{_HERE}.workplace:Workplace",
}
"""Name to ``module:Class``; a module is imported when its environment is made. A project may add its own."""


def make_environment(name: str, **options: Any) -> Environment:
    """An environment by name.

    Args:
        name: of :data:`ENVIRONMENTS`.
        **options: arguments of its class.

    Raises:
        ConfigError: for an unknown name, or an option that the environment does not have.
    """
    if name not in ENVIRONMENTS:
        there = ", ".join(sorted(ENVIRONMENTS))
        raise ConfigError(f"there is no environment {name!r}{nearest(name, ENVIRONMENTS)}. There are: {there}")
    module, _, attribute = ENVIRONMENTS[name].partition(":")
    target = getattr(importlib.import_module(module), attribute)
    check_arguments(target, options, f"environment {name!r}")
    return target(**options)
