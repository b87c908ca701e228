"""A checkpoint is a folder: structure.json (what to build) and weights.safetensors (what to fill it with).

structure.json holds the project, its choices and overrides, the data's spec, the resolved nodes of model, encoder and
backbone, and every ``prepare`` step so far. It is data: its nodes pass the same allowlist and signature checks as a
command line, and loading needs neither the data set nor the machine that wrote it.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from bestiary.shared.core.build import build, nearest
from bestiary.shared.core.errors import BadDataError, ConfigError, UserError
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import derive_seed

FORMAT = 1


@dataclass
class Structure:
    """What structure.json holds.

    Attributes:
        project: the project's name.
        choices: the option of each config group. overrides: the command line.
        spec: the data's spec, as a dict.
        parts: the resolved ``model``, ``encoder`` and ``backbone`` nodes; absent ones are None.
        prepare: the ``prepare`` nodes that were applied, in order.
        seed: the seed the module tree was initialised with.
    """

    project: str
    choices: dict[str, str]
    overrides: list[str]
    spec: dict[str, Any]
    parts: dict[str, Any]
    prepare: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0
    format: int = FORMAT


def build_model(structure: Structure) -> nn.Module:
    """Build the module tree that a structure describes, with freshly initialised weights.

    The same structure gives the same weights: initialisation depends on its seed alone.
    """
    spec = DataSpec.from_dict(structure.spec)
    torch.manual_seed(derive_seed(structure.seed, "model"))
    # A part that was overridden to none may still carry a tuned number: without a target it is no part.
    parts = {name: node for name, node in structure.parts.items() if node and "_target_" in node}
    backbone, encoder, model = (parts.get(name) for name in ("backbone", "encoder", "model"))
    kind = (backbone or {}).get("kind", "mixer")
    built_backbone = build(backbone, spec=spec) if backbone else None
    context: dict[str, Any] = {"spec": spec, "backbone": built_backbone}
    context["mixer"] = built_backbone if kind == "mixer" else None
    context["encoder"] = build(encoder, **context) if encoder else None
    built = build(model, **context)
    if not isinstance(built, nn.Module):
        raise ConfigError("model: the target did not build a torch module")
    tasks = getattr(built, "tasks", None)
    if tasks is not None and spec.task not in tasks:
        raise ConfigError(
            f"{type(built).__name__} takes data of task {' or '.join(tasks)}, and this data set is of task {spec.task}"
        )
    for number, node in enumerate(structure.prepare):
        built = apply_prepare(built, node, structure.seed, number)
    return built


def apply_prepare(model: nn.Module, node: dict[str, Any], seed: int, number: int) -> nn.Module:
    """Apply the ``number``-th prepare step; what it initialises depends on (seed, number) alone."""
    torch.manual_seed(derive_seed(seed, "prepare", number))
    return build(node, model=model)


def save_checkpoint(folder: Path, model: nn.Module, structure: Structure) -> None:
    """Write weights.safetensors and structure.json, each aside and then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".weights.{os.getpid()}.safetensors"
    try:
        save_model(model, str(aside))
    except SafetensorError as error:
        aside.unlink(missing_ok=True)
        # safetensors reports a full disk in words of its own.
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "weights.safetensors")) from error
        raise
    with open(aside, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(aside, folder / "weights.safetensors")
    write_json(folder / "structure.json", asdict(structure))


def load_checkpoint(path: Path | str) -> tuple[nn.Module, Structure]:
    """Load a model from a run folder (its last finished stage) or a stage folder.

    Returns:
        The model on the CPU in eval mode, and its structure.

    Raises:
        BadDataError: if there is no checkpoint, or weights and structure do not fit.
    """
    folder = find_checkpoint(path)
    structure = load_structure(folder)
    try:
        model = build_model(structure)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'structure.json'}: {error}") from error
    load_weights(model, folder)
    return model.eval(), structure


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill a model from the weights of a checkpoint folder, strictly."""
    file = folder / "weights.safetensors"
    try:
        load_model(model, str(file), strict=True)
    except (RuntimeError, SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadDataError(f"{file} does not fit its structure.json or is damaged: {reason}") from error


def load_structure(folder: Path) -> Structure:
    """Read structure.json of a checkpoint folder."""
    file = folder / "structure.json"
    values = read_json(file)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BadDataError(
            f"{file} has format {values.get('format') if isinstance(values, dict) else '?'}; "
            f"this version reads {FORMAT}"
        )
    try:
        structure = Structure(**values)
        DataSpec.from_dict(structure.spec)
        for name in ("choices", "parts"):
            dict(getattr(structure, name))
    except (TypeError, ValueError, ConfigError) as error:
        raise BadDataError(f"{file} was written by another version, or edited: {error}") from error
    return structure


def find_checkpoint(path: Path | str) -> Path:
    """The checkpoint folder that a path means: itself, or the last finished stage of a run folder.

    Raises:
        BadDataError: if there is none; the message says what was looked for.
    """
    given = Path(path).expanduser()
    folder = given.parent if given.name in ("weights.safetensors", "structure.json") else given
    if (folder / "structure.json").is_file() and (folder / "weights.safetensors").is_file():
        return folder
    run_file = folder / "run.json"
    if run_file.is_file():
        stages = read_json(run_file)["stages"]
        done = [folder / "stages" / s for s in stages if (folder / "stages" / s / "DONE").is_file()]
        if done:
            return done[-1]
        raise BadDataError(f"{folder}: no stage of this run is finished yet ({', '.join(stages)})")
    hint = ""
    if not folder.exists() and folder.parent.is_dir():
        hint = nearest(folder.name, [p.name for p in folder.parent.iterdir()])
    raise BadDataError(f"{given}: no checkpoint there (a run folder, or a stage folder with structure.json){hint}")


def read_json(file: Path) -> Any:
    """Read JSON that a run has written.

    Raises:
        BadDataError: if it cannot be read.
    """
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadDataError(f"{file} cannot be read: {error}") from error


def write_json(file: Path, values: Any) -> None:
    """Write JSON aside, then rename."""
    with aside_of(file) as aside, open(aside, "w") as handle:
        json.dump(values, handle, indent=1)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())


@contextmanager
def aside_of(file: Path) -> Iterator[Path]:
    """A path to write to, which takes the file's place if all went well, and is taken away if not."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield aside
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    os.replace(aside, file)


def make_folder(folder: Path, key: str) -> None:
    """Make a folder to write into, if it is not there, and see that it can be written.

    Args:
        folder: the folder. key: what names another, for the message.

    Raises:
        UserError: if it cannot be made or written.
    """
    probe = folder / f".{os.getpid()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"{folder}: cannot be written ({error.strerror}). Give another folder with {key}") from None
