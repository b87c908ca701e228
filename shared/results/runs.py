"""How a row of a table is run, and what its runs say: `measure.py` runs them."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bestiary.shared.core.config import quoted
from bestiary.shared.core.errors import UserError
from bestiary.shared.results.details import Detail
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

    def run_dir(self, runs: Path, seed: int, start: Path | None) -> Path:
        """The folder of one run: the same for the same code, overrides and ``start``, so that a stopped run goes on.

        With uncommitted changes nothing says that the code is the same, and every start gets a folder of its own.
        """
        known = self.overrides if start is None else (*self.overrides, f"after {start}")
        digest = hashlib.sha256("\0".join(known).encode()).hexdigest()[:8]
        code = self.commit[:10] + (f"-dirty-{self.started:%Y%m%dT%H%M%S}" if self.dirty else "")
        return self.row_dir(runs) / f"{digest}-{code}" / f"seed_{seed}"

    def row_dir(self, runs: Path) -> Path:
        """The folder of all runs of this row, whatever they were composed from."""
        return runs / "reproduce" / self.table.project / self.table.id / self.row.id

    def command(self, train: Path, folder: Path, start: Path | None, seed: int) -> list[str]:
        """The command line of one run.

        Args:
            train: the training script. folder: the run's folder. start: the run that it starts from. seed: its seed.
        """
        given = [sys.executable, str(train), *self.overrides, *self.start(start), f"seed={seed}"]
        return [*given, f"paths.run_dir={quoted(folder)}"]

    @staticmethod
    def start(folder: Path | None) -> list[str]:
        """The override that starts from a run."""
        return [] if folder is None else [f"init_from={quoted(folder)}"]


def summarise(plan: Plan, results: Sequence[Mapping[str, Any]]) -> list[Measurement]:
    """Mean and sample standard deviation over the seeds' ``result.json``.

    Args:
        plan: the row.
        results: one a seed. One that was taken over from an earlier call also holds ``commits`` and ``any_dirty``, and
            the measurement then names all commits.

    Raises:
        RunError: if a run lacks a metric of the table, or holds one that is not finite.
    """
    measurements = []
    for metric in plan.table.metrics:
        if metric.key in plan.row.lacks:
            continue
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
                commit=" ".join(dict.fromkeys(c for r in results for c in r.get("commits", [plan.commit]))),
                dirty=plan.dirty or any(r.get("any_dirty", False) for r in results),
                wall_s=_over(results, "wall_s", statistics.fmean),
                peak_gb=_over(results, "peak_gb", max),
                scope=_scope(plan, results),
            )
        )
    return measurements


def detail_lines(plan: Plan, results: Sequence[Mapping[str, Any]]) -> list[Detail]:
    """What details.csv keeps of each run, where the table asks for it."""
    prefix, found = plan.table.details, []
    for seed, result in zip(plan.seeds, results, strict=True) if prefix else ():
        values = {k.removeprefix(prefix): v for k, v in result["metrics"].items() if k.startswith(prefix)}
        values = {k: math.nan if v is None else float(v) for k, v in values.items()}
        commit, date = " ".join(result.get("commits", [plan.commit])), plan.started.strftime("%Y-%m-%dT%H:%M:%SZ")
        scope = _scope(plan, [result])
        found.append(Detail(plan.table.id, plan.row.id, prefix, seed, scope, commit, date, values))
    return found


def read_result(folder: Path) -> dict[str, Any]:
    """A finished run's result.json.

    Raises:
        RunError: if there is none, or it holds no metrics.
    """
    file = folder / "result.json"
    try:
        result = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: the run left no usable result: {error}") from error
    if not isinstance(result, dict) or not isinstance(result.get("metrics"), dict):
        raise RunError(f"{file}: the run left no usable result: it holds no metrics")
    return result


def call(plan: Plan) -> list[Measurement]:
    """Measure a row by its function, in this process.

    Raises:
        RunError: if the function is not ours, does not fit its arguments or yields no metric of the table.
    """
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
            "commit": plan.commit,
            "dirty": plan.dirty,
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
