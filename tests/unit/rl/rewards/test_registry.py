"""Verifiers by name, and the self-test that stands before a run."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.rl.protocols import Verdict, Verifier
from bestiary.shared.rl.rewards.registry import VERIFIERS, VerifierCounters, known, make_verifier, self_test

OPTIONS = {"combined": {"parts": {"a": {"verifier": "format"}}}}
OURS = [name for name in known() if name not in ("code", "patch", "reasoning_gym")]  # those have tests of their own


@pytest.mark.parametrize("name", OURS)
def test_every_name_makes_a_verifier(name, hostile_texts):
    """And none of them raises, hangs, gives a number that is not finite, or a full score for what is hostile."""
    if name in ("math", "json_schema") and not find_spec({"math": "math_verify"}.get(name, "jsonschema")):
        pytest.skip("an optional package is not installed")
    verifier = make_verifier(name, **OPTIONS.get(name, {}))
    assert isinstance(verifier, Verifier)
    assert verifier.name == name
    for example in ({"id": "e"}, {"id": "e", "answer": "5", "meta": None}, {"id": "e", "answer": "B", "meta": {}}):
        for text in ("", "zzz wrong", hostile_texts["boxes"], hostile_texts["surrogates"], hostile_texts["digits"]):
            verdict = verifier.verify(example.get("answer", ""), text, example)
            assert (
                -100 < verdict.score < getattr(verifier, "best", 1.0)
                or verdict.status == "error"
                or not example.get("answer")
            )
    verifier.close()


def test_unknown_names_and_options():
    with pytest.raises(ConfigError, match=r"no verifier 'maths' among code, combined, .*; did you mean 'math'\?$"):
        make_verifier("maths")
    with pytest.raises(
        ConfigError, match=r"verifier 'exact_text': .*no argument 'ignore_cas'; did you mean 'ignore_case'"
    ):
        make_verifier("exact_text", ignore_cas=True)
    with pytest.raises(ConfigError, match=r"verifier 'combined': .*'parts'"):
        make_verifier("combined")


def test_modules_are_imported_when_they_are_needed(clean_env, root):
    code = "import sys, bestiary.shared.rl.rewards.registry as r\n"
    code += "print([t for t in r.VERIFIERS.values() if t.split(':')[0] in sys.modules])"
    env = clean_env(PYTHONPATH=str(root / "src"))
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "[]", found.stderr
    assert all(target.startswith("bestiary.shared.rl.rewards.") for target in VERIFIERS.values())


class Fixed:
    """Gives what it is told, and claims a gold answer."""

    name, version = "fixed", "1"

    def __init__(self, scores, gold="right", status="ok"):
        self.scores, self.gold, self.status = scores, gold, status

    def verify(self, gold, answer, example):
        return Verdict(self.scores.get(answer, 0.0), self.status, note="because")

    def gold_answer(self, example):
        return self.gold

    def close(self):
        pass


EXAMPLE = {"id": "e7", "answer": "right", "verifier": "fixed"}


def test_a_sound_verifier_passes():
    report = self_test({"fixed": Fixed({"right": 1.0, "": 1.0})}, [EXAMPLE] * 3)
    assert report.tested == {"fixed": 3}
    assert str(report) == "verifiers know the gold answers: fixed 3"
    report = self_test({"fixed": Fixed({}, gold=None)}, [EXAMPLE] * 2)
    assert report.without_gold == {"fixed": 2}
    assert "fixed 0 (2 without a gold answer)" in str(report)


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        (
            Fixed({"right": 0.99}),
            r"example 'e7': verifier 'fixed' gives its own gold answer 0\.99, not 1 .*because.*'right'",
        ),
        (Fixed({"right": 1.0}, status="error"), r"gold answer 1, not 1 \(status error"),
        (Fixed({"x" * 300: 0.0}, gold="x" * 300), "'" + "x" * 200 + "'$"),
        (Fixed({"right": 1.0, "": 1.0, "zzz wrong": 1.0}), "takes both an empty answer and 'zzz wrong' for right"),
        (Fixed({"": 1.0, "zzz wrong": 1.0}, gold=None), "takes both an empty answer"),
    ],
)
def test_an_unsound_verifier_is_refused(verifier, message):
    with pytest.raises(ConfigError, match=message):
        self_test({"fixed": verifier}, [EXAMPLE])


def test_examples_without_a_verifier_are_refused():
    with pytest.raises(ConfigError, match="example 'e7' names no verifier"):
        self_test({}, [{"id": "e7", "answer": "x"}])
    with pytest.raises(
        ConfigError, match="example 'e7': there is no verifier 'fixde' among fixed; did you mean 'fixed'"
    ):
        self_test({"fixed": Fixed({})}, [EXAMPLE | {"verifier": "fixde"}])
    with pytest.raises(BadDataError, match="is no number"):
        self_test({"numeric": make_verifier("numeric")}, [{"id": "e", "answer": "five", "verifier": "numeric"}])


def test_counters_add_up_over_threads():
    counters = VerifierCounters()
    verdicts = [Verdict(0.0, status) for status in ("ok", "timeout", "error", "error")] * 250
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda verdict: counters.count("math", verdict), verdicts))
    assert counters.snapshot() == {
        "verifier/math/calls": 1000,
        "verifier/math/timeout": 250,
        "verifier/math/error": 500,
    }
