"""Attacks on what stands between a solution and its parent: the pipes, the answers, the blame, and the kill."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bestiary.shared.rl.sandbox import Call, run
from bestiary.shared.rl.sandbox.process import plain, read_answer
from bestiary.shared.rl.sandbox.rungs import scratch_folder

# Finds the harness's own globals from inside a call, or while the solution is imported.
HARNESS = "import sys\ndef harness():\n    return sys._getframe(2).f_globals\n"


def running(mark):
    """Processes of this machine whose command line, or whose script, has the mark; scripts name it by prctl."""
    listed = subprocess.run(["ps", "ax", "-o", "comm,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if mark in line]


def named(mark):
    """Code that gives the process a name that ``ps`` shows."""
    return f"import ctypes, os, time\nlibc = ctypes.CDLL(None)\nlibc.prctl(15, b'{mark}', 0, 0, 0)\n"


# --- whose fault ---


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(3)",
        "import os\nos._exit(255)",
        "import ctypes\nctypes.string_at(0)",
        "import os\nos.abort()",
        "import os, sys\nsys.stderr.write('bwrap: setting up uid map: Permission denied')\nos._exit(1)",
        "import os\nos.closerange(0, 64)\nwhile True: pass",
        "x = bytearray(3 << 30)",
        "\0",
        "'\ud800'",
        "(" * 5000,
        "x = " + "-" * 100_000 + "1",
        "\n" * 3_000_000,
    ],
    ids=["exit 3", "exit 255", "segfault", "abort", "bwrap's words", "no pipes", "memory", "null", "surrogate", "depth"]
    + ["minus signs", "3 MB"],
)
def test_a_solution_cannot_blame_the_sandbox(sandbox, ask, code):
    """A harness error masks a row; a solution that could provoke one would dodge its zero."""
    result = ask(code, 2, 0.6)
    assert result.harness_error == ""
    assert [o.status for o in result.outcomes] in (2 * [s] for s in ("raised", "killed", "missing", "timeout"))
    script = sandbox.run_script(code, seconds=0.6)
    assert script.harness_error == ""
    assert script.returncode != 0 or code.isspace()


def test_a_long_script_with_a_long_input_runs(sandbox):
    text = "x" * 3_000_000
    found = sandbox.run_script("#" * 400_000 + "\nimport sys\nprint(len(sys.stdin.read()))", text)
    assert (found.stdout, found.returncode) == ("3000000\n", 0)
    unread = sandbox.run_script("print('done')", text)
    assert (unread.stdout, unread.returncode) == ("done\n", 0)
    lazy = sandbox.run_script("import time\ntime.sleep(9)", text, 0.5)
    assert lazy.timed_out
    assert lazy.seconds < 5


def test_a_script_is_a_main_program(sandbox):
    code = "import sys, pickle\nclass A: pass\nif __name__ == '__main__': "
    code += "print(sys.argv, type(pickle.loads(pickle.dumps(A()))))"
    found = sandbox.run_script(code)
    assert found.stdout == "['script.py'] <class '__main__.A'>\n"
    failing = sandbox.run_script("\nprint('before')\n1 / 0")
    assert (failing.stdout, failing.returncode, failing.killed) == ("before\n", 1, "")
    assert 'File "script.py", line 3' in failing.stderr
    assert sandbox.run_script("import os\nos.write(1, b'\\xff\\0ok')").stdout == "\ufffd\0ok"


# --- answers ---


def test_no_call_is_answered_before_it_is_asked(ask):
    code = HARNESS + (
        "mine = harness()\n"
        "for tag in (mine['_tag'], '0', '1', ''):\n"
        "    for kind in ('value', 'raised'):\n"
        "        mine['_say'](tag, kind, 42)\n"
        "import os\nos._exit(0)"
    )
    # At import sys._getframe(2) is the harness itself; the first tag is for the import, and no call has that one.
    assert {o.status for o in ask(code, 3).outcomes} == {"missing"}


def test_a_forged_answer_is_a_guess(ask):
    """A call that speaks in the harness's name is taken at its word, which the caller compares with what it knows."""
    forge = HARNESS + "def f(x):\n    mine = harness_of_call()\n    mine['_say'](mine['_call']['tag'], 'value', {})\n"
    forge += "def harness_of_call():\n    return sys._getframe(2).f_globals\n"
    assert [o.value for o in ask(forge.format("'guess'"), 2).outcomes] == ["guess", "guess"]


