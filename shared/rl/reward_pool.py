"""Scores answers in the background: while the next completions are drawn, and never longer than a deadline."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from bestiary.shared.rl.protocols import Verdict


class Job:
    """One call that was handed to the pool."""

    __slots__ = ("call", "done", "error", "given_up", "result", "started")

    def __init__(self, call: Callable[[], Any]):
        self.call = call
        self.result: Any = None
        self.error: BaseException | None = None
        self.started: float | None = None
        self.done = self.given_up = False


class RewardPool:
    """Threads that run verifiers; they wait on processes, not on the interpreter, where that is worth it.

    A call that raises is an error of the harness. One that outlives the deadline is given up: its thread is left
    behind (a thread cannot be killed) and another takes its place, so the pool never loses a slot. A verifier that
    works through child processes kills them itself, long before.

    Args:
        workers: calls at once.
        deadline_s: longest a call may take.

    Attributes:
        counters: ``calls``, ``errors`` and ``hung`` since the start.
    """

    def __init__(self, workers: int = 8, deadline_s: float = 300.0):
        self.workers, self.deadline_s = workers, deadline_s
        self.counters = {"calls": 0, "errors": 0, "hung": 0}
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._news = threading.Condition()
        self._threads = 0
        self._running: set[Job] = set()

    def submit(self, call: Callable[[], Any]) -> Job:
        """Hand a call over; :meth:`wait` for it."""
        while self._threads < self.workers:
            self._grow()
        job = Job(call)
        self.counters["calls"] += 1
        self._queue.put(job)
        return job

    def wait(self, jobs: Sequence[Job]) -> None:
        """Until each is done, or has had its time."""
        for job in jobs:
            while not job.done and not job.given_up:
                self._give_up_late_ones()
                with self._news:
                    if not job.done and not job.given_up:
                        self._news.wait(min(self.deadline_s / 4, 1.0))

    def _give_up_late_ones(self) -> None:
        """Whoever waits looks at all calls under way: the one that hangs may be another's, and hold the last thread."""
        now = time.monotonic()
        for job in list(self._running):
            if job.started is not None and now - job.started > self.deadline_s and not job.done:
                job.given_up = True
                self._running.discard(job)
                self.counters["hung"] += 1
                self._grow()  # its thread leaves when, if ever, the call returns

    def verdicts(self, jobs: Sequence[Job]) -> list[Verdict]:
        """What the calls found; a call that raised, hung or returned no finite score is an error of the harness."""
        self.wait(jobs)
        return [self._verdict(job) for job in jobs]

    def close(self) -> None:
        """Let the threads go; those that hang are left behind, and do not keep the process alive."""
        for _ in range(self._threads):
            self._queue.put(None)
        self._threads = 0

    def _verdict(self, job: Job) -> Verdict:
        if job.given_up:
            return Verdict(0.0, "error", note=f"the verifier was still busy after {self.deadline_s:g} s")
        if job.error is None and isinstance(job.result, Verdict):
            score = job.result.score
            if isinstance(score, int | float) and math.isfinite(score):
                return job.result
            reason = f"the verifier returned {score!r}"
        else:
            reason = f"the verifier raised {job.error!r}" if job.error is not None else "the verifier gave no verdict"
        self.counters["errors"] += 1
        return Verdict(0.0, "error", note=reason[:300])

    def _grow(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, name="reward", daemon=True).start()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            job.started = time.monotonic()
            self._running.add(job)
            try:
                job.result = job.call()
            except BaseException as error:  # whatever a verifier of the user's does, the run goes on
                job.error = error
            self._running.discard(job)
            with self._news:
                job.done = True
                self._news.notify_all()
            if job.given_up:
                return
