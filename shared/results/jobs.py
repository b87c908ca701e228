"""Subprocesses side by side: as many as asked for, as far as memory goes; each may write to a log file of its own."""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bestiary.shared.core.machine import free_memory

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
GRACE_S = 60.0
"""How long a run that is told to stop may take to save where it is."""


@dataclass(frozen=True)
class Job:
    """One subprocess.

    Attributes:
        name: its name, which stands before each of its lines.
        command: what is run.
        log: where its output goes; None: to the terminal.
        echo: whether what goes to the log is also printed.
        kind: jobs of a kind take about the same memory, and the peak of one is expected of the next.
        ram_gb: main memory that it is known to need, or None.
        after: names of jobs that must have ended well before it starts.
        lock: a file that one process at a time may hold, on this machine; another's is waited for.
        finished: whether there is nothing left to do, asked before it would start.
    """

    name: str
    command: Sequence[str]
    log: Path | None = None
    echo: bool = True
    kind: str = ""
    ram_gb: float | None = None
    after: tuple[str, ...] = ()
    lock: Path | None = None
    finished: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class End:
    """How a job ended.

    Attributes:
        job: the job.
        code: its exit status, negative for a signal; None if it was not started.
        wall_s: seconds.
        peak_gb: the most resident memory that was seen, of it and its children; None where that cannot be seen.
        reason: why it was not started, or empty.
    """

    job: Job
    code: int | None
    wall_s: float = 0.0
    peak_gb: float | None = None
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether it did what it should."""
        return self.code == 0


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    began: float
    lock: Any
    peak_gb: float | None = None
    shown: int = 0
    rest: bytes = field(default=b"", repr=False)


def run_jobs(
    jobs: Sequence[Job],
    parallel: int = 1,
    memory_gb: float | None = None,
    threads: int | None = None,
    on_end: Callable[[End], None] = lambda end: None,
) -> None:
    """Run all jobs, in order as far as they do not wait for each other; one that fails does not stop the others.

    The next starts only when what is running leaves room: of each running job counts the larger of what it is
    expected to take and what it takes. Expected is ``ram_gb`` or the peak of an earlier job of its kind, the larger of
    the two, or else an equal share of the limit. A job for which nothing leaves room starts alone; one whose ``ram_gb``
    is above the limit is not started.

    Args:
        jobs: the jobs; their names are unique.
        parallel: how many at once.
        memory_gb: main memory for all together; default: 90 % of what is free now, for one at a time no limit.
        threads: threads of each, or None: as the environment says.
        on_end: called once for each job, in this process, as they end.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, once all jobs have been told to stop and have ended.
    """
    if memory_gb is not None:
        limit = memory_gb
    else:
        limit = 0.9 * free_memory() / 1e9 if parallel > 1 else math.inf  # one alone has what there is
    if parallel > 1:
        print(f"{len(jobs)} runs, up to {parallel} at once within {limit:.1f} GB", flush=True)
    waiting, running, ended = list(jobs), [], {}
    peaks: dict[str, float] = {}

    def close(end: End) -> None:
        ended[end.job.name] = end
        if end.peak_gb is not None and end.job.kind:
            peaks[end.job.kind] = max(end.peak_gb, peaks.get(end.job.kind, 0.0))
        on_end(end)

    def need(job: Job) -> float:
        known = [value for value in (job.ram_gb, peaks.get(job.kind)) if value is not None]
        return max(known) if known else limit / parallel

    with _signals() as told_to_stop:
        try:
            measured = 0.0
            while waiting or running:
                if told_to_stop():
                    raise KeyboardInterrupt
                if time.monotonic() - measured > 0.5:
                    measured = time.monotonic()
                    for one in running:
                        now = resident_gb(one.process.pid)
                        one.peak_gb = now if now is None else max(now, one.peak_gb or 0.0)
                for one in list(running):
                    if (code := one.process.poll()) is not None:
                        running.remove(one)
                        _let_go(one)
                        close(End(one.job, code, time.monotonic() - one.began, one.peak_gb))
                    else:
                        _echo(one)
                for job in list(waiting):
                    failed = [name for name in job.after if name in ended and not ended[name].ok]
                    if failed or (job.ram_gb or 0.0) > limit:
                        why = f"{failed[0]} failed" if failed else f"it needs {job.ram_gb:g} GB of {limit:.1f} GB"
                        waiting.remove(job)
                        close(End(job, None, reason=why))
                        continue
                    if not all(name in ended for name in job.after):
                        continue
                    if job.finished():
                        waiting.remove(job)
                        close(End(job, 0))
                        continue
                    used = sum(max(need(one.job), one.peak_gb or 0.0) for one in running)
                    if len(running) >= parallel or (running and used + need(job) > limit):
                        break  # a smaller one does not overtake: the large one would wait for ever
                    if (held := _take(job.lock)) is None:
                        continue
                    waiting.remove(job)
                    running.append(_start(job, held, threads))
                time.sleep(0.05)
        finally:
            _stop(running)


def _start(job: Job, lock: Any, threads: int | None) -> _Running:
    print(f"[{job.name}] {shlex.join(job.command[1:])}", flush=True)
    env = dict(os.environ) | ({} if threads is None else dict.fromkeys(THREADS, str(threads)))
    log: Any = None
    shown = 0
    if job.log is not None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("ab")
        shown = log.tell()
    try:
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=None if log is None else subprocess.STDOUT,
            env=env,
            start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on once
            preexec_fn=_DIE_WITH_US,
        )
    finally:
        if log is not None:
            log.close()
    return _Running(job, process, time.monotonic(), lock, shown=shown)


def _die_with_us() -> Callable[[], None] | None:
    """What makes Linux stop a child whose parent was killed; a run that nobody waits for would hold its folder."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded here: little is safe between fork and exec
    return lambda: prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


_DIE_WITH_US = _die_with_us()


def _take(path: Path | None) -> Any:
    """The lock, held; None if another process has it. Without a path there is nothing to hold."""
    if path is None:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _let_go(one: _Running) -> None:
    _echo(one, last=True)
    if one.lock:
        one.lock.close()


def _echo(one: _Running, last: bool = False) -> None:
    """Print what the log has gained, whole lines, each with the job's name before it."""
    if one.job.log is None or not one.job.echo:
        return
    with one.job.log.open("rb") as file:
        file.seek(one.shown)
        new = file.read()
    one.shown += len(new)
    *lines, one.rest = (one.rest + new).split(b"\n")
    if last and one.rest:
        lines.append(one.rest)
    for line in lines:
        # Of a bar that is drawn over and over, the last state.
        text = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
        if text.strip():
            print(f"[{one.job.name}] {text}", flush=True)


def _stop(running: Sequence[_Running]) -> None:
    """Tell all to stop, wait, and kill what does not; nothing to do where all have ended."""
    for one in running:
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGTERM)
    end = time.monotonic() + GRACE_S
    for one in running:
        try:
            one.process.wait(max(0.0, end - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: at once
            with suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
        _let_go(one)


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM are remembered, and asked for where nothing is half done; a second one raises at once."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def remember(number: int, frame: Any) -> None:
        told.append(number)
        if len(told) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resident_gb(session: int) -> float | None:
    """Resident memory in GB of all processes of a session, what they share counted in each; None without /proc."""
    total, seen = 0, False
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            values = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(values[3]) == session:
            total, seen = total + int(values[21]), True
    return total * os.sysconf("SC_PAGE_SIZE") / 1e9 if seen else None
