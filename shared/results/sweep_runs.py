"""Running the trials of a sweep here: side by side, each once, with their results in sweep.csv."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import itertools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bestiary.shared.core.config import compose, config_hash, quoted, repo_root, resolved
from bestiary.shared.core.errors import BadDataError, ConfigError, UserError, require
from bestiary.shared.core.machine import git_commit
from bestiary.shared.results.jobs import End, Job, run_jobs
from bestiary.shared.results.render import aligned
from bestiary.shared.results.sweeps import Parameter, Sweep, SweepError, render, trials

FINISHED, FAILED, NO_METRIC = "finished", "failed", "no metric"


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: its place in the sweep, from 1 on.
        values: of the parameters.
        overrides: what its command gives to Hydra, without where it is written.
        identity: hash of its resolved config, by which it is known again.
        command: the whole command line. folder: its run folder.
    """

    number: int
    values: dict[str, Any]
    overrides: tuple[str, ...]
    identity: str
    command: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        """How it is called in what is printed."""
        return f"trial {self.number}"


def plan(
    sweep: Sweep, out: Path, most: int | None = None, seed: int = 0, extra: Sequence[str] = (), wandb: bool = False
) -> list[Trial]:
    """The trials of a sweep, all composed, so that what does not fit is said before the first one starts.

    Args:
        sweep: the sweep.
        out: the sweep's folder.
        most: trials in all, or None: the file's ``run_cap``.
        seed: of a random sweep's values.
        extra: further overrides, after those of the file.
        wandb: whether ``logger=wandb`` of the file is kept; else it is ``logger=csv``.

    Raises:
        SweepError: for a random sweep that would never end. ConfigError: for values that do not compose.
    """
    cap = min((n for n in (most, sweep.run_cap) if n is not None), default=None)
    if cap is None and sweep.method == "random":
        raise SweepError(f"{sweep.path}: a random sweep never ends: give it a run_cap, or --max")
    program = Path(sweep.program)
    if not program.is_absolute():
        program = (repo_root() or Path.cwd()) / program
    if not program.is_file():
        raise SweepError(f"{sweep.path}: program: there is no {program}")
    found: dict[str, Trial] = {}
    for values in trials(sweep, seed):
        if cap is not None and len(found) >= cap:
            break
        words = render(sweep.command, str(program), values, sys.executable)
        words = [*("logger=csv" if w == "logger=wandb" and not wandb else w for w in words), *extra]
        start = words.index(str(program)) + 1
        identity = _identity(program, words[start:])
        folder = out / "trials" / identity
        where = f"paths.run_dir={quoted(folder)}"
        trial = Trial(len(found) + 1, values, tuple(words[start:]), identity, (*words, where), folder)
        found.setdefault(identity, trial)  # two ways to say the same are one trial
    return list(found.values())


def _identity(program: Path, overrides: Sequence[str]) -> str:
    """The hash of the resolved config; of the command, for another program than the zoo's."""
    root = repo_root()
    if root is not None and program.resolve() == root / "tools" / "train.py":
        return config_hash(resolved(compose(list(overrides))[0]))
    return hashlib.sha256("\0".join([str(program), *overrides]).encode()).hexdigest()[:16]


@dataclass
class Results:
    """sweep.csv: one line for each trial that ended, the last one of a trial counts.

    Lines are added under a lock; a sweep with other parameters rewrites the file aside with more columns. A last line
    that was cut short (by a kill, by a full disk) is dropped.

    Args:
        file: the path.
    """

    file: Path
    rows: list[dict[str, str]] = field(default_factory=list)

    FIRST = ("trial", "hash")
    LAST = ("metric", "value", "status", "exit_code", "wall_s", "peak_gb", "commit", "dirty", "date", "folder", "log")

    def __post_init__(self) -> None:
        self.rows = self._read()[1]

    def add(self, row: dict[str, str], parameters: Sequence[str]) -> None:
        """Add the line of a trial."""
        with self.file.with_name(".sweep.csv.lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            columns, self.rows = self._read()
            own = [c for c in columns if c not in (*self.FIRST, *self.LAST)]
            wanted = [*self.FIRST, *own, *(p for p in parameters if p not in own), *self.LAST]
            self.rows.append(row)
            whole = not self.file.exists() or self.file.read_bytes().endswith(b"\n")
            if wanted != columns or not whole:
                self._write(wanted, self.rows)
                return
            with self.file.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, wanted, lineterminator="\n").writerow(row)
                file.flush()
                os.fsync(file.fileno())

    def latest(self) -> dict[str, dict[str, str]]:
        """The last line of each trial, by hash."""
        return {row["hash"]: row for row in self.rows}

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        if not self.file.is_file():
            return [], []
        text = self.file.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        columns = list(reader.fieldnames or [])
        if columns and not {*self.FIRST, *self.LAST} <= set(columns):
            missing = ", ".join(sorted({*self.FIRST, *self.LAST} - set(columns)))
            raise BadDataError(f"{self.file}: is not a sweep's (it lacks {missing}); take another folder with --out")
        return columns, list(reader)

    def _write(self, columns: Sequence[str], rows: Sequence[dict[str, str]]) -> None:
        aside = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        with aside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.file)


