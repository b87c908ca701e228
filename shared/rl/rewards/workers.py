"""Child processes that can be killed: where a verifier runs what a hostile answer could hang or blow up.

The parent calls ``module:function`` in a fresh interpreter; arguments and results are JSON. This file is also what the
child runs, so it and what a target imports stay free of torch.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal

LARGEST_REPLY = 16 * 2**20
"""Bytes of a reply; a child that says more is killed."""


@dataclass(frozen=True)
class Result:
    """What became of one call.

    Attributes:
        status: ``ok``; ``timeout``: the deadline passed and the child was killed; ``crashed``: the target raised, ran
            out of memory or took its process down, twice where the process died; ``error``: the pool itself failed, and
            nothing is known of the request.
        value: what the target returned, where the status is ``ok``.
        note: why not, in a few words.
    """

    status: Literal["ok", "timeout", "crashed", "error"]
    value: Any = None
    note: str = ""


class WorkerPool:
    """Calls one function in child processes, each call within a deadline. Safe to use from many threads.

    A child is a fresh interpreter (not a fork: the parent may hold torch and its threads) with a memory limit and an
    almost empty environment. It starts when it is first needed. One that hangs is killed, one that dies is replaced,
    and a call whose child died is tried once more in a fresh one, so that a stray kill from outside costs no answer.
    Children end with their parent, however that ends.

    This bounds time and memory. It is no sandbox: the target must not run what an answer says.

    Args:
        target: ``module:function`` with the work; its module is imported once a child and must be light.
        workers: calls at once; further callers wait, at most as long as those before them may take.
        deadline_s: seconds a call may take. It runs only while a child works: starting one does not count.
        memory_mb: address space of a child in MiB; None for no limit.
        startup_s: seconds that an interpreter may take to start and import the target.
    """

    def __init__(
        self,
        target: str,
        workers: int = 2,
        deadline_s: float = 20.0,
        memory_mb: int | None = 1024,
        startup_s: float = 60.0,
    ):
        self.target, self.deadline_s, self.memory_mb, self.startup_s = target, deadline_s, memory_mb, startup_s
        self._slots = threading.BoundedSemaphore(workers)
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._children: set[_Child] = set()
        self._closed = False

    def call(self, *arguments: Any) -> Result:
        """Call the target with JSON-able arguments. It never raises on account of them and never hangs."""
        try:
            request = json.dumps(arguments).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            return Result("error", note=f"the arguments are no JSON: {error}"[:300])
        with self._slots:
            result = Result("error", note="the pool is closed")
            for _ in range(2):
                try:
                    child = self._take()
                except _StartError as error:
                    return Result("error", note=str(error))
                result = child.ask(request, self.deadline_s)
                if child.alive:
                    self._give_back(child)
                    return result
                self._drop(child)
                if self._closed:
                    return Result("error", note="the pool is closed")
                if result.status == "timeout":
                    return result
            return result

    def close(self) -> None:
        """Kill all children; calls from now on, and those under way, end with ``error``."""
        with self._lock:
            self._closed = True
            idle, busy = list(self._idle), self._children.difference(self._idle)
        for child in idle:
            self._drop(child)
        for child in busy:
            child.kill()  # whoever waits for it drops it

    def pids(self) -> list[int]:
        """Process ids of the living children."""
        with self._lock:
            return [child.process.pid for child in self._children]

    def _take(self) -> _Child:
        while True:
            with self._lock:
                if self._closed:
                    raise _StartError("the pool is closed")
                child = self._idle.pop() if self._idle else None
            if child is None:
                break
            if child.process.poll() is None:
                return child
            self._drop(child)  # it died while it was idle
        child = _Child(self.target, self.deadline_s, self.memory_mb)
        with self._lock:
            self._children.add(child)
        ready = child.ask(b"", self.startup_s)
        if ready.status == "ok" and not self._closed:
            return child
        self._drop(child)
        why = "the pool is closed" if self._closed else f"{ready.status}: {ready.note}"
        raise _StartError(f"a worker for {self.target} did not start ({why})")

    def _give_back(self, child: _Child) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(child)

    def _drop(self, child: _Child) -> None:
        child.kill()
        child.close_pipes()
        with self._lock:
            self._children.discard(child)
            if child in self._idle:
                self._idle.remove(child)


class _StartError(Exception):
    pass


class _Child:
    """One process, and how to talk to it. ``alive`` is false once it must not be asked again."""

    def __init__(self, target: str, deadline_s: float, memory_mb: int | None):
        kept = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR") if k in os.environ}
        environment = kept | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
        }
        settings = json.dumps(
            {"target": target, "deadline_s": deadline_s, "memory_mb": memory_mb, "parent": os.getpid()}
        )
        self.alive = True
        # -P keeps the working directory off the path: a file there must not stand in for a module.
        command = [sys.executable, "-P", "-m", "bestiary.shared.rl.rewards.workers", settings]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise _StartError(f"a worker process cannot be started: {error}") from error
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._to, self._from = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)

    def ask(self, request: bytes, deadline_s: float) -> Result:
        """Send a request and wait for a line; anything but an answer in time leaves the child not alive."""
        reply, state = self._exchange(memoryview(request), time.monotonic() + deadline_s)
        self.alive = state == "ok"
        if state == "timeout":
            return Result("timeout", note=f"no answer within {deadline_s:g} s")
        if state == "died":
            return Result("crashed", note=f"the process died ({self._exit()})")
        try:
            message = json.loads(reply)
            kind, value = message
        except (ValueError, TypeError) as error:
            self.alive = False
            return Result("crashed", note=f"the process spoke nonsense: {error}"[:300])
        if kind == "ok":
            return Result("ok", value)
        self.alive = kind != "full"
        return Result("crashed", note=str(value)[:300])

    def _exchange(self, request: memoryview, deadline: float) -> tuple[bytes, str]:
        poll = select.poll()
        poll.register(self._from, select.POLLIN)
        if request:
            poll.register(self._to, select.POLLOUT)
        pieces: list[bytes] = []
        size = 0
        try:
            while (left := deadline - time.monotonic()) > 0:
                for handle, _ in poll.poll(min(left, 1.0) * 1000 + 1):
                    if handle == self._to:
                        request = request[os.write(self._to, request[: 2**16]) :]
                        if not request:
                            poll.unregister(self._to)
                        continue
                    piece = os.read(self._from, 2**16)
                    pieces.append(piece)
                    size += len(piece)
                    if not piece or size > LARGEST_REPLY:
                        return b"", "died"
                    if piece.endswith(b"\n"):
                        return b"".join(pieces), "ok"
        except (OSError, ValueError):  # a broken pipe, or closed by another thread
            return b"", "died"
        return b"", "timeout"

    def _exit(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(1.0)
            return f"signal {-code}" if code < 0 else f"exit code {code}"
        return "its pipe is closed"

    def kill(self) -> None:
        """End it and whatever it has started. May be called twice, and while another thread waits for its answer."""
        self.alive = False
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10.0)

    def close_pipes(self) -> None:
        """Give the descriptors back; only for whoever alone holds the child."""
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


# ------------------------------------------------------------------ in the child


def serve(target: str, deadline_s: float, memory_mb: int | None, parent: int) -> None:
    """Import the target, say so, and answer one request a line until the parent is gone."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)  # what the target prints must not be taken for an answer
    os.dup2(nowhere, 1)

    def reply(kind: str, value: Any) -> None:
        replies.write(json.dumps([kind, value]).encode() + b"\n")
        replies.flush()

    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_mb is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20, memory_mb * 2**20))
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except BaseException as error:
        reply("full", f"{type(error).__name__}: {error}")
        return
    reply("ok", None)
    for line in requests:
        # The kernel ends a child whose parent was killed meanwhile, even inside C code that holds the interpreter.
        signal.setitimer(signal.ITIMER_PROF, 2 * deadline_s + 5)
        try:
            value = function(*json.loads(line))
        except MemoryError:
            reply("full", "out of memory")
            return
        except BaseException as error:
            reply("raised", f"{type(error).__name__}: {error}"[:300])
        else:
            reply("ok", value)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _leave_with(parent: int) -> None:
    # PR_SET_PDEATHSIG would fire when the thread that started this process ends, not the parent.
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
