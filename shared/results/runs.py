"""Running a row of a table: by training it in a subprocess, or by calling its function."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import UserError
from bestiary.shared.results.measured import Measurement
from bestiary.shared.results.tables import Row, Table


class RunError(UserError):
    """A row that could not be run, or whose run did not yield its numbers."""


@dataclass(frozen=True)
class Plan:
    """How one row will be run.

    Attributes:
        table: its table.
        row: the row.
        seeds: seeds of the runs; ignored by rows with a function.
        extra: overrides from the command line; they make the run a reduced one.
        commit: git commit of the code.
        dirty: whether tracked code differs from it.
        started: UTC time, to the second.
    """

    table: Table
    row: Row
    seeds: tuple[int, ...]
    extra: tuple[str, ...]
    commit: str
    dirty: bool
    started: datetime

    @property
    def before(self) -> Plan | None:
        """The plan of the row that this one's runs start from."""
        return replace(self, row=self.table.row(self.row.after)) if self.row.after else None

    @property
    def overrides(self) -> tuple[str, ...]:
        """Hydra overrides without seed and folder."""
        return (*(self.row.overrides or ()), *self.extra)

    @property
    def scope(self) -> str:
        """``full``, or ``reduced: what``; whatever was changed on the command line counts as reduced."""
        if not self.extra:
            return self.row.scope
        changed = shlex.join(self.extra)
        return f"reduced: {changed}" if self.row.scope == "full" else f"{self.row.scope}, {changed}"

    def run_dir(self, runs: Path, seed: int) -> Path:
        """The folder of one run: the same for the same code and overrides, so that a stopped run goes on.

        With uncommitted changes nothing says that the code is the same, and every start gets a folder of its own.
        """
        known = (*self.overrides, f"after {self.before.run_dir(runs, seed)}") if self.before else self.overrides
        digest = hashlib.sha256("\0".join(known).encode()).hexdigest()[:8]
        code = self.commit[:10] + (f"-dirty-{self.started:%Y%m%dT%H%M%S}" if self.dirty else "")
        return (
            runs / "reproduce" / self.table.project / self.table.id / self.row.id / f"{digest}-{code}" / f"seed_{seed}"
        )

    def command(self, train: Path, runs: Path, seed: int) -> list[str]:
        """The command line of one run."""
        start = [f"init_from={_quoted(self.before.run_dir(runs, seed))}"] if self.before else []
        folder = f"paths.run_dir={_quoted(self.run_dir(runs, seed))}"
        return [sys.executable, str(train), *self.overrides, *start, f"seed={seed}", folder]


def _quoted(path: Path) -> str:
    """A path as Hydra's grammar takes it."""
    text = str(path)
    return text if re.fullmatch(r"[\w./-]+", text) else "'" + text.replace("'", "\\'") + "'"


def execute(plan: Plan, train: Path, runs: Path) -> list[Measurement]:
    """Run the row and return one measurement per metric of the table.

    Args:
        plan: what to run.
        train: path of the training script.
        runs: folder of all runs.

    Raises:
        RunError: if a run fails or lacks a metric; nothing is measured then.
    """
    if plan.row.function is not None:
        return _call(plan)
    results = [_train(plan, train, runs, seed) for seed in plan.seeds]
    return summarise(plan, results)


def summarise(plan: Plan, results: Sequence[Mapping[str, Any]]) -> list[Measurement]:
    """Mean and sample standard deviation over the seeds' ``result.json``.

    Raises:
        RunError: if a run lacks a metric of the table, or holds one that is not finite.
    """
    measurements = []
    for metric in plan.table.metrics:
        values = []
        for seed, result in zip(plan.seeds, results, strict=True):
            if metric.reads not in result["metrics"]:
                have = ", ".join(sorted(result["metrics"])) or "none"
                where = f"{plan.table.ref} {plan.row.id}, seed {seed}"
                raise RunError(f"{where}: the run has no metric {metric.reads!r}; it has: {have}")
            values.append(_finite(result["metrics"][metric.reads], f"{metric.reads} of seed {seed}"))
        measurements.append(
            _measurement(
                plan,
                metric.key,
                values,
                seeds=plan.seeds,
                config_hash=_same_or_list(results, "config_hash"),
                data_revision=_same_or_list(results, "data_revision"),
                torch=_same_or_list(results, "torch"),
                device=_same_or_list(results, "device"),
                wall_s=_over(results, "wall_s", statistics.fmean),
                peak_gb=_over(results, "peak_gb", max),
                scope=_scope(plan, results),
            )
        )
    return measurements