def test_all_that_the_harness_knows_holds_no_expected_value(sandbox):
    code = (
        HARNESS + "import gc\ndef f(x):\n    found = [repr(v) for k, v in harness().items() if k != '__builtins__']\n"
        "    found += [repr(o) for o in gc.get_objects() if type(o) in (list, tuple) and len(o) < 9]\n"
        "    return [t for t in found if str(x) in t or str(2 * x) in t][:9]"
    )
    seen = str(sandbox.run_calls(code, [Call("f", [123_456_789])]).outcomes[0].value)
    assert "123456789" in seen
    assert "246913578" not in seen


def test_later_arguments_are_not_there_yet(ask):
    code = (
        "import os, fcntl\ndef f(x):\n    found = b''\n    for fd in range(64):\n        try:\n"
        "            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK)\n            found += os.read(fd, 10**5)\n"
        "        except OSError: pass\n    return found.decode()"
    )
    assert "22" not in str(ask(code, 2, 1.0).outcomes[0].value)


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "1e999", "[" * 900 + "]" * 900, "[" * 10**5, "1" * 5000, "{", "", '"\\ud800', "42 42"]
)
def test_what_is_not_plain_json_is_no_value(text):
    found = read_answer(b"tag value " + text.encode())
    assert (found.status, found.value) == ("raised", None)
    assert read_answer(b"tag raised " + text.encode()).status == "raised"


def test_plain_json_is_taken():
    assert read_answer(b'tag value {"a": [1, 2.5, null, true, "\\u00e9"]}').value == {
        "a": [1, 2.5, None, True, "\u00e9"]
    }
    assert plain([[[{"a": [0.5]}]]])
    nested = []
    for _ in range(150):
        nested = [nested]
    assert plain(nested)


def test_a_flood_is_remembered_when_an_answer_comes_right_behind_it(ask):
    code = HARNESS + (
        "import os\nflooded = []\n"
        "def f(x):\n    if not flooded:\n        flooded.append(1)\n        left = b'\\n' * 1000001\n"
        "        while left: left = left[os.write(harness()['_out'], left):]\n    return x"
    )
    outcomes = ask(code, 2).outcomes
    assert outcomes[-1].status == "killed"


@pytest.mark.parametrize("piece", ["b'\\n' * 65536", "b'x' * 65536", "b'[1, 2]\\n' * 9000"])
def test_a_flood_on_the_private_pipe_ends_the_run(ask, piece):
    code = HARNESS + f"import os\ndef f(x):\n    while True: os.write(harness()['_out'], {piece})"
    began = time.monotonic()
    assert ask(code, 2).outcomes[0].status == "killed"
    assert time.monotonic() - began < 5


def test_a_process_that_does_not_read_holds_nobody_up(sandbox):
    """The argument is larger than a pipe."""
    code = (
        "import os, signal\nfor pid in (os.getppid(), os.getpid()):\n    try: os.kill(pid, signal.SIGSTOP)\n"
        "    except PermissionError: pass"
    )
    began = time.monotonic()
    result = sandbox.run_calls(code, [Call("f", ["x" * 500_000])], 0.5)
    assert time.monotonic() - began < 5
    assert result.timed_out
    assert sandbox.run_calls("def f(x): return len(x)", [Call("f", ["x" * 500_000])]).outcomes[0].value == 500_000


# --- nothing is left ---

SURVIVE = {
    "sess": "os.setsid()\n",
    "pdth": "libc.prctl(1, 0, 0, 0, 0)\nos.setpgid(0, 0)\n",
    "twin": "if os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n",
    "sigs": "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\n",
    "stop": "import signal\nif os.fork() == 0: os.kill(os.getpid(), signal.SIGSTOP)\n",
}


