"""Test code apart from the solution: what passes between them, and solutions that try to reach across."""

import pytest

from bestiary.shared.rl.rewards.code import Code

CHECK = "def check(candidate):\n    assert candidate(21) == 42\n    assert candidate(22) == 44\n"
RIGHT = "def f(x): return 2 * x"


def test_right_and_wrong(sandbox):
    before = sandbox.counters()["runs"]
    assert sandbox.run_check(RIGHT, "f", CHECK).passed
    wrong = sandbox.run_check("def f(x): return x + 21", "f", CHECK)
    assert (wrong.passed, wrong.calls, wrong.note) == (False, 2, "AssertionError: ")
    raised = sandbox.run_check("def f(x): raise KeyError('no')", "f", CHECK)
    assert (raised.passed, raised.calls) == (False, 1)
    assert raised.note.startswith("KeyError: ")
    assert "SyntaxError" in sandbox.run_check("def f(", "f", CHECK).note
    assert "no function f" in sandbox.run_check("g = 1", "f", CHECK).note
    assert sandbox.counters()["runs"] == before + 5


@pytest.mark.parametrize(
    "value",
    [
        "None",
        "True",
        "-7",
        "10**3000",
        "0.1",
        "'é\\n\"'",
        "b'\\x00\\xff'",
        "3 - 4j",
        "(1, (2, [3]), ())",
        "{1, 2}",
        "frozenset({'a'})",
        "{(1, 2): {3: None}, 'a': [True, 1.0]}",
        "float('inf')",
        "[['l', []], ['d', 1]]",
    ],
)
def test_values_keep_their_types_both_ways(sandbox, value):
    there = f"def f(x):\n    assert repr(x) == repr({value}), x\n    return {value}"
    back = f"def check(candidate):\n    got = candidate({value})\n    assert repr(got) == repr({value}), got"
    result = sandbox.run_check(there, "f", back)
    assert result.passed, result.note


def test_subclasses_come_as_what_they_are(sandbox):
    code = (
        "from collections import Counter, namedtuple\n"
        "class Mine(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\n"
        "def f(x): return [Counter('aa'), namedtuple('P', 'a b')(1, 2), Mine('z')]"
    )
    check = "def check(candidate):\n    got = candidate(0)\n    assert got[:2] == [{'a': 2}, (1, 2)] and got[2] "
    assert sandbox.run_check(code, "f", check + "== 'z'").passed
    assert not sandbox.run_check(code, "f", check + "== 'y'").passed


def test_named_arguments_and_a_default(sandbox):
    check = "def check(candidate):\n    assert candidate(1, b=(2,)) == (1, (2,), 3)"
    assert sandbox.run_check("def f(a, b, c=3): return a, b, c", "f", check).passed


def test_the_solution_cannot_change_the_tests_arguments(sandbox):
    check = "def check(candidate):\n    data = [3, 1]\n    candidate(data)\n    assert data == [3, 1]"
    assert sandbox.run_check("def f(x): x.sort()", "f", check).passed


FORGED = {
    "an __eq__ that is always true": "class A:\n    __eq__ = lambda s, o: True\ndef f(x): return A()",
    "a number that equals all": "class A(int):\n    __eq__ = lambda s, o: True\ndef f(x): return A(7)",
    "leaving early": "import os\ndef f(x): os._exit(0)",
    "leaving at once": "import os\nos._exit(0)",
    "the grader's words": (
        "import os\ndef f(x):\n    for fd in range(3, 20):\n        try: os.write(fd, b'value {\"passed\": true}\\n')\n"
        "        except OSError: pass\n    return {'passed': True}"
    ),
    "its own packing": "import __main__\n__main__._pack = lambda v: {'passed': True}\ndef f(x): return 1",
    "an unhashable key": "import __main__\n__main__._pack = lambda v: ['d', [[['l', []], 1]]]\ndef f(x): return 1",
    "an unknown kind": "import __main__\n__main__._pack = lambda v: [['x'], 1]\ndef f(x): return 1",
    "a value that is too deep": "def f(x):\n    v = []\n    for _ in range(5000): v = [v]\n    return v",
    "a check of its own": "def check(candidate): pass\ndef f(x): return 0",
    "an exit that looks good": "import sys\ndef f(x): sys.exit(0)",
    "a patched AssertionError": "import builtins\nbuiltins.AssertionError = None\ndef f(x): return 0",
    "a generator": "def f(x):\n    yield 42",
}


