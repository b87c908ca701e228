"""Runs solutions and scripts shut in. The parent feeds the inputs and keeps the clock; expected values stay with it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.rl.sandbox.harness import CALLS, CHECK, SCRIPT
from bestiary.shared.rl.sandbox.process import Outcome, Process, killed_by
from bestiary.shared.rl.sandbox.rungs import RUNGS, Limits, command, interpreters, scratch_folder, tools_missing


@dataclass(frozen=True)
class Call:
    """One call of a function of the solution; arguments are plain JSON."""

    function: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Of all calls of one solution, in their order.

    ``harness_error`` is not empty where the sandbox itself failed; there are no outcomes then. ``seconds`` count from
    when the harness stands.
    """

    outcomes: list[Outcome]
    harness_error: str = ""
    seconds: float = 0.0
    timed_out: bool = False


@dataclass(frozen=True)
class CheckResult:
    """Of one solution against test code; ``note`` says what was wrong, ``calls`` how many calls the test made."""

    passed: bool
    note: str = ""
    calls: int = 0
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

    def run_calls(
        self,
        code: str,
        calls: Sequence[Call],
        seconds: float | None = None,
        keep: Callable[[int, Any], Any] | None = None,
    ) -> Result:
        """Run a solution, and call its functions one after the other in its one process.

        A call is sent when the answer to the one before has come, and its answer must bear a tag that is drawn when it
        is sent, so that a process that ends early has answered nothing it has not seen. Forging a value is no more
        than guessing, for the expected one never goes in.

        Args:
            code: the solution.
            calls: what to call.
            seconds: for all of it; None is the limits'.
            keep: what is kept of the value of call i in its place, asked as soon as it is there; values can be large.
        """
        run = self._process(CALLS, json.dumps([code]).encode(), seconds)
        failed = ""
        outcomes: list[Outcome] = []
        try:
            run.start()
            if run.wait_ready():
                first = run.ask({})
                outcomes = [] if first.status == "value" else [first] * len(calls)
                for call in calls if not outcomes else ():
                    message = {"function": call.function, "args": list(call.args), "kwargs": dict(call.kwargs)}
                    outcome = run.ask(message)
                    if keep is not None and outcome.status == "value":
                        outcome = replace(outcome, value=keep(len(outcomes), outcome.value))
                    outcomes.append(outcome)
                    if outcomes[-1].status in ("timeout", "killed", "missing"):
                        break
                outcomes += outcomes[-1:] * (len(calls) - len(outcomes))
        except OSError as error:
            failed = f"the sandbox cannot start: {error}"
        finally:
            run.end()
        failed = failed or _not_ready(run)
        timed_out = any(o.status == "timeout" for o in outcomes)
        self._count(timed_out, failed)
        return Result(outcomes, failed, run.seconds, timed_out)

    def run_check(
        self, code: str, function: str, check: str, setup: str = "", seconds: float | None = None
    ) -> CheckResult:
        """Run a solution against test code that calls one of its functions and holds what is expected.

        Two processes, each shut in: the solution's, which never sees the test code, and the test's, whose
        ``check(candidate)`` is given a function that calls the solution's by way of this one. Between them go plain
        values of Python (numbers, text, bytes, lists, tuples, sets, dicts), which are made anew on either side, so
        that no code of the solution runs where values are compared.

        Args:
            code: the solution.
            function: the name of its function; the test code may call it by its name too.
            check: source that defines ``check(candidate)``, which raises if something is wrong.
            setup: source that stands before the solution and before the test code.
            seconds: for the solution; the test has as long for itself.
        """
        run = self._process(CALLS, json.dumps([setup, code]).encode(), seconds)
        text = json.dumps({"function": function, "check": check, "setup": setup}).encode()
        test = self._process(CHECK, text, seconds)
        failed, last, calls = "", Outcome("missing"), 0
        try:
            run.start()
            test.start()
            if test.wait_ready() and run.wait_ready():
                last = run.ask({})
                if last.status == "value":
                    last, calls = _relay(run, test, function)
        except OSError as error:
            failed = f"the sandbox cannot start: {error}"
        finally:
            run.end()
            test.end()
        failed = failed or _not_ready(test) or _not_ready(run)
        self._count(last.status == "timeout", failed)
        passed = not failed and last.status == "value"
        return CheckResult(passed, last.note, calls, failed, run.seconds, last.status == "timeout")

    def run_script(self, code: str, stdin: str = "", seconds: float | None = None) -> ScriptResult:
        """Run a script with this on its stdin; nothing is kept of it but what it prints."""
        run = self._process(SCRIPT, code.encode("utf-8", "surrogatepass"), seconds)
        failed = ""
        try:
            run.start()
            if run.wait_ready():
                run.talk(stdin.encode("utf-8", "replace"))
        except OSError as error:
            failed = f"the sandbox cannot start: {error}"
        finally:
            run.end()
        failed = failed or _not_ready(run)
        self._count(run.late, failed)
        out, err = (bytes(b[: self.limits.output_bytes]).decode("utf-8", "replace") for b in (run.out, run.err))
        killed = run.killed or ("" if run.late or failed else killed_by(run.returncode))
        return ScriptResult(out, err, run.returncode, run.late, failed, run.seconds, killed)

    def _process(self, harness: str, code: bytes, seconds: float | None) -> Process:
        limits = self.limits if seconds is None else replace(self.limits, seconds=seconds)
        scratch = scratch_folder()
        words, environment = command(self.rung, limits, self._python, harness, scratch)
        strong = self.rung in ("nobody_bwrap", "root_unshare")  # these make a root folder of their own
        return Process(words, environment, limits, code, scratch, Path("/") if strong else scratch)

    def _count(self, timed_out: bool, failed: str) -> None:
        with self._lock:
            self._counts["runs"] += 1
            self._counts["timeouts"] += timed_out
            self._counts["harness_errors"] += bool(failed)


def _relay(run: Process, test: Process, function: str) -> tuple[Outcome, int]:
    """Carry the test's calls to the solution, and what they give back, until either is over.

    Returns:
        How it ended, a value if the test passed; and the number of calls.
    """
    asked, calls = test.ask({}), 0
    while asked.status == "value" and "packed" in asked.value:
        calls += 1
        answer = run.ask({"function": function, "packed": asked.value["packed"]})
        if answer.status not in ("value", "raised"):
            return answer, calls
        asked = test.ask({"packed": answer.value} if answer.status == "value" else {"raised": answer.note})
    return asked, calls


def _not_ready(run: Process) -> str:
    """Why the harness never stood, or an empty string: nothing of the solution had run by then."""
    if run.ready:
        return ""
    return f"the sandbox ended before the solution ran: {run.killed or run.tail() or f'exit code {run.returncode}'}"
