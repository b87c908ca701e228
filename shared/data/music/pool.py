"""The same work on many pieces, in processes, with a line of progress."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

QUIET_S = 3.0
"""Work that is done sooner is not worth a line."""


def each(work: Callable[[Any], None], jobs: Sequence[Any], workers: int | None, what: str) -> None:
    """Do ``work(job)`` for every job.

    Args:
        work: a function of a module, so that other processes find it.
        jobs: what it is called with; each must be able to travel to another process.
        workers: processes; None is one a core, 0 works here.
        what: begins the line of progress.
    """
    began = shown = time.monotonic()
    done = 0

    def show(last: bool = False) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - began > QUIET_S and (now - shown > 5 or last):
            shown = now
            print(f"{what}: {done} of {len(jobs)} parts, {now - began:.0f} s", file=sys.stderr, flush=True)

    count = (os.cpu_count() or 1) if workers is None else workers
    if count <= 1 or len(jobs) <= 1:
        for job in jobs:
            work(job)
            done += 1
            show(done == len(jobs))
        return
    # A fresh process has none of this one's threads, which a fork would copy in whatever state they are.
    with ProcessPoolExecutor(min(count, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                done += 1
                show(done == len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
