"""Worker processes: what comes back of good, bad and fatal requests, and that no slot is ever lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bestiary.shared.rl.rewards.workers import WorkerPool

TARGETS = """
import ctypes, os, sys, time

def work(name, *arguments):
    return globals()[name](*arguments)

def echo(value): return value
def nap(seconds): time.sleep(seconds); return os.getpid()
def loop(): 9 ** (9 ** 9)  # inside C, with the interpreter held
def gorge(): return len(bytearray(4 << 30))
def fault(): ctypes.string_at(0)
def leave(): os._exit(0)
def fail(): raise ValueError("no")
def quit(): sys.exit(0)
def chatter(): print("[\\"ok\\", 1]"); os.write(1, b"junk\\n"); return "fine"
def flood(): return "x" * (32 << 20)
def unjson(): return {1, 2}
def heavy(): return [name for name in ("torch", "numpy", "transformers", "hydra") if name in sys.modules]
def secret(): return os.environ.get("WANDB_API_KEY")
"""


@pytest.fixture(autouse=True)
def targets(tmp_path, monkeypatch):
    (tmp_path / "pool_targets.py").write_text(TARGETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "hidden")


@pytest.fixture
def pool():
    pools = []

    def make(workers=1, deadline_s=10.0, target="pool_targets:work", **options):
        pools.append(WorkerPool(target, workers, deadline_s, **options))
        return pools[-1]

    yield make
    for made in pools:
        made.close()


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] == "Z"


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_values_come_back_as_json(pool):
    one = pool()
    for value in (1, None, "a\0\ud800é\n", [1, {"a": 2.5}], "x" * 10_000_000):
        result = one.call("echo", value)
        assert (result.status, result.value) == ("ok", value)
    assert len(one.pids()) == 1


def test_nothing_is_started_before_it_is_needed(pool):
    assert pool().pids() == []


@pytest.mark.parametrize("attack", ["fault", "leave", "gorge", "flood", "fail", "quit", "unjson"])
def test_a_request_that_takes_its_process_down(pool, attack):
    one = pool(memory_mb=1024)
    assert one.call(attack).status == "crashed"
    assert one.call("echo", 1).value == 1


def test_a_hang_is_killed_and_its_slot_is_free_again(pool):
    one = pool(deadline_s=1.0)
    one.call("echo", 1)
    (pid,) = one.pids()
    began = time.monotonic()
    assert one.call("loop").status == "timeout"
    assert time.monotonic() - began < 10
    assert gone(pid)
    assert one.call("echo", 1).value == 1


def test_what_a_target_prints_is_no_answer(pool):
    one = pool()
    assert one.call("chatter").value == "fine"
    assert one.call("echo", 2).value == 2


def test_children_are_light_and_know_no_secrets(pool):
    one = pool()
    assert one.call("heavy").value == []
    assert one.call("secret").value is None


@pytest.mark.parametrize("module", ["math_child", "json_child"])
def test_what_our_children_import_is_free_of_torch(clean_env, root, module):
    package = "bestiary.shared.rl.rewards"
    code = f"import sys, {package}.{module}, {package}.workers; print('torch' in sys.modules)"
    env = clean_env(PYTHONPATH=str(root / "src"))
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "False", found.stderr


def test_a_pool_that_cannot_start_says_so(pool):
    for target in ("no_such_module:f", "pool_targets:no_such_function"):
        result = pool(target=target).call(1)
        assert result.status == "error"
        assert "did not start" in result.note
    assert pool().call({1}).status == "error"  # a set is no JSON: the caller's fault


def test_children_killed_from_outside_cost_neither_answers_nor_slots(pool):
    three = pool(workers=3)
    stop = threading.Event()

    def kill():
        while not stop.is_set():
            time.sleep(0.3)
            for pid in three.pids()[:1]:
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(lambda i: three.call("nap", 0.05), range(60)))
    finally:
        stop.set()
        killer.join()
    # A call may be hit twice in a row, and then counts as crashed; all others are answered.
    assert sum(result.status == "ok" for result in results) >= 55
    assert {result.status for result in results} <= {"ok", "crashed"}
    began = time.monotonic()
    with ThreadPoolExecutor(3) as threads:  # three slots are there, or this would take 3 s and more
        pids = {result.value for result in threads.map(lambda i: three.call("nap", 1.0), range(3))}
    assert len(pids) == 3
    assert time.monotonic() - began < 30


def test_one_that_died_while_idle_is_replaced(pool):
    one = pool()
    one.call("echo", 1)
    (pid,) = one.pids()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(pid))
    assert one.call("echo", 2).value == 2


def test_many_threads_get_their_own_answers(pool):
    two = pool(workers=2)
    with ThreadPoolExecutor(16) as threads:
        assert [r.value for r in threads.map(lambda i: two.call("echo", i), range(300))] == list(range(300))
    assert len(two.pids()) <= 2


def test_close_ends_what_is_under_way(pool):
    two = pool(workers=2, deadline_s=60.0)
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(two.call, "nap", 50)
        wait_until(lambda: two.pids())
        time.sleep(0.3)
        pids = two.pids()
        two.close()
        assert running.result(timeout=20).status == "error"
    wait_until(lambda: all(map(gone, pids)))
    assert two.call("echo", 1).status == "error"
    assert two.pids() == []


def test_descriptors_are_given_back(pool):
    one = pool(deadline_s=5.0)
    one.call("echo", 1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        one.call("leave")
    one.call("echo", 1)
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("work", ['"nap", 100', '"loop"'])
def test_children_end_with_a_parent_that_is_killed(tmp_path, clean_env, root, work):
    script = textwrap.dedent(f"""
        import threading, time
        from bestiary.shared.rl.rewards.workers import WorkerPool
        pool = WorkerPool("pool_targets:work", 1, 1.0 if {work!r} == '"loop"' else 200.0)
        pool.call("echo", 1)
        print(pool.pids()[0], flush=True)
        pool.deadline_s = 100.0
        pool.call({work})
    """)
    env = clean_env(PYTHONPATH=os.pathsep.join([str(root / "src"), str(tmp_path)]))
    parent = subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
        assert not gone(pid)
        parent.kill()
    wait_until(lambda: gone(pid), 60)
