"""Patches by hand: the gold one, none, nonsense, and what lies between."""

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.rl.rewards.patch import Patch, parse_patch

GOLD = """diff --git a/x.py b/x.py
index 1234..5678 100644
--- a/x.py
+++ b/x.py
@@ -1,3 +1,3 @@
 def f(x):
-    return x
+    return 2 * x
 # end
"""
SAME = """--- a/x.py
+++ b/x.py
@@ -2 +2 @@
-    return x
+    return 2 * x\t
"""
OTHER = SAME.replace("2 * x", "x + x")
NOTHING = "--- a/x.py\n+++ b/x.py\n@@ -1,2 +1,2 @@\n def f(x):\n     return x\n"


def score(text, **options):
    return Patch(**options).verify(GOLD, text, {"id": "x", "answer": GOLD})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOLD, 1.0),
        (SAME, 1.0),
        (f"<think>hm</think>So:\n```diff\n{SAME}```", 1.0),
        ("", 0.0),
        (NOTHING, 0.0),
        ("I would change x to 2 * x.", -1.0),
        (SAME.replace("@@ -2 +2 @@", "@@ -2,9 +2,9 @@"), -1.0),
        (SAME.replace("@@ -2 +2 @@", "@@ 2 @@"), -1.0),
        ("@@ -1 +1 @@\n-a\n+b\n", -1.0),
        ("--- a/x.py\n" * 2_000_000, -1.0),
        (GOLD.replace("x.py", "y.py"), 0.0),
    ],
)
def test_by_hand(text, expected):
    assert score(text).score == pytest.approx(expected)


def test_between_the_judge_decides_or_the_likeness():
    assert score(OTHER).score == pytest.approx(0.5)  # of two lines each, one is the same
    assert score(OTHER, judge=lambda gold, patch, example: 0.8).score == 0.8
    assert score(OTHER, judge=lambda *a: 7).score == 1.0
    assert score(OTHER, judge=lambda *a: float("nan")).status == "error"
    assert score(GOLD, judge=lambda *a: 0.0).score == 1.0


def test_new_and_deleted_files():
    new = "--- /dev/null\n+++ b/n.py\n@@ -0,0 +1,2 @@\n+a\n+b\n"
    gone = "--- a/n.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-a\n"
    assert parse_patch(new) == [("n.py", (("+", "a"), ("+", "b")))]
    assert parse_patch(gone) == [("n.py", (("-", "a"),))]


def test_gold_answers():
    verifier = Patch()
    example = {"id": "x", "answer": GOLD}
    verifier.check(example)
    assert verifier.verify(GOLD, verifier.gold_answer(example), example).score == 1.0
    with pytest.raises(BadDataError, match="no unified diff"):
        verifier.check({"id": "x", "answer": "use 2"})
    assert verifier.verify("use 2", GOLD, example).status == "error"