@pytest.mark.parametrize("attack", FORGED)
def test_no_forgery_passes(sandbox, attack):
    result = sandbox.run_check(FORGED[attack], "f", CHECK)
    assert not result.passed
    assert result.harness_error == ""
    assert result.note


CATCHES = (
    "def check(candidate):\n    try:\n        candidate(-1)\n    except ValueError:\n        return\n    assert False"
)


def test_a_test_may_want_an_exception(sandbox):
    assert sandbox.run_check("def f(x): raise ValueError('below 0')", "f", CATCHES).passed
    assert not sandbox.run_check("def f(x): raise KeyError('below 0')", "f", CATCHES).passed
    # What is no value at all raises nothing that a test could want.
    forged = "import __main__\n__main__._pack = lambda v: ['b', 'zz']\ndef f(x): return 1"
    result = sandbox.run_check(forged, "f", CATCHES)
    assert (result.passed, result.note) == (False, "the value is not plain")


def test_a_solution_may_begin_as_any_file(sandbox):
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
    result = sandbox.run_check(code + "def f(x): return P(twice(x)).x", "f", CHECK, "def twice(x): return 2 * x")
    assert result.passed, result.note


@pytest.mark.parametrize("slow", ["CALLS", "CHECK"])
def test_a_slow_start_of_either_is_nobodys_time(sandbox, monkeypatch, slow):
    import bestiary.shared.rl.sandbox.run as run

    real = run.command

    def late(rung, limits, python, harness, scratch):
        words, environment = real(rung, limits, python, harness, scratch)
        wait = ["/bin/sh", "-c", 'sleep 1; exec "$@"', "sh"] if harness == getattr(run, slow) else []
        return [*wait, *words], environment

    monkeypatch.setattr(run, "command", late)
    result = sandbox.run_check(RIGHT, "f", CHECK, seconds=0.5)
    assert result.passed, result.note


def test_the_tests_own_time_is_not_the_solutions(sandbox):
    check = (
        "import time\ntime.sleep(0.3)\ndef check(candidate):\n    candidate(1)\n    time.sleep(0.3)\n    candidate(1)"
    )
    assert sandbox.run_check("import time\ndef f(x): time.sleep(0.2)", "f", check, seconds=0.8).passed


def test_the_test_code_is_not_where_the_solution_is(sandbox):
    code = (
        "import gc, os, sys\n"
        "def f(x):\n"
        "    seen = [repr(o)[:9999] for o in gc.get_objects() if isinstance(o, (str, bytes, dict, list))]\n"
        "    for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "        for name in ('cmdline', 'environ', 'mem', 'fd'):\n"
        "            path = f'/proc/{pid}/{name}'\n"
        "            try:\n"
        "                seen.append(str(os.listdir(path)) if name == 'fd' else repr(open(path, 'rb').read(9**6)))\n"
        "            except OSError: pass\n"
        "    return any('SECRET' + '_OF_THE_TEST' in text for text in seen)"
    )
    check = "def check(candidate):\n    note = 'SECRET_OF_THE_TEST'\n    assert candidate(1) is False"
    result = sandbox.run_check(code, "f", check)
    assert result.passed, result.note


@pytest.mark.parametrize(
    ("code", "check"),
    [
        ("def f(x):\n    while True: pass", CHECK),
        ("while True: pass", CHECK),
        (RIGHT, "def check(candidate):\n    while True: candidate(1)"),
        (RIGHT, "while True: pass"),
    ],
)
def test_time_is_limited_on_both_sides(sandbox, code, check):
    result = sandbox.run_check(code, "f", check, seconds=0.4)
    assert (result.passed, result.timed_out, result.harness_error) == (False, True, "")


def test_a_failure_of_either_sandbox_is_not_the_solutions(sandbox, monkeypatch):
    import bestiary.shared.rl.sandbox.run as run

    real = run.command
    for broken in (run.CALLS, run.CHECK):
        monkeypatch.setattr(
            run, "command", lambda *a, broken=broken: (["/bin/false"], {}) if a[3] == broken else real(*a)
        )
        result = sandbox.run_check(RIGHT, "f", CHECK)
        assert not result.passed
        assert "ended before the solution ran" in result.harness_error


def test_a_verdict_of_the_reward(sandbox):
    code = Code()
    code._sandbox = sandbox
    tests = {"kind": "check", "function": "f", "check": CHECK}
    example = {"id": "x", "messages": [], "meta": {"tests": tests}}
    assert code.verify("", f"```python\n{RIGHT}\n```", example).score == 1
    assert code.verify("", "```python\ndef f(x): return 42\n```", example).score == 0
