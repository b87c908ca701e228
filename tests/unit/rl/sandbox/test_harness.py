"""What correct solutions may do, and what a run leaves behind."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import bestiary
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.rl.sandbox import Call, run
from bestiary.shared.rl.sandbox.process import Process

SRC = str(Path(bestiary.__file__).resolve().parents[1])


def test_exit_is_there_and_dataclasses_and_pickle_find_their_module(sandbox, ask):
    assert sandbox.run_script("print(1)\nexit()\nprint(2)").stdout == "1\n"
    assert sandbox.run_script("import sys\nquit(3)").returncode == 3
    code = (
        "from __future__ import annotations\nimport pickle\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass P:\n    x: int\n"
        "def f(x): return pickle.loads(pickle.dumps(P(2 * x))).x"
    )
    assert ask(code).outcomes[0].value == 42


def test_sets_have_one_order(sandbox):
    code = "print(list({'a', 'b', 'c', 'd', 'e', 'f'}), hash('a'))"
    assert len({sandbox.run_script(code).stdout for _ in range(4)}) == 1


def test_nothing_is_imported_from_the_working_folder(sandbox):
    code = "open('json.py', 'w').write('x = 1')\nimport json\nprint(hasattr(json, 'x'))"
    assert sandbox.run_script(code).stdout == "False\n"


def test_values_need_not_be_kept(sandbox):
    seen = []
    result = sandbox.run_calls("def f(x): return [x] * 1000", [Call("f", [i]) for i in range(3)], None, _keep(seen))
    assert [outcome.value for outcome in result.outcomes] == [0, 1000, 2000]
    assert seen == [0, 1, 2]


def _keep(seen):
    def keep(at, value):
        seen.append(at)
        return sum(value)

    return keep


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_a_clock_that_is_none_leaves_nothing(sandbox, monkeypatch, seconds):
    monkeypatch.setattr(run, "scratch_folder", lambda: pytest.fail("a folder was made"))
    with pytest.raises(ConfigError, match="seconds is a number above 0"):
        sandbox.run_script("print(1)", "", seconds)


def test_where_descriptors_run_out_none_leaks(sandbox):
    """Run apart, since all of a process share the limit."""
    code = f"""
import os, resource, sys
sys.path.insert(0, {SRC!r})
from bestiary.shared.rl.sandbox import Call, Sandbox, run
box = Sandbox(rung={sandbox.rung!r})
folders, make = [], run.scratch_folder
run.scratch_folder = lambda: folders.append(make()) or folders[-1]
base = len(os.listdir("/proc/self/fd"))
for free in range(14):
    resource.setrlimit(resource.RLIMIT_NOFILE, (base - 1 + free, 4096))  # base counts the one that lists
    for result in (box.run_calls("", [Call("f")]), box.run_script(""), box.run_check("", "f", "")):
        assert isinstance(result.harness_error, str)
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 4096))
left = sum(folder.exists() for folder in folders)
print(len(os.listdir("/proc/self/fd")) - base, left, box.run_script("print(7)").stdout.strip())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0 0 7\n", done.stderr


def test_process_1_of_a_container_collects_everything(sandbox):
    """Python as process 1 reaps no orphans: none may come to it."""
    code = f"""
import os, sys, time
assert os.getpid() == 1
sys.path.insert(0, {SRC!r})
from bestiary.shared.rl.sandbox import Call, Sandbox
box = Sandbox(rung={sandbox.rung!r})
for _ in range(3):
    box.run_calls("def f(): return 1", [Call("f")])
    box.run_calls("def f():\\n    while True: pass", [Call("f")], 0.2)
    box.run_script("while True: pass", "", 0.2)
    box.run_script("print(1)")
    box.run_check("def f(): return 1", "f", "def check(c): assert c() == 1")
time.sleep(0.3)
states = [open(f"/proc/{{p}}/stat").read().rpartition(")")[2].split()[0] for p in os.listdir("/proc") if p.isdigit()]
print(states.count("Z"))
"""
    wrapped = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    done = subprocess.run(wrapped, capture_output=True, text=True, timeout=60)
    if "unshare failed" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"no process namespace here: {done.stderr}")
    assert done.stdout == "0\n", done.stderr


def test_what_came_in_time_is_read_by_a_parent_that_is_late(sandbox, monkeypatch):
    real = Process._write

    def late(self):
        real(self)
        time.sleep(0.3)  # twice: for the solution itself, and for the call

    monkeypatch.setattr(Process, "_write", late)
    result = sandbox.run_calls("def f(): return 1", [Call("f")], 0.5)
    assert [outcome.value for outcome in result.outcomes] == [1]
    assert not result.timed_out
