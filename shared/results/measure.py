"""Running the rows of a table: functions in this process, training in subprocesses side by side.

`resume` takes over what earlier calls measured. Without it a run's folder is named by commit and overrides, so that
the same command at the same commit goes on where it stopped. With it a run of any commit is taken over if its stored
resolved config equals today's (same hash). That the code between two commits changed nothing, nobody can say: so the
measured line names all commits that took part, and is dirty if one of them was.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import UserError
from bestiary.shared.results import details, measured
from bestiary.shared.results.jobs import End, Job, run_jobs
from bestiary.shared.results.measured import Measurement
from bestiary.shared.results.runs import Plan, RunError, call, detail_lines, read_result, summarise


@dataclass
class Session:
    """One call of `reproduce.py run`.

    Attributes:
        plans: the rows, runnable ones.
        train: the training script.
        runs: folder of all runs.
        csv: the project's measured.csv.
        resume: take over what earlier calls ran.
        parallel: runs at once; above 1, each has one thread and writes to ``output.log`` in its folder.
        memory_gb: main memory for all of them, or None for what is free.
        failed: rows that could not be run.
    """

    plans: Sequence[Plan]
    train: Path
    runs: Path
    csv: Path
    resume: bool = False
    parallel: int = 1
    memory_gb: float | None = None
    failed: list[str] = field(default_factory=list)
    _folders: dict[tuple[str, int], Path] = field(default_factory=dict)
    _taken_over: set[tuple[str, int]] = field(default_factory=set)
    _ended: dict[str, End] = field(default_factory=dict)
    _open: list[Plan] = field(default_factory=list)

    def commands(self) -> list[str]:
        """What would be run, as one would type it; finished runs that are taken over are left out."""
        lines = []
        for plan in self.plans:
            if plan.row.function is not None:
                lines.append(f"{plan.row.function}({', '.join(f'{k}={v!r}' for k, v in plan.row.args.items())})")
        jobs = [job for job in self._jobs() if not job.finished()]
        return [*lines, *(shlex.join(job.command) for job in jobs)]

    def run(self) -> None:
        """Run all rows and add each to measured.csv as soon as its last seed has ended.

        Raises:
            KeyboardInterrupt: once all runs have stopped; the same command with ``resume`` goes on.
        """
        for plan in self.plans:
            if plan.row.function is not None:
                self._call(plan)
        jobs = self._jobs()
        self._open = [plan for plan in self.plans if plan.row.function is None and plan.row.id not in self.failed]
        run_jobs(jobs, self.parallel, self.memory_gb, 1 if self.parallel > 1 else None, self._job_ended)

    def folder(self, plan: Plan, seed: int) -> Path:
        """Where this run is, or will be."""
        key = (plan.row.id, seed)
        if key not in self._folders:
            before = plan.before
            start = self.folder(before, seed) if before else None
            known = _earlier(plan, self.runs, start, seed) if self.resume else None
            self._folders[key] = known or plan.run_dir(self.runs, seed, start)
            if known:
                self._taken_over.add(key)
        return self._folders[key]

    def _jobs(self) -> list[Job]:
        """All runs, each once, those that others start from before them."""
        jobs: dict[str, Job] = {}
        asked = {plan.row.id for plan in self.plans}

        def add(plan: Plan, seed: int) -> str:
            name = _name(plan, seed)
            if name not in jobs:
                before = plan.before
                after = (add(before, seed),) if before else ()
                folder = self.folder(plan, seed)
                start = self.folder(before, seed) if before else None
                # Whether a finished run of a row that was asked for is this very config, train.py itself says.
                known = plan.row.id not in asked or (plan.row.id, seed) in self._taken_over
                jobs[name] = Job(
                    name,
                    plan.command(self.train, folder, start, seed),
                    log=folder / "output.log" if self.parallel > 1 else None,
                    kind=plan.row.id,
                    ram_gb=plan.row.needs.get("ram_gb"),
                    after=after,
                    lock=folder.with_name(f".{folder.name}.lock"),
                    finished=(folder / "result.json").is_file if known else lambda: False,
                )
            return name

        for plan in self.plans:
            if plan.row.function is None and plan.row.id not in self.failed:
                try:
                    for seed in plan.seeds:
                        add(plan, seed)
                except UserError as error:  # today's conf/ no longer takes the row's overrides
                    self._fail(plan, f"{plan.table.ref} {plan.row.id}: {error}")
        return list(jobs.values())

    def _call(self, plan: Plan) -> None:
        if self.resume and not plan.dirty:
            here = [m for m in measured.read(self.csv) if (m.table, m.row) == (plan.table.id, plan.row.id)]
            if any(m.commit == plan.commit and not m.dirty for m in here):
                print(f"{plan.table.ref} {plan.row.id}: already measured at this commit", flush=True)
                return
        try:
            measured.append(self.csv, call(plan))
        except UserError as error:
            self._fail(plan, str(error))

    def _job_ended(self, end: End) -> None:
        self._ended[end.job.name] = end
        if not end.ok:
            how = f"not started: {end.reason}" if end.code is None else f"training ended with status {end.code}"
            print(f"error: {end.job.name}: {how}{_tail(end)}", file=sys.stderr, flush=True)
        for plan in list(self._open):
            ends = [self._ended.get(_name(plan, seed)) for seed in plan.seeds]
            if not all(ends):
                continue
            self._open.remove(plan)
            if any(one is not None and not one.ok for one in ends):
                self.failed.append(plan.row.id)
                continue
            try:
                results = [self._result(plan, seed) for seed in plan.seeds]
                details.append(details.details_path(self.csv), detail_lines(plan, results))
                self._write(plan, summarise(plan, results))
            except UserError as error:
                self._fail(plan, str(error))
            except OSError as error:  # a full disk must not take the other runs with it
                self._fail(plan, f"{plan.table.ref} {plan.row.id}: {error.filename or self.csv}: {error.strerror}")

    def _result(self, plan: Plan, seed: int) -> dict[str, Any]:
        result = read_result(self.folder(plan, seed))
        commits: dict[str, None] = {}
        dirty, one = False, plan
        while one is not None:
            for known in _environments(self.folder(one, seed)):
                commits[known["commit"]] = None
                dirty = dirty or bool(known.get("dirty"))
            one = one.before
        return {**result, "commits": list(commits) or [plan.commit], "any_dirty": dirty}

    def _write(self, plan: Plan, found: list[Measurement]) -> None:
        """Written row by row: what was measured stays, whatever happens to the next one."""
        if self.resume:  # a line that is there, but for its date, is not added again
            here = {replace(m, date="") for m in measured.read(self.csv)}
            new = [m for m in found if replace(m, date="") not in here]
            if not new:
                print(f"{plan.table.ref} {plan.row.id}: these runs are in {self.csv.name} already", flush=True)
            found = new
        measured.append(self.csv, found)

    def _fail(self, plan: Plan, message: str) -> None:
        print(f"error: {message}", file=sys.stderr, flush=True)
        self.failed.append(plan.row.id)


def _name(plan: Plan, seed: int) -> str:
    return f"{plan.row.id} seed {seed}"


def _tail(end: End, lines: int = 3) -> str:
    """Where the output is, and how it ends, for a run that wrote it to a file."""
    if end.job.log is None or end.code is None or not end.job.log.is_file():
        return ""
    last = [line for line in end.job.log.read_text(errors="replace").splitlines() if line.strip()][-lines:]
    return "\n  ".join([f"; its output: {end.job.log}", *last])


def _environments(folder: Path) -> list[dict[str, Any]]:
    """What was noted each time that a run was started; its result's own note where there is no history."""
    history = folder / "environment.jsonl"
    try:
        if history.is_file():
            return [json.loads(line) for line in history.read_text().splitlines()]
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{folder}: cannot say at which commit it ran: {error}") from error
    return [result] if "commit" in result else []


def _earlier(plan: Plan, runs: Path, start: Path | None, seed: int) -> Path | None:
    """The run of an earlier call with this very config: a finished one before a stopped one, the newest of those.

    It may stand for a row of another table of the project: two tables that look at one run need it once.

    Raises:
        ConfigError: if the row's overrides no longer compose.
    """
    from bestiary.shared.core.config import compose, config_hash, resolved

    found = []
    wanted = None
    for file in plan.row_dir(runs).parent.parent.glob(f"*/*/*/seed_{seed}/run.json"):
        if wanted is None:
            wanted = config_hash(resolved(compose([*plan.overrides, *plan.start(start), f"seed={seed}"])[0]))
        try:
            stored = json.loads(file.read_text()).get("config_hash")
        except (OSError, ValueError):
            continue
        if stored == wanted:
            result = file.parent / "result.json"
            found.append((result.is_file(), os.path.getmtime(result if result.is_file() else file), file.parent))
    return max(found)[2] if found else None