def _train(plan: Plan, train: Path, runs: Path, seed: int) -> dict[str, Any]:
    if plan.before and not (plan.before.run_dir(runs, seed) / "result.json").is_file():
        _train(plan.before, train, runs, seed)
    command = plan.command(train, runs, seed)
    print(f"{plan.table.ref} {plan.row.id}, seed {seed}: {shlex.join(command[1:])}", flush=True)
    file = plan.run_dir(runs, seed) / "result.json"
    # train.py itself skips what is done and goes on where it was stopped.
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        raise RunError(f"{plan.table.ref} {plan.row.id}, seed {seed}: training ended with status {code}")
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: the run left no usable result: {error}") from error
    if not isinstance(result, dict) or not isinstance(result.get("metrics"), dict):
        raise RunError(f"{file}: the run left no usable result: it holds no metrics")
    return result


def _call(plan: Plan) -> list[Measurement]:
    module, _, name = str(plan.row.function).partition(":")
    if not module.startswith("bestiary."):  # a table is data: it may name our code, not anyone's
        raise RunError(f"{plan.table.path}: row {plan.row.id}: the function must be in bestiary, not {module!r}")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RunError(f"{plan.table.ref} {plan.row.id}: {plan.row.function} cannot be loaded: {error}") from error
    try:
        inspect.signature(function).bind(**plan.row.args)
    except TypeError as error:
        raise RunError(f"{plan.table.path}: row {plan.row.id}: args do not fit {plan.row.function}: {error}") from error
    start = time.perf_counter()
    values = function(**plan.row.args)  # {metric: number}, and data_revision if it read data
    wall = time.perf_counter() - start
    found, revision = [], str(values.get("data_revision", ""))
    for metric in plan.table.metrics:
        if metric.reads not in values:
            continue  # a function may leave out what it cannot say; the cell stays "not run"
        value = _finite(values[metric.reads], metric.reads)
        extra = {
            "scope": plan.scope,
            "config_hash": "",
            "data_revision": revision,
            "torch": _torch(),
            "device": "cpu",
            "peak_gb": None,
        }
        found.append(_measurement(plan, metric.key, [value], seeds=(), wall_s=round(wall, 3), **extra))
    if not found:
        raise RunError(f"{plan.row.function} returned none of: {', '.join(m.reads for m in plan.table.metrics)}")
    return found


def _measurement(plan: Plan, metric: str, values: list[float], *, seeds: Sequence[int], **known: Any) -> Measurement:
    return Measurement(
        table=plan.table.id,
        row=plan.row.id,
        metric=metric,
        value=statistics.fmean(values),
        n_seeds=len(values),
        std=statistics.stdev(values) if len(values) > 1 else None,
        seeds=" ".join(map(str, seeds)),
        commit=plan.commit,
        dirty=plan.dirty,
        overrides=shlex.join(plan.overrides),
        date=plan.started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        **known,
    )


def _scope(plan: Plan, results: Sequence[Mapping[str, Any]]) -> str:
    """Reduced if the table, the command line or any run itself says so (a debug run does)."""
    said = [str(result.get("scope") or "full") for result in results]
    return plan.scope if plan.scope != "full" else next((scope for scope in said if scope != "full"), "full")


def _finite(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RunError(f"{what} is {value!r}, not a number")
    return float(value)


def _same_or_list(results: Sequence[Mapping[str, Any]], key: str) -> str:
    return " ".join(dict.fromkeys(str(result.get(key) or "") for result in results)).strip()


def _over(results: Sequence[Mapping[str, Any]], key: str, how: Any) -> float | None:
    values = [result[key] for result in results if result.get(key) is not None]
    return round(float(how(values)), 3) if values else None


def _torch() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def now() -> datetime:
    """The time that stands in measured.csv."""
    return datetime.now(UTC).replace(microsecond=0)
