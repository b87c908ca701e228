"""What a run was trained on, as files said at its first start: kept as data.json in its folder, and held to later.

A config may leave to files what data is: a plan, lists of folds, what lies in a folder. Those files can change under a
run. A data source that reads such files has the three optional members of
:class:`~bestiary.shared.core.protocols.DataSource` (``state``, ``adopt``, ``seen``); others are left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from bestiary.shared.core.checkpoint import Structure, find_checkpoint, read_json, write_json
from bestiary.shared.core.config import differences
from bestiary.shared.core.errors import ConfigError, UserError
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.runs import Run

FILE_NAME = "data.json"
SHOWN = 8
"""Differences that a message lists."""
LONGEST_NAME = 120
"""Characters of a file's name that overrides are spelled out in; what is longer is cut and numbered by its hash."""


def state_of(source: DataSource) -> dict[str, Any] | None:
    """What a source took from files, as JSON gives it back; None for a source that takes nothing from them."""
    state = getattr(source, "state", None)
    return json.loads(json.dumps(state())) if callable(state) else None


def say_remarks(source: DataSource, config: dict[str, Any]) -> None:
    """Print what a source has to say of a run's config."""
    remarks: Any = getattr(source, "remarks", None)
    for line in remarks(config) if remarks is not None else []:
        print(f"note: {line}", flush=True)


def run_folder_of(folder: Path) -> Path | None:
    """The run that a checkpoint lies in, or None where it stands alone."""
    return next((p for p in (folder, *folder.parents) if (p / "run.json").is_file()), None)


def stored_state(run_folder: Path) -> dict[str, Any] | None:
    """What a run recorded, or None for one whose source has no state (or that was begun before this was recorded)."""
    file = run_folder / FILE_NAME
    return read_json(file) if file.is_file() else None


def record(run: Run, source: DataSource) -> None:
    """Write what a run is trained on at its first start; at a later one, see that it is still the same.

    Raises:
        ConfigError: with what differs, if the data of a run that goes on is another now. The run is closed then.
    """
    if (run.folder / "result.json").is_file():
        return
    try:
        _record(run, state_of(source))
    except UserError:
        run.close()
        raise


def _record(run: Run, state: dict[str, Any] | None) -> None:
    if state is None:
        return
    stored = stored_state(run.folder)
    if stored is None:
        write_json(run.folder / FILE_NAME, state)
        return
    lines = differences(_named(stored), _named(state))
    if not lines and (changed := differences(stored, state)):
        # A file that was found bad and mended is what a run waits for; but it is not the run that it was.
        cases = ", ".join(sorted({line.partition(":")[0].rpartition(".")[2] for line in changed})[:SHOWN])
        print(f"note: files were changed since this run began, and are taken as they are now: {cases}", flush=True)
        write_json(run.folder / FILE_NAME, state)
        return
    if not lines and json.dumps(stored) != json.dumps(state):
        lines = ["the same cases in another order"]
    if lines:
        shown = "\n".join(lines[:SHOWN]) + (f"\n… and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")
        raise ConfigError(
            f"{run.folder}: cannot go on: the data is not what it began with (stored -> now). Put the files back, "
            f"begin anew (resume=never, or another paths.run_dir), or start from its weights with init_from=:\n{shown}"
        )


def _named(state: dict[str, Any]) -> dict[str, Any]:
    """A state with the names of its cases alone, without what their files held."""
    cases = state.get("cases")
    return (
        state
        if not isinstance(cases, dict)
        else {**state, "cases": {part: dict.fromkeys(c, "there") for part, c in cases.items()}}
    )


def use_recorded_options(cfg: DictConfig, state: dict[str, Any] | None) -> None:
    """Put what was read from a plan in place of where it was read, so that the plan is not read again."""
    for key, value in ((state or {}).get("options") or {}).items():
        OmegaConf.update(cfg, f"dataset.{key}", value, force_add=True)


def hand_over(
    source: DataSource, state: dict[str, Any] | None, overrides: Sequence[str], model: nn.Module, structure: Structure
) -> None:
    """Make a source prepare its data as the model was trained, and hold out what its run held out.

    Args:
        source: the source, after the overrides. state: what the run recorded. overrides: what was said anew.
        model: the checkpoint's; what a run did not record is taken from it. structure: of the model.
    """
    adopt = getattr(source, "adopt", None)
    if not callable(adopt):
        return
    keys = [text.partition("=")[0] for text in overrides]
    changed = {key.split(".")[1] for key in keys if key.startswith("dataset.")}
    if "dataset" in keys:
        changed |= {"root", "split"}
    own: Any = model
    if state is None and structure.spec["task"] == "seg":
        state = {"normalization": own.schemes(), "axes": own.axes(), "spacing": list(structure.spec["spacing"])}
    if state is not None:
        adopt(state, changed)


def refuse_trained_on(source: DataSource, split: str, paths: Sequence[str]) -> None:
    """Refuse to score checkpoints on what one of them was trained on, as far as their runs recorded it.

    Args:
        source: what is scored. split: which part of it. paths: the checkpoints.

    Raises:
        ConfigError: naming the checkpoint and some of the cases.
    """
    seen: Any = getattr(source, "seen", None)
    if seen is None:
        return
    for path in paths:
        run_folder = run_folder_of(find_checkpoint(path))
        state = stored_state(run_folder) if run_folder else None
        if state is not None and (found := list(seen(state, split))):
            shown = f"{', '.join(found[:3])}{' …' if len(found) > 3 else ''}"
            raise ConfigError(
                f"{len(found)} cases of {split} ({shown}) were trained on by {path}: score a fold on its own val part, "
                "and an ensemble of folds on split=test"
            )


def named_after(overrides: Sequence[str]) -> str | None:
    """Overrides as a part of a file's name, so that other numbers than the run's own get a file of their own."""
    if not overrides:
        return None
    texts = [text.partition("=")[2] if text.startswith("dataset=") else text.split(".", 1)[-1] for text in overrides]
    name = "_".join(re.sub(r"[^\w.=+-]+", "-", text).strip("-") for text in texts)
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
