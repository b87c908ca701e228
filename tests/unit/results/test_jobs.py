"""Subprocesses side by side: order, memory, logs, locks, and how they are stopped."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from bestiary.shared.results.jobs import THREADS, Job, resident_gb, run_jobs

# Waits until so many processes have come to the folder: only those that run at once get through.
MEET = """
import pathlib, sys, time
folder, name, count = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(folder / name).touch()
end = time.monotonic() + 20
while len(list(folder.iterdir())) < count:
    time.sleep(0.02)
    if time.monotonic() > end:
        sys.exit(1)
"""
# Fails if another is there at the same time, and may hold memory.
ALONE = """
import pathlib, sys, time
mark = pathlib.Path(sys.argv[1])
mark.touch(exist_ok=False)
held = bytearray(b"x") * int(float(sys.argv[2]) * 1e9)
time.sleep(float(sys.argv[3]))
mark.unlink()
"""
HOLD = "import sys, time; held = bytearray(b'x') * int(float(sys.argv[1]) * 1e9); time.sleep(float(sys.argv[2]))"


def python(code, *args):
    return [sys.executable, "-c", code, *map(str, args)]


@pytest.fixture
def ends():
    found = {}
    return found, lambda end: found.__setitem__(end.job.name, end)


def test_as_many_as_asked_for_run_at_once(tmp_path, ends):
    found, on_end = ends
    jobs = [Job(f"j{i}", python(MEET, tmp_path, i, 2), ram_gb=0.01) for i in range(2)]
    run_jobs(jobs, parallel=2, memory_gb=1, on_end=on_end)
    assert [found[f"j{i}"].code for i in range(2)] == [0, 0]


def test_one_at_a_time_keeps_the_order(tmp_path, ends):
    found, on_end = ends
    jobs = [Job(f"j{i}", python(ALONE, tmp_path / "mark", 0, 0.1)) for i in (2, 0, 1)]
    run_jobs(jobs, on_end=on_end)
    assert list(found) == ["j2", "j0", "j1"]
    assert all(end.ok for end in found.values())


def test_what_is_known_to_be_needed_must_fit(tmp_path, ends):
    found, on_end = ends
    jobs = [Job(f"j{i}", python(ALONE, tmp_path / "mark", 0, 0.2), ram_gb=3) for i in range(3)]
    jobs.append(Job("large", python("raise SystemExit(0)"), ram_gb=6))
    run_jobs(jobs, parallel=4, memory_gb=5, on_end=on_end)
    assert [found[f"j{i}"].code for i in range(3)] == [0, 0, 0]
    assert found["large"].code is None
    assert "6 GB of 5.0 GB" in found["large"].reason


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_the_peak_of_an_earlier_job_is_expected_of_the_next(tmp_path, ends):
    found, on_end = ends
    jobs = [Job(f"first{i}", python(HOLD, 0.3, 1.2), kind="k") for i in range(2)]
    jobs += [Job(f"next{i}", python(ALONE, tmp_path / "mark", 0.3, 0.3), kind="k") for i in range(2)]
    run_jobs(jobs, parallel=2, memory_gb=0.5, on_end=on_end)
    assert all(end.ok for end in found.values())
    assert 0.3 < found["first0"].peak_gb < 0.4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_what_a_job_takes_counts_more_than_what_was_expected(tmp_path, ends):
    found, on_end = ends
    jobs = [
        Job("grows", python(ALONE, tmp_path / "mark", 0.35, 3), ram_gb=0.1),
        Job("quick", python("import time; time.sleep(1.5)"), ram_gb=0.01),
        Job("waits", python(ALONE, tmp_path / "mark", 0, 0), ram_gb=0.1, after=("quick",)),
    ]
    run_jobs(jobs, parallel=3, memory_gb=0.4, on_end=on_end)
    assert list(found) == ["quick", "grows", "waits"]
    assert all(end.ok for end in found.values())


def test_a_failure_stops_what_comes_after_it_and_nothing_else(ends):
    found, on_end = ends
    jobs = [
        Job("bad", python("raise SystemExit(3)")),
        Job("later", python("pass"), after=("bad",)),
        Job("last", python("pass"), after=("later",)),
        Job("good", python("pass")),
        Job("done", python("raise SystemExit(1)"), finished=lambda: True),
    ]
    run_jobs(jobs, parallel=2, memory_gb=1, on_end=on_end)
    assert {name: end.code for name, end in found.items()} == {
        "bad": 3, "later": None, "last": None, "good": 0, "done": 0
    }  # fmt: skip
    assert found["later"].reason == "bad failed"


def test_output_goes_to_its_log_and_is_named(tmp_path, capfd):
    code = "import os; print('one'); print('50%\\r100%'); print('OMP', os.environ['OMP_NUM_THREADS'], end='')"
    log = tmp_path / "deep" / "a.log"
    log.parent.mkdir()
    log.write_text("from before\n")
    run_jobs(
        [Job("a", python(code), log=log), Job("b", python("print('unseen')"), log=tmp_path / "b", echo=False)],
        threads=3,
    )
    out = capfd.readouterr().out.splitlines()
    assert out[1:4] == ["[a] one", "[a] 100%", "[a] OMP 3"]
    assert not [line for line in out if line.endswith("] unseen")]
    assert log.read_bytes() == b"from before\none\n50%\r100%\nOMP 3"
    assert "OMP_NUM_THREADS" in THREADS


def test_another_process_lock_is_waited_for(tmp_path, ends):
    found, on_end = ends
    path, done = tmp_path / ".lock", tmp_path / "done"
    code = (
        "import fcntl, pathlib, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(0.7); pathlib.Path(sys.argv[2]).touch()"
    )
    other = subprocess.Popen(python(code, path, done), stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    job = Job("waits", python("raise SystemExit(1)"), lock=path, finished=done.exists)
    run_jobs([job, Job("free", python("pass"))], parallel=2, memory_gb=1, on_end=on_end)
    other.communicate()
    assert list(found) == ["free", "waits"]
    assert found["waits"].ok
    with path.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


STOPPED = """
import sys
from pathlib import Path
from bestiary.shared.results.jobs import Job, run_jobs
code = '''
import os, signal, sys, time, pathlib
def stop(*_):
    pathlib.Path(sys.argv[1] + ".saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
'''
try:
    run_jobs([Job(n, [sys.executable, "-c", code, sys.argv[1] + n]) for n in "ab"], 2, 1.0, on_end=print)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whoever_stops_it_stops_the_jobs(tmp_path, root, clean_env, number):
    if number == signal.SIGKILL and not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells children that their parent was killed")
    env = clean_env(PYTHONPATH=str(root / "src"))
    parent = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path / "job_")], env=env, stdout=subprocess.PIPE, text=True
    )
    pids = [tmp_path / "job_a", tmp_path / "job_b"]
    until(lambda: all(p.exists() and p.read_text() for p in pids))
    parent.send_signal(number)
    out = parent.communicate(timeout=30)[0]
    assert ("stopped" in out) == (number != signal.SIGKILL)
    assert "End(" not in out
    until(lambda: all((tmp_path / f"job_{n}.saved").exists() for n in "ab"))
    until(lambda: not any(resident_gb(int(p.read_text())) for p in pids))


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_memory_of_children_counts():
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD!r}, '0.2', '30'])"
    process = subprocess.Popen(python(code), start_new_session=True)
    try:
        until(lambda: (resident_gb(process.pid) or 0) > 0.2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    until(lambda: not resident_gb(process.pid))  # the child's child ends in its own time