@pytest.mark.parametrize("name", SURVIVE)
def test_nothing_survives_its_time(sandbox, name):
    mark = f"z{name}{os.getpid()}"
    code = named(mark) + SURVIVE[name] + "print('up', flush=True)\nwhile True: time.sleep(0.05)"
    found = sandbox.run_script(code, seconds=0.5)
    assert found.timed_out
    assert "up" in found.stdout
    time.sleep(0.3)
    assert running(mark) == []


def test_nothing_survives_the_death_of_the_caller(sandbox):
    mark = f"zcall{os.getpid()}"
    code = named(mark) + "try: os.setsid()\nexcept OSError: pass\nwhile True: time.sleep(0.05)"
    program = (
        f"from bestiary.shared.rl.sandbox import Sandbox\nSandbox(rung={sandbox.rung!r}).run_script({code!r}, '', 30)"
    )
    caller = subprocess.Popen([sys.executable, "-c", program], cwd=os.getcwd())
    deadline = time.monotonic() + 20
    while not running(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running(mark)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    deadline = time.monotonic() + 5
    while running(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running(mark) == []


def test_no_descriptor_and_no_folder_leaks(sandbox, ask, monkeypatch):
    folders = []

    def scratch():
        folders.append(scratch_folder())
        return folders[-1]

    monkeypatch.setattr(run, "scratch_folder", scratch)
    before = len(os.listdir("/proc/self/fd"))
    ask("def f(x): return x", 3)
    ask("while True: pass", 1, 0.3)
    ask("import os\nos._exit(1)")
    sandbox.run_script("while True: print('x' * 9999)")
    assert len(os.listdir("/proc/self/fd")) == before
    assert [folder.exists() for folder in folders] == [False] * 4


# --- what is in there ---


def test_no_installed_package_can_be_read(sandbox):
    """A benchmark that is installed beside the interpreter brings its answers along."""
    code = (
        "import glob, sys\nfor top in ('/usr', '/usr/local', sys.prefix):\n"
        "    print(*glob.glob(top + '/lib/python3*/*-packages/*'))\n"
    )
    found = sandbox.run_script(code)
    assert (found.stdout.split(), found.stderr, found.returncode) == ([], "", 0)


def test_no_namespace_of_its_own_and_no_power(sandbox):
    """Inside a user namespace of its own it could mount a file system without a size."""
    code = (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "print(libc.unshare(0x10000000), libc.mount(b't', b'/tmp', b'tmpfs', 0, 0), libc.chroot(b'/tmp'))\n"
        "print({l.split()[1] for l in open('/proc/self/status') if l.startswith('Cap')})\n"
        "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('NoNewPrivs')))\n"
        "print(os.getuid() * os.geteuid() * os.getgid() > 0, os.getgroups(), os.getcwd())\n"
    )
    lines = sandbox.run_script(code).stdout.splitlines()
    assert lines[0] == "-1 -1 -1"
    assert lines[1] == "{'0000000000000000'}"
    assert lines[2] == "1"
    assert lines[3].startswith("True")
    assert lines[3].endswith("/tmp")


def test_the_scratch_folder_has_a_size(sandbox):
    code = (
        "import os\ntry:\n    for i in range(40):\n        with open(f'/tmp/{i}', 'wb') as f: f.write(bytes(4 << 20))\n"
        "except OSError as error: print(i, error.errno)"
    )
    count, errno = sandbox.run_script(code).stdout.split()
    assert int(count) <= 16
    assert int(errno) == 28
    assert sandbox.run_script("print(open('/tmp/x', 'w').write('x'))").stdout == "1\n"


def test_counters_count(sandbox, ask):
    before = sandbox.counters()
    ask("def f(x): return x")
    ask("while True: pass", 1, 0.3)
    sandbox.run_script("while True: pass", seconds=0.3)
    after = sandbox.counters()
    assert {name: after[name] - before[name] for name in after} == {"runs": 3, "timeouts": 2, "harness_errors": 0}
