"""One shut-in process: its pipes, its clock, and its end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bestiary.shared.rl.sandbox.rungs import Limits

DEPTH = 200
"""Deepest value that is taken."""

Status = Literal["value", "raised", "timeout", "killed", "missing"]


@dataclass(frozen=True)
class Outcome:
    """What a call gave: ``value`` as JSON has it (a tuple comes as a list), or why there is none.

    ``raised`` is an exception or a value that is not JSON, ``missing`` a process that ended without an answer.
    """

    status: Status
    value: Any = None
    note: str = ""


class Process:
    """Started by :meth:`start`, used by one thread, and ended by :meth:`end` in any case.

    All pipes are read and written in one loop and never block: a process that does not read, or floods, costs no more
    than its time.

    Args:
        words, environment: of :func:`~bestiary.shared.rl.sandbox.rungs.command`.
        limits: for the clock and the output; the others are in the command.
        code: what the harness is given, by a file descriptor.
        scratch: a folder of the run's own, removed at its end. folder: where the command starts.
    """

    def __init__(
        self,
        words: Sequence[str],
        environment: dict[str, str],
        limits: Limits,
        code: bytes,
        scratch: Path,
        folder: Path,
    ):
        self.words, self.environment, self.limits, self.code = words, environment, limits, code
        self._scratch, self._folder = scratch, folder
        self.out, self.err, self.answers = bytearray(), bytearray(), bytearray()
        self.killed = ""
        self.late = self.ready = False
        self.returncode, self.seconds = -1, 0.0
        self.began = self._stood = time.monotonic()
        self._asked_s = 0.0
        self._inner: list[int] = []
        self._last_look = False
        self._process: subprocess.Popen[bytes] | None = None
        self._stdin, self._waiting, self._close_stdin = -1, bytearray(), False
        self._answers_fd = -1
        self._junk = 0
        self._pick = selectors.PollSelector()  # unlike others it needs no descriptor of its own

    def start(self) -> None:
        """Start it.

        Raises:
            OSError: if it does not start.
        """
        file = os.memfd_create("solution")
        theirs = -1
        try:
            self._answers_fd, theirs = os.pipe()
            with os.fdopen(os.dup(file), "wb") as stream:
                stream.write(self.code)
            os.lseek(file, 0, os.SEEK_SET)
            self._process = subprocess.Popen(
                [*self.words, str(file), str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self.environment,
                cwd=self._folder,
                pass_fds=(file, theirs),
                start_new_session=True,
                bufsize=0,
            )
        finally:
            if theirs >= 0:
                os.close(theirs)
            os.close(file)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdin = self._process.stdin.fileno()
        os.set_blocking(self._stdin, False)
        for fd, kept in (
            (self._process.stdout.fileno(), self.out),
            (self._process.stderr.fileno(), self.err),
            (self._answers_fd, self.answers),
        ):
            os.set_blocking(fd, False)
            self._pick.register(fd, selectors.EVENT_READ, kept)

    def wait_ready(self) -> bool:
        """Wait until the harness stands; only then does the solution's clock begin. False if it never does."""
        limit = self.limits.start_seconds
        while b"\n" not in self.answers and self._step(self.began + limit):
            pass
        if self.late:
            self.late, self.killed = False, f"not ready after {limit:g} s"
        self.ready = self.answers.startswith(b"ready\n")
        assert self._process is not None
        self._inner = _children(self._process.pid)
        del self.answers[: len(b"ready\n")]
        self.began = self._stood = time.monotonic()
        return self.ready

    def ask(self, message: dict[str, Any]) -> Outcome:
        """Send one message under a tag of its own, and wait for the line that bears the tag.

        The tag is drawn here, so a process cannot have answered a message before it has read it. Time counts while an
        answer is waited for, over all messages.
        """
        self.began, self._last_look = time.monotonic() - self._asked_s, False
        try:
            return self._answer(message)
        finally:
            self._asked_s = time.monotonic() - self.began

    def _answer(self, message: dict[str, Any]) -> Outcome:
        tag = secrets.token_hex(16)
        self._send(json.dumps({"tag": tag, **message}).encode() + b"\n")
        while True:
            line = self._line(tag.encode() + b" ")
            if self._junk > self.limits.output_bytes:
                self.killed = "it writes on the private pipe"
            if line is not None:
                return read_answer(line)
            if self.killed or self.late or not self._step(self.began + self.limits.seconds):
                break
        if self.late:
            return Outcome("timeout", note=f"more than {self.limits.seconds:g} s")
        if self.killed:
            return Outcome("killed", note=self.killed)
        with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe is closed; it mostly ends within milliseconds
            assert self._process is not None
            self.killed = killed_by(self._process.wait(0.3))
        if self.killed:
            return Outcome("killed", note=self.killed)
        return Outcome("missing", note="the process ended without an answer")

    def _line(self, start: bytes) -> bytes | None:
        """The line that begins so, once it is whole. Whole lines before it, or all where there is none, are junk.

        They are not looked at one by one: a flood of short lines costs no more than one of long ones.
        """
        end = self.answers.rfind(b"\n") + 1
        first = self.answers.startswith(start)
        at = 0 if first else self.answers.find(b"\n" + start, 0, end) + 1
        if not end or not (first or at):
            self._junk += end
            del self.answers[:end]
            return None
        stop = self.answers.index(b"\n", at)
        line = bytes(self.answers[at:stop])
        self._junk += at
        del self.answers[: stop + 1]
        return line

    def talk(self, data: bytes) -> None:
        """Give it the byte that it waits for and all of stdin, and read until it ends."""
        self._close_stdin = True
        self._send(b"\n" + data)
        while not (self.killed or self.late) and self._step(self.began + self.limits.seconds):
            pass

    def end(self) -> None:
        """Kill whatever is left, and collect it."""
        process = self._process
        if process is not None:
            if process.poll() is None:
                # First what the outermost process waits for, so that it collects it.
                children = _children(process.pid)
                for child in children:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(child, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1.0 if children else 0.0)
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
            for stream in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.close()  # type: ignore[union-attr]
            self.returncode = process.wait()
            _collect(self._inner)
        if self._answers_fd >= 0:
            os.close(self._answers_fd)
        self._pick.close()
        try:
            self._scratch.rmdir()  # mostly it is empty, and this needs no descriptor
        except OSError:
            shutil.rmtree(self._scratch, ignore_errors=True)
        self.seconds = time.monotonic() - self._stood

    def tail(self) -> str:
        """The end of what it wrote to stderr."""
        return bytes(self.err[-300:]).decode("utf-8", "replace").strip()

    def _send(self, data: bytes) -> None:
        self._waiting += data
        if self._stdin >= 0 and self._stdin not in self._pick.get_map():
            self._pick.register(self._stdin, selectors.EVENT_WRITE, None)

    def _step(self, until: float) -> bool:
        """Write and read what can be; false when it is over, or when the clock says ``until`` (then ``late``)."""
        assert self._process is not None
        left = max(until - time.monotonic(), 0.0)
        if left == 0 and self._last_look:
            self.late = True
            return False
        self._last_look = left == 0  # what came in time is read, though this thread was late itself
        ended = self._process.poll() is not None
        if not any(key.events & selectors.EVENT_READ for key in self._pick.get_map().values()):
            return False
        # Once it has ended, only what lies in the pipes is read: a daemon that holds one open is not waited for.
        ready = self._pick.select(0 if ended else min(left, 0.1))
        if ended and not any(events & selectors.EVENT_READ for _, events in ready):
            return False
        over = False
        for key, _ in ready:
            if key.fd == self._stdin:
                self._write()
            else:
                over = not self._read(key.fd, key.data) or over
        return not over

    def _write(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            del self._waiting[: os.write(self._stdin, self._waiting[:65536])]
        except BlockingIOError:
            return
        except OSError:  # nobody reads any more
            self._waiting.clear()
        if not self._waiting:
            self._pick.unregister(self._stdin)
            if self._close_stdin:
                self._process.stdin.close()
                self._stdin = -1

    def _read(self, fd: int, kept: bytearray) -> bool:
        """Read a piece; false when there is no sense in going on."""
        try:
            piece = os.read(fd, 65536)
        except BlockingIOError:
            return True
        if not piece:
            self._pick.unregister(fd)
            return fd != self._answers_fd or self._close_stdin
        kept.extend(piece)
        if len(kept) > self.limits.output_bytes:
            self.killed = f"more than {self.limits.output_bytes:,} bytes of output"
        return not self.killed


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (OSError, ValueError):
        return []


def _collect(orphans: Sequence[int]) -> None:
    """Where this program is process 1 of a container, orphans come to it, and stay as zombies unless it asks."""
    until = time.monotonic() + 1.0
    for child in orphans:
        with contextlib.suppress(ChildProcessError):  # as it is everywhere else
            while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < until:
                time.sleep(0.002)


def read_answer(line: bytes) -> Outcome:
    """Take a line ``tag kind json`` apart; what is not plain JSON counts as an exception of the solution."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        _, kind, text = line.split(b" ", 2)
        value = json.loads(text, parse_constant=refuse)
        if kind == b"value" and plain(value):
            return Outcome("value", value)
        if kind == b"raised" and isinstance(value, str):
            return Outcome("raised", note=value[:300].encode("utf-8", "replace").decode())
    except (ValueError, RecursionError):
        pass
    return Outcome("raised", note="the answer is not JSON that is taken")


def plain(value: Any) -> bool:
    """Whether a decoded value is at most :data:`DEPTH` deep and has finite numbers (``1e999`` decodes to infinity)."""
    level: Sequence[Any] = [value]
    for _ in range(DEPTH + 1):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, list):
                deeper += item
            elif isinstance(item, dict):
                deeper += item.values()
            elif isinstance(item, float) and not math.isfinite(item):
                return False
        if not deeper:
            return True
        level = deeper
    return False


def killed_by(returncode: int) -> str:
    """Which signal ended a process, in words; empty for none. A shell or bubblewrap adds 128 to its number."""
    number = -returncode if returncode < 0 else returncode - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return ""
    return {"SIGXCPU": "too much processor time", "SIGXFSZ": "a file too large"}.get(name, name)
