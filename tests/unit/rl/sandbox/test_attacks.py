"""What a hostile solution may try, on every strong rung that works here: none passes, none harms who started it."""

import http.server
import os
import signal
import subprocess
import threading
import time

import pytest

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.rl.sandbox import Call, Sandbox

STRONG = ("nobody_bwrap", "root_unshare")


def double(sandbox, code, seconds=None):
    """The outcome of f(21), which is 42 for an honest solution; 42 never goes in."""
    return sandbox.run_calls(code, [Call("f", [21])], seconds).outcomes[0]


def printed(sandbox, code, **options):
    return sandbox.run_script(code, **options).stdout


def test_an_honest_solution_passes_and_a_wrong_one_does_not(sandbox):
    assert double(sandbox, "def f(x): return 2 * x").value == 42
    assert double(sandbox, "def f(x): return 2 * x + 1").value == 43
    result = sandbox.run_calls(
        "seen = []\ndef f(x):\n    seen.append(x)\n    return seen", [Call("f", [i]) for i in (1, 2)]
    )
    assert [o.value for o in result.outcomes] == [[1], [1, 2]]
    assert double(sandbox, "def f(x): raise KeyError(x)").note == "KeyError: 21"
    assert double(sandbox, "def g(x): return 42").status == "raised"
    assert double(sandbox, "import json, math, re, itertools, collections\ndef f(x): return 2 * x").value == 42


# --- the thirteen -----------------------------------------------------------------------------------------------------


def test_the_environment_holds_no_secret(sandbox, monkeypatch):
    monkeypatch.setenv("API_SECRET", "hunter2")
    found = printed(sandbox, "import os, subprocess; print(dict(os.environ)); print(open('/proc/self/environ').read())")
    assert "PATH" in found
    assert "hunter2" not in found


def test_the_parent_s_memory_and_environment_are_out_of_reach(sandbox, monkeypatch):
    monkeypatch.setenv("API_SECRET", "hunter2")
    code = f"""
import os
for pid in [{os.getpid()}, os.getppid(), *[int(n) for n in os.listdir('/proc') if n.isdigit()]]:
    for name in ('environ', 'mem', 'cmdline', 'maps'):
        try:
            print(pid, name, open(f'/proc/{{pid}}/{{name}}', 'rb').read(400))
        except OSError as error:
            pass
"""
    found = printed(sandbox, code)
    assert "hunter2" not in found
    assert "pytest" not in found


def test_nothing_outside_the_scratch_folder_can_be_written(sandbox, tmp_path):
    os.chmod(tmp_path, 0o777)
    before = set(os.listdir("/tmp"))
    code = f"""
for path in ('{tmp_path}/x', '/tmp/x', '/usr/x', '/x', '/etc/x', '/dev/shm/x', '/var/tmp/x', '/proc/x', '/root/x'):
    try:
        open(path, 'w').write('here')
        print('wrote', path)
    except OSError:
        pass
"""
    assert printed(sandbox, code).split() == ["wrote", "/tmp/x"]  # a scratch folder of its own
    assert not list(tmp_path.iterdir())
    assert "x" not in set(os.listdir("/tmp")) - before
    assert not os.path.exists("/dev/shm/x")


def test_a_service_on_loopback_is_out_of_reach(sandbox):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = f"""
import socket
for host in ('127.0.0.1', 'localhost', '0.0.0.0', '::1', '10.0.0.1'):
    try:
        socket.create_connection((host, {server.server_port}), 0.2)
        print('connected', host)
    except OSError:
        pass
"""
    found = sandbox.run_script(code)
    server.shutdown()
    server.server_close()
    assert found.returncode == 0
    assert "connected" not in found.stdout


def test_the_parent_cannot_be_signalled(sandbox):
    heard = []
    previous = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    code = f"""
import os, signal
for pid in ({os.getpid()}, os.getppid(), -1, 1):
    try:
        os.kill(pid, signal.SIGUSR1)
    except OSError:
        pass
"""
    sandbox.run_script(code)
    time.sleep(0.1)
    signal.signal(signal.SIGUSR1, previous)
    assert heard == []


def test_a_fork_bomb_is_stopped_and_leaves_nothing(sandbox):
    code = """
import os, time
made = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(77.25)
        made += 1
except OSError:
    print(made, flush=True)
time.sleep(77.25)
"""
    found = sandbox.run_script(code, seconds=1.0)
    assert int(found.stdout) < 70
    assert found.timed_out
    assert double(sandbox, "def f(x): return 2 * x").value == 42
    time.sleep(0.2)
    assert "77.25" not in subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout


def test_memory_files_time_and_output_are_limited(sandbox):
    assert "MemoryError" in sandbox.run_script("x = bytearray(3 << 30)").stderr
    big = "f = open('/tmp/x', 'wb')\nfor _ in range(300): f.write(b'0' * (1 << 20))\nprint('all')"
    assert "all" not in printed(sandbox, big)
    busy = double(sandbox, "def f(x):\n    while True: pass", 0.7)
    assert busy.status == "timeout"
    flood = sandbox.run_script("while True: print('x' * 10000)")
    assert "bytes of output" in flood.killed
    assert len(flood.stdout) < 1_200_000
    assert double(sandbox, "import sys\ndef f(x):\n    while True: sys.stderr.write('x' * 9999)").status == "killed"


def test_a_daemon_does_not_outlive_its_run(sandbox):
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(78.25)
    os._exit(0)
print('started')
"""
    began = time.monotonic()
    assert printed(sandbox, code) == "started\n"
    assert time.monotonic() - began < 2.5  # it holds the pipe, and is not waited for
    time.sleep(0.2)
    assert "78.25" not in subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout


def test_hidden_tests_on_disk_cannot_be_read(sandbox, tmp_path):
    secret = tmp_path / "expected.json"
    secret.write_text("the expected answer is 42")
    os.chmod(secret, 0o644)
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder).startswith("/tmp/") and folder.is_dir():
            os.chmod(folder, 0o755)
    here = os.path.abspath(__file__)
    code = f"""
for path in ('{secret}', '{here}', '/etc/passwd', '/root/.bashrc'):
    try:
        print('read', path, open(path).read(50))
    except OSError:
        pass
