"""Verifiers that raise, hang or return nonsense cost a row, never the run."""

import threading
import time

import pytest

from bestiary.shared.rl.protocols import Verdict
from bestiary.shared.rl.reward_pool import RewardPool


@pytest.fixture
def pool():
    pool = RewardPool(2, deadline_s=0.3)
    yield pool
    pool.close()


def test_verdicts_come_in_the_order_of_the_calls(pool):
    jobs = [pool.submit(lambda i=i: (time.sleep(0.02 * (5 - i)), Verdict(i))[1]) for i in range(5)]
    assert [v.score for v in pool.verdicts(jobs)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("result", "note"),
    [
        (Verdict(float("nan")), "nan"),
        (Verdict(float("inf")), "inf"),
        (Verdict(None), "None"),
        (1.0, "no verdict"),
        (None, "no verdict"),
    ],
)
def test_nonsense_is_an_error_of_the_harness(pool, result, note):
    (verdict,) = pool.verdicts([pool.submit(lambda: result)])
    assert verdict.status == "error"
    assert note in verdict.note
    assert pool.counters["errors"] == 1


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), RecursionError()])
def test_whatever_a_verifier_raises_the_others_are_scored(pool, error):
    def call():
        raise error

    good = Verdict(1.0)
    found = pool.verdicts([pool.submit(call), pool.submit(lambda: good)])
    assert found[0].status == "error"
    assert type(error).__name__ in found[0].note
    assert found[1] is good


def test_a_hung_verifier_loses_its_row_and_no_slot(pool):
    """Both threads hang, twice over; what comes after them is still scored."""
    free = threading.Event()
    hung = [pool.submit(lambda: free.wait(60)) for _ in range(4)]
    after = [pool.submit(lambda: Verdict(1.0)) for _ in range(3)]
    found = pool.verdicts([*hung, *after])
    assert [v.status for v in found] == ["error"] * 4 + ["ok"] * 3
    assert "busy" in found[0].note
    assert pool.counters["hung"] == 4
    free.set()
    assert [v.score for v in pool.verdicts([pool.submit(lambda: Verdict(2.0)) for _ in range(4)])] == [2.0] * 4


def test_calls_run_beside_each_other(pool):
    """Each waits for the other: they must be under way at once."""
    barrier = threading.Barrier(2, timeout=5)
    jobs = [pool.submit(lambda: (barrier.wait(), Verdict(1.0))[1]) for _ in range(2)]
    assert [v.status for v in pool.verdicts(jobs)] == ["ok", "ok"]


def test_another_caller_s_hung_call_does_not_keep_ours_waiting(pool):
    """Both threads are held by calls that nobody waits for yet."""
    free = threading.Event()
    hung = [pool.submit(lambda: free.wait(60)) for _ in range(2)]
    assert [v.score for v in pool.verdicts([pool.submit(lambda: Verdict(3.0))])] == [3.0]
    assert [v.status for v in pool.verdicts(hung)] == ["error", "error"]
    free.set()
