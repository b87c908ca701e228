"""A checkpoint folder of transformers' layout to the language backbone that reads it."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from bestiary.shared.core.build import resolve_target
from bestiary.shared.core.errors import BadDataError, MissingDataError, require


@cache
def backbone_targets() -> dict[str, str]:
    """``model_type`` to the class that reads it, from ``model_types`` in the projects' metafile.yaml."""
    yaml = require("yaml", "zoo")
    found: dict[str, str] = {}
    for project in sorted(files("bestiary.projects").iterdir(), key=lambda p: p.name):
        metafile = project / "metafile.yaml"
        if metafile.is_file():
            found |= (yaml.safe_load(metafile.read_text()) or {}).get("model_types") or {}
    return found


def load_pretrained(path: str | Path, **options: Any) -> Any:
    """A language backbone with the weights of a folder.

    A ``model_type`` that a project's metafile.yaml names goes to the class named there; every other one to
    transformers, behind :class:`~bestiary.shared.language.hf_causal_lm.HFCausalLM`.

    Args:
        path: the folder, with config.json.
        options: further arguments of the class.

    Raises:
        MissingDataError: if there is no config.json.
        BadDataError: if it cannot be read.
    """
    file = Path(path).expanduser() / "config.json"
    if not file.is_file():
        raise MissingDataError(f"{path} has no config.json: it is no checkpoint folder")
    try:
        model_type = json.loads(file.read_text()).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise BadDataError(f"{file} is not a JSON object: {error}") from error
    other = "bestiary.shared.language.hf_causal_lm.HFCausalLM"
    return resolve_target(backbone_targets().get(model_type, other))(path=str(path), **options)
