"""Runs solutions and scripts shut in. The parent feeds the inputs and keeps the clock; expected values stay with it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.rl.sandbox.harness import HARNESS
from bestiary.shared.rl.sandbox.rungs import RUNGS, Limits, command, interpreters, scratch_folder, tools_missing

Status = Literal["value", "raised", "timeout", "killed", "missing"]


@dataclass(frozen=True)
class Call:
    """One call of a function of the solution; arguments are plain JSON."""

    function: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a call gave: ``value`` as JSON has it (a tuple comes as a list), or why there is none."""

    status: Status
    value: Any = None
    note: str = ""


@dataclass(frozen=True)
class Result:
    """Of all calls of one solution. ``harness_error`` is not empty where the sandbox itself failed."""

    outcomes: list[Outcome]
    harness_error: str = ""
    seconds: float = 0.0
    timed_out: bool = False


@dataclass(frozen=True)
class ScriptResult:
    """Of one script. ``killed`` says which limit ended it."""

    stdout: str
    stderr: str
    returncode: int
    timed_out: bool
    harness_error: str = ""
    seconds: float = 0.0
    killed: str = ""


class Sandbox:
    """Runs code that a model wrote, each piece in a fresh process.

    The strongest rung that works here is found by trying, when it is made. Only two are strong enough: bubblewrap as
    nobody, and namespaces with a root folder of their own as root; anything weaker needs ``allow_unsafe``.

    Args:
        limits: a :class:`Limits` or some of its fields.
        allow_unsafe: take a weak rung where no strong one works.
        rung: one rung by name; it must work.

    Attributes:
        rung: the name of the rung in use.

    Raises:
        ConfigError: if no rung that is allowed works; it says what would help.
    """

    def __init__(
        self, limits: Limits | Mapping[str, Any] | None = None, allow_unsafe: bool = False, rung: str | None = None
    ):
        try:
            self.limits = limits if isinstance(limits, Limits) else Limits(**(limits or {}))
        except TypeError as error:
            raise ConfigError(f"sandbox limits: {error}; there are {', '.join(Limits.__dataclass_fields__)}") from error
        names = [r.name for r in RUNGS if (r.strong or allow_unsafe) and rung in (None, r.name)]
        if rung is not None and rung not in [r.name for r in RUNGS]:
            raise ConfigError(f"there is no sandbox rung {rung!r}; rungs: {', '.join(r.name for r in RUNGS)}")
        self._counts = {"runs": 0, "timeouts": 0, "harness_errors": 0}
        self._lock = threading.Lock()
        tried = []
        for name in names:
            why = self._probe(name)
            if not why:
                self._counts = dict.fromkeys(self._counts, 0)
                return
            tried.append(f"{name}: {why}")
        raise ConfigError(
            "no sandbox is strong enough here, and code that a model wrote is not run without one ("
            + ("; ".join(tried) or f"{rung} is weak")
            + "). apt-get install bubblewrap, or run as root, or take the risk with allow_unsafe=true"
        )

    def _probe(self, name: str) -> str:
        """Try a rung; returns why it does not work, or an empty string."""
        if missing := tools_missing(name):
            return f"{', '.join(missing)} is not there"
        why = "no Python starts in it"
        for python in interpreters():
            self.rung, self._python = name, python
            found = self.run_script("print(6 * 7)")
            if found.stdout.strip() == "42":
                return ""
            why = (found.harness_error or found.stderr or why).strip().splitlines()[-1][:200]
        return why

    def describe(self) -> str:
        """One line for the log."""
        rung = next(r for r in RUNGS if r.name == self.rung)
        weak = "" if rung.strong else "; UNSAFE"
        return f"sandbox {rung.name} ({rung.about}{weak}), {self._python[0]}"

    def counters(self) -> dict[str, int]:
        """Runs, timeouts and failures of the sandbox itself, since the start."""
        with self._lock:
            return dict(self._counts)

    def close(self) -> None:
        """There is nothing to give back: no process outlives its run."""

    def run_calls(self, code: str, calls: Sequence[Call], seconds: float | None = None) -> Result:
        """Run a solution, and call its functions one after the other in its one process.

        A call's arguments are sent when the answer to the call before has come, so that a process that ends early has
        answered nothing it has not seen. What comes back is a value under a nonce of this run; forging one is no more
        than guessing, for the expected value never goes in.

        Args:
            code: the solution.
            calls: what to call.
            seconds: for all of it; None is the limits'.
        """
        nonce = secrets.token_hex(16)
        messages = [json.dumps({"nonce": nonce, "code": code})]
        messages += [
            json.dumps({"number": n, "function": c.function, "args": list(c.args), "kwargs": dict(c.kwargs)})
            for n, c in enumerate(calls)
        ]
        run = _Run(self, HARNESS, seconds)
        outcomes: list[Outcome] = []
        try:
            run.start(private=True)
            first = run.ask(messages[0], nonce, -1)
            if first.status != "value":
                outcomes = [first] * len(calls)
            for number, message in enumerate(messages[1:] if not outcomes else []):
                outcomes.append(run.ask(message, nonce, number))
                if outcomes[-1].status in ("timeout", "killed", "missing"):
                    outcomes += [replace(outcomes[-1])] * (len(calls) - len(outcomes))
                    break
        except OSError as error:
            run.failed = f"the sandbox cannot start: {error}"
        finally:
            run.end()
        timed_out = any(o.status == "timeout" for o in outcomes)
        if not run.spoke and not timed_out and run.ended_badly:
            run.failed = run.failed or f"the sandbox ended before the solution ran: {run.tail()}"
        self._count(timed_out, run.failed)
        return Result(outcomes, run.failed, run.seconds, timed_out)

    def run_script(self, code: str, stdin: str = "", seconds: float | None = None) -> ScriptResult:
        """Run a script with this on its stdin; nothing is kept of it but what it prints."""
        run = _Run(self, code, seconds)
        try:
            run.start(private=False)
            run.feed(stdin.encode("utf-8", "replace"))
        except OSError as error:
            run.failed = f"the sandbox cannot start: {error}"
        finally:
            run.end()
        self._count(run.late, run.failed)
        out, err = (bytes(b).decode("utf-8", "replace") for b in (run.out, run.err))
        return ScriptResult(out, err, run.returncode, run.late, run.failed, run.seconds, run.killed)

    def _count(self, timed_out: bool, failed: str) -> None:
        with self._lock:
            self._counts["runs"] += 1
            self._counts["timeouts"] += timed_out
            self._counts["harness_errors"] += bool(failed)