def run_sweep(
    sweep: Sweep, planned: Sequence[Trial], out: Path, parallel: int = 1, memory_gb: float | None = None
) -> Results:
    """Run the trials that are not finished; those that fail are noted with exit code and log, and the others go on.

    Args:
        sweep: the sweep.
        planned: its trials.
        out: the sweep's folder.
        parallel: trials at once; the cores are shared among them.
        memory_gb: main memory for all together; see :func:`run_jobs`.

    Returns:
        sweep.csv.

    Raises:
        ConfigError: if another process runs a sweep in this folder.
        KeyboardInterrupt: once all trials have stopped; the same command goes on from there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{out}: another process runs a sweep in this folder; --out names another") from None
        results = Results(out / "sweep.csv")
        before = results.latest()
        commit, dirty = git_commit()
        done = [t for t in planned if before.get(t.identity, {}).get("status") == FINISHED]
        others = {before[t.identity]["commit"][:10] for t in done} - {commit[:10]}
        if done:
            print(f"{len(done)} of {len(planned)} trials are finished", flush=True)
        if others:
            print(f"note: some of them ran at another commit ({', '.join(sorted(others))})", flush=True)
        names = [parameter.name for parameter in sweep.parameters]
        by_name = {trial.name: trial for trial in planned}

        def ended(end: End) -> None:
            trial = by_name[end.job.name]
            row = _row(sweep, trial, end) | {"commit": commit, "dirty": str(dirty).lower()}
            results.add(row, names)
            shown = (
                f"{sweep.metric} {row['value']}" if row["value"] else f"{row['status']}, exit code {row['exit_code']}"
            )
            print(f"[{trial.name}] {shown}" + ("" if row["value"] else f": {row['log']}"), flush=True)

        jobs = [
            Job(t.name, t.command, log=t.folder / "output.log", echo=False, kind="trial")
            for t in planned
            if t not in done
        ]
        threads = None if "OMP_NUM_THREADS" in os.environ else max(1, (os.cpu_count() or 1) // parallel)
        run_jobs(jobs, parallel, memory_gb, threads, ended)
        return results


def _row(sweep: Sweep, trial: Trial, end: End) -> dict[str, str]:
    """A line of sweep.csv, but for the commit."""
    value = read_metric(trial.folder, sweep.metric) if end.ok else None
    return {
        "trial": str(trial.number),
        "hash": trial.identity,
        **{name: str(value) for name, value in trial.values.items()},
        "metric": sweep.metric,
        "value": "" if value is None else repr(value),
        "status": FAILED if not end.ok else NO_METRIC if value is None else FINISHED,
        "exit_code": "" if end.code is None else str(end.code),
        "wall_s": f"{end.wall_s:.1f}",
        "peak_gb": "" if end.peak_gb is None else f"{end.peak_gb:.3f}",
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "folder": str(trial.folder),
        "log": str(end.job.log),
    }


def read_metric(folder: Path, name: str) -> float | None:
    """The last value of a metric in a run's metrics.csv, as W&B's summary holds it; None if it was never logged."""
    file = folder / "metrics.csv"
    if not file.is_file():
        return None
    with file.open(newline="", encoding="utf-8") as handle:
        values = [row[name] for row in csv.DictReader(handle) if row.get(name)]
    return float(values[-1]) if values else None


def ranked(sweep: Sweep, planned: Sequence[Trial], results: Results) -> list[dict[str, str]]:
    """The lines of these trials, best first; what has no finite metric is last."""
    latest = results.latest()
    lines = [
        # The line may have been written when the sweep had other parameters, and come to the same config.
        latest[t.identity] | {"trial": str(t.number)} | {name: str(value) for name, value in t.values.items()}
        for t in planned
        if t.identity in latest
    ]

    def key(row: dict[str, str]) -> tuple[bool, float]:
        value = _value(row)
        return (value is None, 0.0 if value is None else -value if sweep.maximize else value)

    return sorted(lines, key=key)


def _value(row: dict[str, str]) -> float | None:
    value = float(row["value"]) if row["status"] == FINISHED else math.nan
    return value if math.isfinite(value) else None


def table(sweep: Sweep, lines: Sequence[dict[str, str]]) -> list[str]:
    """The ranked lines as text."""
    names = [parameter.name for parameter in sweep.parameters]
    body = []
    for place, row in enumerate(lines, 1):
        value = _value(row)
        shown = f"{value:.4f}" if value is not None else row["value"] or f"{row['status']} ({row['exit_code']})"
        values = [_short(row[name]) for name in names]
        body.append((str(place) if value is not None else "-", shown, *values, row["trial"], row["wall_s"]))
    return aligned([("", sweep.metric, *names, "trial", "wall_s"), *body], right=(0, 1, len(names) + 3))


def _short(text: str) -> str:
    try:
        return f"{float(text):.4g}" if "." in text or "e" in text.lower() else text
    except ValueError:
        return text


def plot(sweep: Sweep, lines: Sequence[dict[str, str]], file: Path) -> None:
    """Draw the metric over each parameter, one panel each, the best trial marked; nothing where none has a metric.

    Args:
        sweep: the sweep.
        lines: best first, as :func:`ranked` gives them.
        file: a .png.
    """
    shown = [row for row in lines if _value(row) is not None]
    if not shown:
        return
    figure_module: Any = require("matplotlib.figure", "zoo")
    require("matplotlib.backends.backend_agg", "zoo")  # no display, and no global state of pyplot
    columns = min(3, len(sweep.parameters))
    lined = math.ceil(len(sweep.parameters) / columns)
    figure = figure_module.Figure(figsize=(4 * columns, 3.2 * lined), layout="constrained")
    panels = figure.subplots(lined, columns, squeeze=False, sharey=True).flat
    values = [_value(row) for row in shown]
    for parameter, panel in itertools.zip_longest(sweep.parameters, panels):
        if parameter is None:
            panel.set_visible(False)
            continue
        places = _places(parameter, [row[parameter.name] for row in shown], panel)
        panel.plot(places, values, "o", color="tab:blue", alpha=0.7)
        panel.plot(
            places[:1], values[:1], "*", color="tab:red", markersize=15, label=f"best: trial {shown[0]['trial']}"
        )
        panel.set_xlabel(parameter.name)
        panel.grid(alpha=0.3)
    axes = figure.axes
    axes[0].set_ylabel(sweep.metric)
    axes[0].legend()
    figure.suptitle(f"{sweep.name}: {len(shown)} trials")
    aside = file.with_name(f".{os.getpid()}.{file.name}")
    figure.savefig(aside, dpi=120)
    os.replace(aside, file)


def _places(parameter: Parameter, texts: Sequence[str], panel: Any) -> list[float]:
    """Where values stand on the axis: numbers of a range by size, the members of a list in its order."""
    if parameter.distribution not in ("categorical", "constant"):
        if parameter.logarithmic:
            panel.set_xscale("log")
        return [float(text) for text in texts]
    known = list(dict.fromkeys([*map(str, parameter.options["values"]), *texts]))
    panel.set_xticks(range(len(known)), known)
    panel.set_xlim(-0.5, len(known) - 0.5)
    return [float(known.index(text)) for text in texts]


def summary(sweep: Sweep, planned: Sequence[Trial], results: Results, out: Path) -> int:
    """Print the ranked table and draw sweep.png; how many trials have no metric."""
    lines = ranked(sweep, planned, results)
    if lines:
        print("\n" + "\n".join(table(sweep, lines)), flush=True)
    try:
        plot(sweep, lines, out / "sweep.png")
    except UserError as error:  # the numbers are there without the picture
        print(f"no picture: {error}", file=sys.stderr)
    print(f"{out / 'sweep.csv'}", flush=True)
    return sum(row["status"] != FINISHED for row in lines)
