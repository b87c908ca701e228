"""The verifier of programs: 1 if the program passes every test, run shut in."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import Example
from bestiary.shared.rl.protocols import Verdict
from bestiary.shared.rl.rewards.extract import after_think, last_fence
from bestiary.shared.rl.sandbox import Call, Sandbox


class Code:
    """1 if the last Python fence after the thoughts passes all of ``meta["tests"]``, else 0.

    Tests are ``{kind: call, function: f, calls: [{args: [...], expected: …}]}`` or ``{kind: stdin, cases: [{input: …,
    output: …}]}``. Values are compared here, where no code of the solution runs: JSON values of equal type (True is not
    1, 1 is not 1.0; a tuple counts as a list). Printed output is compared line by line, white space at the ends aside.
    A third kind has test code, as HumanEval does: ``{kind: check, function: f, check: source of check(candidate)}``,
    with a ``setup`` that both the solution and the test code find before them; the test code runs shut in as well, in
    a process of its own, and compares as Python does.

    Paper: arXiv:2505.16400 (AceReason): all tests within the time limit or nothing.

    Args:
        seconds: for one solution (each case of ``stdin`` tests).
        bare: take the whole text where there is no fence.
        relative: floats may differ by this share.
        limits: of the sandbox.
        allow_unsafe: take a weak sandbox where there is no strong one.
        max_chars: a longer program scores 0.
    """

    name = "code"
    version = "1"

    def __init__(
        self,
        seconds: float = 10.0,
        bare: bool = False,
        relative: float = 0.0,
        limits: Mapping[str, Any] | None = None,
        allow_unsafe: bool = False,
        max_chars: int = 100_000,
    ):
        self.seconds, self.bare, self.relative, self.max_chars = seconds, bare, relative, max_chars
        self._options: tuple[Any, bool] = (limits, allow_unsafe)
        self._sandbox: Sandbox | None = None
        self._lock = threading.Lock()

    @property
    def sandbox(self) -> Sandbox:
        """Made when it is first needed; raises ConfigError where no sandbox is strong enough."""
        with self._lock:
            if self._sandbox is None:
                self._sandbox = Sandbox(*self._options)
            return self._sandbox

    def describe(self) -> str:
        """The rung in use."""
        return self.sandbox.describe()

    def check(self, example: Example) -> None:
        """Raise BadDataError for tests that cannot be run."""
        meta = example.get("meta")
        tests = meta.get("tests") if isinstance(meta, Mapping) else None
        if not isinstance(tests, Mapping) or not _can_run(tests):
            raise BadDataError(
                f'example {example.get("id")!r}: meta["tests"] is {{kind: call, function, calls: [{{args, expected}}]}}'
                " or {kind: stdin, cases: [{input, output}]}, with at least one case, or {kind: check, function,"
                " check}; args is a list, kwargs an object, all of it JSON, and seconds (if there) a number above 0"
            )

    def verify(self, gold: str, answer: str, example: Example) -> Verdict:
        """Run the program; ``gold`` is not used, the tests are."""
        self.check(example)
        tests = example["meta"]["tests"]
        program = self.program(answer)
        if program is None:
            return Verdict(0.0, note="no Python fence")
        if len(program) > self.max_chars:
            return Verdict(0.0, note=f"a program of {len(program):,} characters")
        seconds = float(tests.get("seconds", self.seconds))
        passed = {"call": self._calls, "stdin": self._cases, "check": self._checked}[tests["kind"]]
        return passed(program, tests, seconds)

    def program(self, answer: str) -> str | None:
        """The program of a completion, or None."""
        text = after_think(answer)
        found = last_fence(text, ("python", "py", "python3"))
        return text if found is None and self.bare else found

    def gold_answer(self, example: Example) -> str | None:
        """The known solution in a fence, where ``meta["solution"]`` has one."""
        solution = example.get("meta", {}).get("solution")
        if solution is None:
            return None
        return str(solution) if self.bare else f"```python\n{solution}\n```"

    def close(self) -> None:
        """Close the sandbox."""
        if self._sandbox is not None:
            self._sandbox.close()

    def _calls(self, program: str, tests: Mapping[str, Any], seconds: float) -> Verdict:
        calls = [Call(tests["function"], c["args"], c.get("kwargs") or {}) for c in tests["calls"]]
        result = self.sandbox.run_calls(
            program, calls, seconds, lambda at, value: same(value, tests["calls"][at]["expected"], self.relative)
        )
        if result.harness_error:
            return self._failed(result.harness_error)
        good = [outcome.status == "value" and outcome.value is True for outcome in result.outcomes]
        right = sum(good)
        wrong = next((o for o, passed in zip(result.outcomes, good, strict=True) if not passed), None)
        why = "" if wrong is None else wrong.note or f"{wrong.status}, or another value"
        return self._verdict(right, len(calls), result.timed_out, why)

    def _cases(self, program: str, tests: Mapping[str, Any], seconds: float) -> Verdict:
        right, late, why = 0, False, ""
        for case in tests["cases"]:
            result = self.sandbox.run_script(program, case["input"], seconds)
            if result.harness_error:
                return self._failed(result.harness_error)
            good = result.returncode == 0 and not result.killed and not result.timed_out
            good = good and same_lines(result.stdout, case["output"], self.relative)
            right, late = right + good, late or result.timed_out
            if not good:
                why = result.killed or result.stderr.strip().rpartition("\n")[2] or "another output"
                break
        return self._verdict(right, len(tests["cases"]), late, why)

    def _checked(self, program: str, tests: Mapping[str, Any], seconds: float) -> Verdict:
        result = self.sandbox.run_check(program, tests["function"], tests["check"], tests.get("setup", ""), seconds)
        if result.harness_error:
            return self._failed(result.harness_error)
        return self._verdict(int(result.passed), 1, result.timed_out, result.note or "the check fails")

    def _verdict(self, right: int, total: int, late: bool, why: str) -> Verdict:
        parts = {"tests_passed": right / total}
        if right == total:
            return Verdict(1.0, parts=parts, note=self.sandbox.rung)
        return Verdict(0.0, "timeout" if late else "ok", parts, f"{self.sandbox.rung}: {why}"[:300])

    def _failed(self, why: str) -> Verdict:
        return Verdict(0.0, "error", note=f"{self.sandbox.rung}: {why}"[:300])


def _can_run(tests: Mapping[str, Any]) -> bool:
    kind, seconds = tests.get("kind"), tests.get("seconds", 1)
    if not isinstance(seconds, int | float) or not 0 < seconds < math.inf or not _is_json(dict(tests)):
        return False
    if kind == "check":
        texts = (tests.get("function"), tests.get("check"), tests.get("setup", ""))
        return all(isinstance(text, str) for text in texts)
    if kind == "call":
        return isinstance(tests.get("function"), str) and _all(tests.get("calls"), _is_call)
    return kind == "stdin" and _all(tests.get("cases"), _is_case)


def _all(cases: Any, good: Callable[[Mapping[str, Any]], bool]) -> bool:
    return isinstance(cases, list) and bool(cases) and all(isinstance(c, Mapping) and good(c) for c in cases)


def _is_call(case: Mapping[str, Any]) -> bool:
    args, kwargs = case.get("args"), case.get("kwargs") or {}
    return "expected" in case and isinstance(args, list | tuple) and isinstance(kwargs, Mapping)


def _is_case(case: Mapping[str, Any]) -> bool:
    return isinstance(case.get("input"), str) and isinstance(case.get("output"), str)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def same(found: Any, wanted: Any, relative: float = 0.0) -> bool:
    """Whether two JSON values are equal in type and value; NaN equals nothing.

    Args:
        found, wanted: JSON values; a tuple in ``wanted`` counts as a list.
        relative: by which share floats may differ.
    """
    stack: list[tuple[Any, Any]] = [(found, wanted)]
    while stack:  # no recursion: a value may be as deep as JSON allows
        a, b = stack.pop()
        if type(b) is tuple:
            b = list(b)
        if type(a) is not type(b):
            return False
        if isinstance(a, list):
            if len(a) != len(b):
                return False
            stack += zip(a, b, strict=True)
        elif isinstance(a, dict):
            if a.keys() != b.keys():
                return False
            stack += [(a[key], b[key]) for key in a]
        elif isinstance(a, float):
            number: Any = b
            if not math.isclose(a, number, rel_tol=relative, abs_tol=0.0):
                return False
        elif a != b:
            return False
    return True


def same_lines(found: str, wanted: str, relative: float = 0.0) -> bool:
    """Whether two outputs are equal, white space at the ends of lines and of the whole aside."""
    left, right = (_lines(text) for text in (found, wanted))
    if len(left) != len(right):
        return False
    return all(
        a == b or (relative > 0 and _close(a.split(), b.split(), relative)) for a, b in zip(left, right, strict=True)
    )


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _close(a: Sequence[str], b: Sequence[str], relative: float) -> bool:
    if len(a) != len(b):
        return False
    try:
        return all(x == y or math.isclose(float(x), float(y), rel_tol=relative) for x, y in zip(a, b, strict=True))
    except ValueError:
        return False
