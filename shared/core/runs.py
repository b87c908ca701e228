"""Run folders: where a run is written, how it is found again, and what is recorded about it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bestiary.shared.core.checkpoint import make_folder, read_json, write_json
from bestiary.shared.core.config import config_hash, resolved
from bestiary.shared.core.errors import ConfigError, UserError
from bestiary.shared.core.machine import git_commit

RUN_DIR_VARIABLE = "BESTIARY_RUN_DIR"
"""Tells the other ranks, which are started with the same command line, where the first one writes."""


@dataclass
class Run:
    """An open run folder.

    Attributes:
        folder: the run folder. config: the resolved config, as data. config_hash: its identity.
        resumed: whether it was there before. choices, overrides: what it was composed from.
    """

    folder: Path
    config: dict[str, Any]
    choices: dict[str, str]
    overrides: list[str]
    config_hash: str
    resumed: bool = False
    _lock: Any = field(default=None, repr=False)

    @property
    def stages(self) -> Path:
        """The folder that holds one folder a stage."""
        return self.folder / "stages"

    def close(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


@dataclass
class FinishedRun:
    """What a project's report is made from.

    Attributes:
        folder: the run folder. metrics: held-out metrics. source: the data source.
        baselines: name to metrics, from the source and from compared runs.
        compared: name to the folder of a compared run.
        evaluations: the protocols that were called, by name. split: the part they were called on.
        scope: ``full``, or ``reduced: what``.
    """

    folder: Path
    metrics: dict[str, float]
    source: Any
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    compared: dict[str, Path] = field(default_factory=dict)
    evaluations: dict[str, tuple[Any, str | None]] = field(default_factory=dict)
    split: str = "test"
    scope: str = "full"


def open_run(cfg: DictConfig, choices: dict[str, str], overrides: list[str]) -> Run:
    """Make a run folder, or find the unfinished one of the same config, and lock it.

    Raises:
        ConfigError: if the folder that was asked for belongs to another config or is in use.
    """
    values = resolved(cfg)
    identity = config_hash(values)
    project = values["project"]["name"]
    run = Run(Path(), values, choices, overrides, identity)
    resume, wanted = values["resume"], values["paths"]["run_dir"]
    if rank():
        given = wanted or os.environ.get(RUN_DIR_VARIABLE)
        if not given:
            raise ConfigError("processes that something else starts (torchrun) need one folder: give paths.run_dir=…")
        run.folder = Path(given).expanduser().absolute()
        return run
    if wanted or resume not in ("auto", "never", None):
        run.folder = Path(wanted or resume).expanduser().absolute()
        if not wanted and not (run.folder / "run.json").is_file():
            raise ConfigError(f"resume={resume}: there is no run in that folder")
        _claim(run, must=True)
    else:
        base = Path(values["paths"]["runs"]).expanduser().absolute() / project
        found = resume == "auto" and _find_unfinished(run, base)
        if not found:
            stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
            suffix = os.environ.get("WANDB_RUN_ID", identity[:6])
            run.folder = base / f"{stamp}_{suffix}"
            _claim(run, must=True)
    os.environ[RUN_DIR_VARIABLE] = str(run.folder)
    _write_head(run)
    return run


def rank() -> int:
    """This process's rank, also before a process group exists."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))


def _find_unfinished(run: Run, base: Path) -> bool:
    for file in sorted(base.glob("*/run.json"), reverse=True):
        try:
            same = json.loads(file.read_text()).get("config_hash") == run.config_hash
        except (OSError, json.JSONDecodeError):
            continue
        if same and not (file.parent / "result.json").is_file():
            run.folder = file.parent
            if _claim(run, must=False):
                return True
    return False


def _claim(run: Run, must: bool) -> bool:
    """Lock the folder for this process; the lock goes when the process does, however it ends."""
    make_folder(run.folder, "paths.run_dir=… or paths.runs=…")
    lock = open(run.folder / ".lock", "w")  # noqa: SIM115 - held for as long as the run lives
    try:
        # Not flock: the workers of a loader would inherit it, and hold it for seconds after this process was killed.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        if must:
            raise ConfigError(f"{run.folder}: another process is writing this run") from None
        return False
    file = run.folder / "run.json"
    if file.is_file():
        try:
            stored = read_json(file)
        except UserError:
            lock.close()
            raise
        if stored.get("config_hash") != run.config_hash:
            lock.close()
            if must:
                raise ConfigError(
                    f"{run.folder} holds a run of another configuration; choose another folder, "
                    "or start from its weights with init_from="
                )
            return False
        run.resumed = True
    run._lock = lock
    return True


def _write_head(run: Run) -> None:
    (run.folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(run.config)))
    write_json(
        run.folder / "run.json",
        {
            "project": run.config["project"]["name"],
            "choices": run.choices,
            "overrides": run.overrides,
            "stages": list(run.config["recipe"]["run"]),
            "config_hash": run.config_hash,
        },
    )
    history = run.folder / "environment.jsonl"
    previous = history.read_text().splitlines() if history.is_file() else []
    now = environment()
    if previous:
        before = json.loads(previous[-1])["commit"]
        if before != now["commit"]:
            print(f"note: this run was begun at commit {before[:10]}, and goes on at {now['commit'][:10]}", flush=True)
    with open(history, "a") as handle:
        handle.write(json.dumps(now) + "\n")


def environment() -> dict[str, Any]:
    """What a number depends on besides its config: versions, device, commit, threads."""
    import torch

    commit, dirty = git_commit()
    return {
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def device_name() -> str:
    """The first GPU's name, or the CPU's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({os.cpu_count()} cores)"


def peak_memory_gb() -> float:
    """Peak memory in GiB: of the GPU if one was used, else resident memory of this process."""
    import resource

    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_result(run: Run, metrics: dict[str, float], revision: str, began: float, scope: str) -> dict[str, Any]:
    """Write result.json, which also marks the run as finished.

    Args:
        run: the run.
        metrics: held-out metrics.
        revision: the data's revision.
        began: ``time.monotonic()`` when this process began.
        scope: ``full``, or ``reduced: what``.
    """
    now = environment()
    spent = _wall_file(run)
    result = {
        "run_dir": str(run.folder),
        "project": run.config["project"]["name"],
        "metrics": metrics,
        "seed": run.config["seed"],
        "scope": scope,
        "overrides": run.overrides,
        "commit": now["commit"],
        "dirty": now["dirty"],
        "config_hash": run.config_hash,
        "data_revision": revision,
        "torch": now["torch"],
        "device": now["device"],
        "wall_s": round(spent + time.monotonic() - began, 1),
        "peak_gb": round(peak_memory_gb(), 3),
        "date": now["date"],
    }
    write_json(run.folder / "result.json", result)
    return result


def _wall_file(run: Run) -> float:
    """Seconds that earlier processes spent on this run, as far as they could say."""
    file = run.folder / "wall_s.json"
    return float(json.loads(file.read_text())) if file.is_file() else 0.0


def add_wall_time(run: Run, began: float) -> None:
    """Remember the seconds this process spent, before it stops."""
    write_json(run.folder / "wall_s.json", _wall_file(run) + time.monotonic() - began)
