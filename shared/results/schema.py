"""Files that follow a schema, and messages that name the file and the place where one does not."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bestiary.shared.core.errors import UserError, require


def read_yaml(path: Path, error: type[UserError]) -> Any:
    """What a YAML file holds.

    Args:
        path: the file.
        error: what is raised if it cannot be read or is not YAML.
    """
    yaml = require("yaml", "zoo")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path}: cannot be read: {getattr(problem, 'strerror', None) or problem}") from problem
    except yaml.YAMLError as problem:
        raise error(f"{path}: not valid YAML: {problem}") from problem


def nearest(name: str, names: Sequence[str]) -> str:
    """``; did you mean 'x'?``, or what there is."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(names) or 'none'}"


class Checker:
    """Checks values of a file.

    Args:
        path: the file, which every message names.
        error: what is raised.
    """

    def __init__(self, path: Path, error: type[UserError]) -> None:
        self.path, self.error = path, error

    def fail(self, where: str, what: str) -> NoReturn:
        """Raise the error: this place of the file is wrong in this way."""
        raise self.error(f"{self.path}: {where} {what}")

    def mapping(
        self, value: Any, where: str, known: set[str] | None, required: set[str] | frozenset[str] = frozenset()
    ) -> dict[str, Any]:
        """The value, if it is a mapping with these keys; ``known=None`` allows all."""
        if not isinstance(value, dict):
            self.fail(where, f"must be a mapping, not {type(value).__name__}")
        for key in value:
            if known is not None and key not in known:
                self.fail(where, f"has an unknown key {key!r}{nearest(str(key), sorted(known))}")
        missing = sorted(required - set(value))
        if missing:
            self.fail(where, f"lacks {', '.join(missing)}")
        return value

    def entries(self, data: dict[str, Any], key: str) -> list[Any]:
        """A list that is not empty."""
        if not isinstance(data[key], list) or not data[key]:
            self.fail(key, "must be a list with at least one entry")
        return data[key]

    def text(self, data: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
        """A text, which is not empty unless there is a default."""
        value = data.get(key, default)
        if not isinstance(value, str) or (not value and default is None):
            self.fail(f"{where}.{key}", f"must be a text, not {value!r}")
        return value

    def number(self, value: Any, where: str) -> float:
        """A finite number."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.fail(where, f"must be a number, not {value!r}")
        return value

    def unique(self, names: list[str], where: str) -> None:
        """No name twice."""
        for name in names:
            if names.count(name) > 1:
                self.fail(where, f"has {name!r} twice")
