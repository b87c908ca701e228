"""Programs pass all their tests or nothing, and no test's answer is where a program could find it."""

import math

import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.rl.rewards.code import Code, same, same_lines
from bestiary.shared.rl.rewards.registry import make_verifier, self_test

CALLS = {
    "kind": "call",
    "function": "f",
    "calls": [{"args": [2], "expected": [4, True]}, {"args": [3], "expected": [6, False]}],
}
RIGHT = "def f(x):\n    return 2 * x, x == 2"
CHECK = {
    "kind": "check",
    "function": "f",
    "setup": "import math\ndef twice(x):\n    return 2 * x\ndef f(x):\n    pass\n",
    "check": "def check(candidate):\n    assert candidate(2) == (twice(2), {2: {1.5}})\n    assert f(3)[0] == 6",
}
LINES = {"kind": "stdin", "cases": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5", "output": "10"}]}


@pytest.fixture(scope="module")
def code():
    try:
        verifier = make_verifier("code", seconds=4.0)
        verifier.describe()
    except ConfigError as error:
        pytest.skip(f"no sandbox here: {error}")
    yield verifier
    verifier.close()


def example(tests, **meta):
    return {"id": "x", "messages": [], "meta": {"tests": tests, **meta}, "verifier": "code"}


def fenced(program):
    return f"<think>```python\nwrong\n```</think>Here:\n```python\n{program}\n```"


@pytest.mark.parametrize(
    ("program", "score", "share"),
    [
        (RIGHT, 1.0, 1.0),
        ("def f(x): return [2 * x, x == 2]", 1.0, 1.0),
        ("def f(x): return 4, True", 0.0, 0.5),
        ("def f(x): return 2 * x, 1 if x == 2 else 0", 0.0, 0.0),  # 1 is not True
        ("def f(x): return 2.0 * x, x == 2", 0.0, 0.0),
        ("def g(x): return 0", 0.0, 0.0),
        ("syntax error", 0.0, 0.0),
        ("import os\ndef f(x):\n    os._exit(0)", 0.0, 0.0),
    ],
)
def test_call_tests(code, program, score, share):
    verdict = code.verify("", fenced(program), example(CALLS))
    assert (verdict.score, verdict.status, verdict.parts["tests_passed"]) == (score, "ok", share)
    assert code.sandbox.rung in verdict.note


@pytest.mark.parametrize(
    ("program", "score"),
    [
        ("print(sum(map(int, input().split())))", 1.0),
        ("print(sum(map(int, input().split())), ' ')\nprint()", 1.0),
        ("print(3)", 0.0),
        ("print(sum(map(int, input().split()))); raise SystemExit(1)", 0.0),
        ("print('3')\nprint('10')", 0.0),
    ],
)
def test_stdin_tests(code, program, score):
    assert code.verify("", fenced(program), example(LINES)).score == score


@pytest.mark.parametrize(
    ("program", "score"),
    [
        ("def f(x): return math.floor(twice(x)), {x: {x - 0.5}}", 1.0),  # setup is there for the program too
        ("def f(x): return twice(x)", 0.0),
        ("def f(x): return twice(x), {x: {1}}", 0.0),
        ("def f(x): return 4, {2: {1.5}}", 0.0),
        ("pass", 0.0),
        ("def g(x): return 0", 0.0),
    ],
)
def test_check_tests(code, program, score):
    verdict = code.verify("", fenced(program), example(CHECK))
    assert (verdict.score, verdict.status) == (score, "ok")
    assert code.sandbox.rung in verdict.note


def test_what_takes_too_long_is_a_timeout(code):
    slow = example({**CALLS, "seconds": 0.5})
    verdict = code.verify("", fenced("def f(x):\n    while True: pass"), slow)
    assert (verdict.score, verdict.status) == (0.0, "timeout")


def test_without_a_fence_or_too_long(code):
    assert code.verify("", RIGHT, example(CALLS)).note == "no Python fence"
    assert code.verify("", "", example(CALLS)).score == 0
    assert "characters" in code.verify("", fenced("#" * 10**7), example(CALLS)).note
    assert Code(bare=True).program("x = 1") == "x = 1"
    assert code.verify("", fenced("x = '\ud800'"), example(CALLS)).score == 0


def test_a_broken_sandbox_masks_the_row(code, monkeypatch):
    import bestiary.shared.rl.sandbox.run as run

    monkeypatch.setattr(run, "command", lambda *a: (["/nowhere"], {}))
    assert code.verify("", fenced(RIGHT), example(CALLS)).status == "error"
    assert code.verify("", fenced(RIGHT), example(LINES)).status == "error"
    assert code.verify("", fenced(RIGHT), example(CHECK)).status == "error"


def test_the_self_test_runs_the_known_solution(code):
    good = example(CALLS, solution=RIGHT)
    assert self_test({"code": code}, [good]).tested == {"code": 1}
    with pytest.raises(ConfigError):
        self_test({"code": code}, [example(CALLS, solution="def f(x): return x")])


@pytest.mark.parametrize(
    "tests",
    [
        None,
        {},
        {"kind": "call", "calls": [{"args": [1], "expected": 1}]},
        {"kind": "stdin", "cases": []},
        {"kind": "x"},
        {"kind": ["call"]},
        {"kind": "call", "function": "f", "calls": [7]},
        {"kind": "check", "function": "f"},
        {"kind": "check", "function": "f", "check": "", "setup": 3},
        [],
    ],
)
def test_tests_that_cannot_be_run_are_named(tests):
    with pytest.raises(BadDataError, match="at least one case"):
        Code().check(example(tests))


@pytest.mark.parametrize(
    ("found", "wanted", "equal"),
    [
        (1, 1, True),
        (1, True, False),
        (1.0, 1, False),
        ([1, [2]], [1, (2,)], True),
        ({"a": [1]}, {"a": [1]}, True),
        ({"a": 1}, {"b": 1}, False),
        (math.nan, math.nan, False),
        (0.1 + 0.2, 0.3, False),
        ("a", "a", True),
        (None, 0, False),
    ],
)
def test_values_are_compared_by_type(found, wanted, equal):
    assert same(found, wanted) is equal


def test_floats_may_differ_where_that_is_asked_for():
    assert same([0.1 + 0.2], [0.3], 1e-9)
    assert same_lines("0.30000000001\n", "0.3", 1e-6)
    assert not same_lines("0.30000000001\n", "0.3")
    assert not same_lines("a b", "a c", 1e-6)
    assert not same_lines("1\n2", "1")
    assert same_lines("a  \nb\n\n", "a\nb")


def test_a_deep_value_is_compared_without_recursion():
    deep = other = 0
    for _ in range(100_000):
        deep, other = [deep], [other]
    assert same(deep, other)
    assert not same(deep, [deep])