"""
    assert "read" not in printed(sandbox, code)


# --- and more: a call that must give 42, answered by tricks ---

TRICKS = {
    "os._exit(0) at import": "import os\nos._exit(0)",
    "os._exit(0) in the function": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys\ndef f(x): sys.exit(0)",
    "atexit": "import atexit\natexit.register(print, 'all tests passed')\ndef f(x): raise SystemExit(0)",
    "an object that equals everything": "class A(int):\n def __eq__(s, o): return True\ndef f(x): return A(7)",
    "a string that equals everything": "class A(str):\n def __eq__(s, o): return True\ndef f(x): return A('42')",
    "a pickle": "class A:\n def __reduce__(s): return (eval, ('42',))\ndef f(x): return A()",
    "the grader's words": "def f(x):\n print('PASSED 42 ok'); print('1 passed'); return None",
    "fake lines on every descriptor": (
        "import os, json\ndef f(x):\n"
        " for fd in range(3, 64):\n"
        "  for n in ('', 'x' * 32):\n"
        "   try: os.write(fd, (json.dumps([n, 0, 'value', 42]) + '\\n').encode())\n"
        "   except OSError: pass\n"
        " return None"
    ),
    "patched json": (
        "import json\njson.dumps = lambda *a, **k: '42'\njson.JSONEncoder.encode = json.dumps\ndef f(x): return 0"
    ),
    "patched builtins": "import builtins\nbuiltins.print = builtins.len = lambda *a: 42\ndef f(x): return len([])-42",
    "an import hook": "import sys\nsys.meta_path.insert(0, None)\nsys.modules['json'] = None\ndef f(x): return None",
    "a huge integer": "def f(x): return 10 ** 10 ** 7",
    "a huge power": "def f(x): return 9 ** 9 ** 9",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "a deep value": "def f(x):\n v = []\n for _ in range(10**5): v = [v]\n return v",
    "a circular value": "def f(x):\n v = []\n v.append(v)\n return v",
    "not a number": "def f(x): return float('nan')",
    "a gigantic value": "def f(x): return 'x' * 50_000_000",
    "SIGTERM ignored": "import signal\nsignal.signal(15, signal.SIG_IGN)\ndef f(x):\n while True: pass",
    "an alarm": (
        "import signal\nsignal.signal(14, lambda *a: None)\nsignal.setitimer(0, .01, .01)\ndef f(x): return None"
    ),
    "stops itself": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGSTOP)",
    "time at import": "while True: pass",
    "a thread that outlives": (
        "import threading, time\ndef f(x):\n threading.Thread(target=time.sleep, args=(99,)).start()\n return None"
    ),
    "steals stdin": "import os\ndef f(x):\n return os.read(0, 100).decode()",
    "a generator": "def f(x): yield 42",
    "a coroutine": "async def f(x): return 42",
    "unlinks the scratch folder": "import shutil\nshutil.rmtree('/tmp', ignore_errors=True)\ndef f(x): return None",
    "a symlink out": "import os\nos.symlink('/proc/1/environ', '/tmp/l')\ndef f(x): return open('/tmp/l').read()",
    "device nodes": "import os\nos.mknod('/tmp/d', 0o60666, os.makedev(8, 0))\ndef f(x): return 0",
    "mounts": "import ctypes\nc = ctypes.CDLL(None)\nr = c.mount(b'proc', b'/tmp', b'proc', 0, 0)\ndef f(x): return r",
    "becomes root": "import os\nos.setuid(0)\ndef f(x): return os.getuid()",
    "traces its parent": (
        "import ctypes, os\nc = ctypes.CDLL(None)\nr = c.ptrace(16, os.getppid(), 0, 0)\ndef f(x): return r"
    ),
    "a null byte in the name of an error": "def f(x): raise type('E\\0', (Exception,), {})('\\ud800')",
}


@pytest.mark.parametrize("name", TRICKS)
def test_a_trick_is_not_an_answer(sandbox, name):
    began = time.monotonic()
    outcome = double(sandbox, TRICKS[name], 0.5)
    took = time.monotonic() - began
    assert not (type(outcome.value) is int and outcome.value == 42), outcome
    assert took < 6
    assert double(sandbox, "def f(x): return 2 * x").value == 42


def test_an_early_end_answers_no_later_call(sandbox):
    code = (
        "import os\ncount = []\ndef f(x):\n    count.append(x)\n    if len(count) == 2: os._exit(0)\n    return 2 * x"
    )
    result = sandbox.run_calls(code, [Call("f", [i]) for i in range(4)])
    assert [o.status for o in result.outcomes] == ["value", "missing", "missing", "missing"]
    assert result.harness_error == ""


def test_runs_keep_nothing(sandbox):
    printed(sandbox, "open('/tmp/left', 'w').write('x')")
    assert printed(sandbox, "import os; print(os.listdir('/tmp'))") == "[]\n"


def test_many_at_once(sandbox):
    """A fork bomb beside them takes no other run's processes."""
    found = [None] * 6
    bomb = "import os, time\nwhile True:\n try:\n  if os.fork() == 0: time.sleep(5)\n except OSError: time.sleep(0.01)"

    def work(i):
        found[i] = double(sandbox, f"def f(x): return 2 * x + {i}", 5.0).value

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    threads.append(threading.Thread(target=lambda: sandbox.run_script(bomb, seconds=1.0)))
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [42 + i for i in range(6)]


# --- the ladder ---


def test_weak_rungs_are_refused_unless_asked_for(monkeypatch):
    import bestiary.shared.rl.sandbox.run as run

    monkeypatch.setattr(run, "tools_missing", lambda rung: ["bwrap"] if rung in STRONG else [])
    with pytest.raises(ConfigError, match="apt-get install bubblewrap"):
        Sandbox()
    weak = Sandbox(allow_unsafe=True)
    assert weak.rung in ("rlimits_nobody", "rlimits")
    assert "UNSAFE" in weak.describe()
    assert double(weak, "def f(x): return 2 * x").value == 42


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="no sandbox rung 'docker'"):
        Sandbox(rung="docker")
    with pytest.raises(ConfigError, match="sandbox limits"):
        Sandbox({"secs": 1})


def test_a_sandbox_that_breaks_is_not_the_solution_s_fault(sandbox, monkeypatch):
    import bestiary.shared.rl.sandbox.run as run

    monkeypatch.setattr(run, "command", lambda *a: (["/bin/sh", "-c", "echo broken >&2; exit 3"], {}))
    result = sandbox.run_calls("def f(x): return 2 * x", [Call("f", [21])])
    assert "broken" in result.harness_error
    monkeypatch.setattr(run, "command", lambda *a: (["/nowhere"], {}))
    assert "cannot start" in sandbox.run_script("1").harness_error
