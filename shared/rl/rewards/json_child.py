"""What a worker process of the ``json_schema`` verifier runs: a strict parser and jsonschema. Free of torch."""

from __future__ import annotations

import json
import math
from typing import Any

from bestiary.shared.core.errors import require

jsonschema: Any = require("jsonschema", "rl")
referencing: Any = require("referencing", "rl")

DEEPEST = 64
"""Levels of nesting an answer may have."""


def judge(text: str | None, schema: Any) -> list[str]:
    """``[verdict, note]``; the verdict is ``valid``, ``invalid`` or ``bad schema``. Without a text, that of the schema.

    A reference is followed inside the schema alone; nothing is fetched.
    """
    try:
        kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except Exception as error:
        return ["bad schema", f"{getattr(error, 'message', error)}"[:300]]
    if text is None:
        return ["valid", ""]
    try:
        value = parse(text)
    except (ValueError, RecursionError) as error:
        return ["invalid", f"no JSON: {error}"[:200]]
    try:
        error = next(kind(schema, registry=referencing.Registry()).iter_errors(value), None)
    except referencing.exceptions.Unresolvable as problem:
        return ["bad schema", f"{problem}"[:300]]
    return ["valid", ""] if error is None else ["invalid", f"{error.json_path}: {error.message}"[:200]]


def parse(text: str) -> Any:
    """JSON to the letter: no key twice, no NaN or infinity, no deep nesting.

    Raises:
        ValueError: if it is not that.
    """

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key comes twice")
        return found

    def number(digits: str) -> float:
        if not math.isfinite(float(digits)):
            raise ValueError("a number is too large")
        return float(digits)

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    value = json.loads(text, object_pairs_hook=members, parse_float=number, parse_constant=constant)
    layer, depth = [value], 0
    while layer:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"nested deeper than {DEEPEST} levels")
        inner = [v for v in layer if isinstance(v, dict | list)]
        layer = [child for v in inner for child in (v.values() if isinstance(v, dict) else v)]
    return value