class _Run:
    """One process, its pipes and its clock."""

    def __init__(self, sandbox: Sandbox, code: str, seconds: float | None):
        self.limits = sandbox.limits if seconds is None else replace(sandbox.limits, seconds=seconds)
        self.sandbox, self.code = sandbox, code
        self.out, self.err, self.answers = bytearray(), bytearray(), bytearray()
        self.failed = self.killed = ""
        self.late = self.spoke = False
        self.returncode, self.seconds = -1, 0.0
        self.began = time.monotonic()
        self.process: subprocess.Popen[bytes] | None = None
        self._answers_fd = -1
        self.scratch = scratch_folder()
        self.pick = selectors.DefaultSelector()

    @property
    def ended_badly(self) -> bool:
        """It ended of itself, with an error."""
        return self.returncode > 0 and not self.killed

    def tail(self) -> str:
        """The end of what it wrote to stderr."""
        return bytes(self.err[-300:]).decode("utf-8", "replace").strip()

    def start(self, private: bool) -> None:
        """Start the process; with ``private``, answers come by a pipe of their own."""
        theirs = -1
        if private:
            self._answers_fd, theirs = os.pipe()
        try:
            words, environment = command(self.sandbox.rung, self.limits, self.sandbox._python, self.code, self.scratch)
            if private:
                words.append(str(theirs))
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                cwd="/" if self.sandbox.rung in ("nobody_bwrap", "root_unshare") else self.scratch,
                pass_fds=(theirs,) if private else (),
                start_new_session=True,
            )
        finally:
            if private:
                os.close(theirs)
        for stream, kept in ((self.process.stdout, self.out), (self.process.stderr, self.err)):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            self.pick.register(stream.fileno(), selectors.EVENT_READ, kept)
        if private:
            os.set_blocking(self._answers_fd, False)
            self.pick.register(self._answers_fd, selectors.EVENT_READ, self.answers)

    def ask(self, message: str, nonce: str, number: int) -> Outcome:
        """Send one message, and wait for the answer that bears the nonce and the number."""
        data = message.encode() + b"\n"
        while True:
            while (at := self.answers.find(b"\n")) >= 0:
                line = bytes(self.answers[:at])
                del self.answers[: at + 1]
                if (found := _read(line, nonce, number)) is not None:
                    self.spoke = True
                    return found
            if self.killed or self.late or not self._step(data):
                break
            data = b""
        if self.late:
            return Outcome("timeout", note=f"more than {self.limits.seconds:g} s")
        return Outcome("killed", note=self.killed) if self.killed else Outcome("missing", note="the process has ended")

    def feed(self, data: bytes) -> None:
        """Give it all of stdin, and read until it ends."""
        while not (self.killed or self.late) and self._step(data, close=True):
            data = b""

    def _step(self, data: bytes, close: bool = False) -> bool:
        """Write what there is to write, read what there is to read; false when the process has closed its pipes."""
        assert self.process is not None
        assert self.process.stdin is not None
        if data or close:
            self._writer(data, close)
        left = self.began + self.limits.seconds - time.monotonic()
        if left <= 0:
            self.late = True
            return False
        if not self.pick.get_map():
            return False
        for key, _ in self.pick.select(min(left, 0.5)):
            try:
                piece = os.read(key.fd, 65536)
            except BlockingIOError:
                continue
            if not piece:
                self.pick.unregister(key.fd)
                if key.fd == self._answers_fd:
                    return False
                continue
            key.data.extend(piece)
            if len(key.data) > self.limits.output_bytes:
                self.killed = f"more than {self.limits.output_bytes:,} bytes of output"
                return False
        return self.process.poll() is None or self._more()

    def _more(self) -> bool:
        """Whether anything can still be read; a daemon that holds a pipe is not waited for."""
        return bool(self.pick.get_map()) and bool(self.pick.select(0))

    def _writer(self, data: bytes, close: bool) -> None:
        """Write in the background: a process that does not read must not hold the clock."""
        assert self.process is not None
        stream: Any = self.process.stdin

        def write() -> None:
            with contextlib.suppress(OSError, ValueError):
                if data:
                    stream.write(data)
                    stream.flush()
                if close:
                    stream.close()

        if len(data) < 4096 and not close:
            write()
        else:
            threading.Thread(target=write, daemon=True).start()

    def end(self) -> None:
        """Kill whatever is left, and collect it."""
        process = self.process
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            with contextlib.suppress(OSError):
                process.kill()
            for stream in (process.stdin, process.stdout, process.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.close()  # type: ignore[union-attr]
            self.returncode = process.wait()
        if self._answers_fd >= 0:
            os.close(self._answers_fd)
        self.pick.close()
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.seconds = time.monotonic() - self.began


def _read(line: bytes, nonce: str, number: int) -> Outcome | None:
    """An answer, or None for a line that is none."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        found = json.loads(line, parse_constant=refuse)
        if not isinstance(found, list) or len(found) != 4 or found[0] != nonce or found[1] != number:
            return None
        kind, value = found[2], found[3]
    except (ValueError, RecursionError):
        return None
    if kind == "value":
        return Outcome("value", value)
    return Outcome("raised", note=str(value)[:300])
