import math
import threading

import pytest

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import text_message
from bestiary.shared.rl.environments.calculator import Calculator
from bestiary.shared.rl.environments.single_turn import SingleTurn
from bestiary.shared.rl.environments.tool_environment import play
from bestiary.shared.rl.environments.workplace import Workplace
from bestiary.shared.rl.protocols import Environment, Episode, Turn, Verdict


def example(answer="4", verifier="exact_text"):
    return {"id": "q", "messages": [text_message("user", "2+2=")], "answer": answer, "verifier": verifier}


class Broken:
    name, version = "broken", "1"
    closed = 0

    def __init__(self, result):
        self.result = result

    def verify(self, gold, answer, example):
        if isinstance(self.result, Exception):
            raise self.result
        return Verdict(self.result)

    def gold_answer(self, example):
        return None

    def close(self):
        self.closed += 1


def test_one_answer_one_verdict():
    environment = SingleTurn()
    assert isinstance(environment, Environment)
    assert environment.prompt(example()) == example()
    episode = environment.reset(example(), 0)
    assert isinstance(episode, Episode)
    assert episode.step("4") == Turn((), True)
    assert episode.verify("4").score == 1.0
    assert episode.verify("5").score == 0.0
    assert environment.counters() == {
        "verifier/exact_text/calls": 2.0,
        "verifier/exact_text/timeout": 0.0,
        "verifier/exact_text/error": 0.0,
    }
    assert "exact_text" in environment.describe()
    assert "exact_text 1" in environment.self_test([example()])
    for _ in range(2):
        episode.close()
        environment.close()
    assert environment.reset(example(), 0).verify("4").score == 1.0


def test_a_verifier_for_all_comes_first():
    assert play(SingleTurn("numeric"), example("4"), ["The answer is 4.0"])[1].score == 1.0
    assert play(SingleTurn(), example("4"), ["The answer is 4.0"])[1].score == 0.0
    environment = SingleTurn(options={"exact_text": {"ignore_case": True}})
    assert play(environment, example("Yes"), ["yes"])[1].score == 1.0


def test_what_does_not_fit_is_said_at_once():
    with pytest.raises(ConfigError, match="exact_text"):
        SingleTurn("exact_txt")
    with pytest.raises(ConfigError, match="exact_text"):
        SingleTurn(options={"exact_txt": {}})
    with pytest.raises(ConfigError, match="example 'q' names no verifier"):
        SingleTurn().self_test([{"id": "q", "messages": []}])
    with pytest.raises(ConfigError, match="nosuch"):
        SingleTurn().self_test([example(verifier="nosuch")])


@pytest.mark.parametrize("result", [ValueError("no"), RecursionError(), math.nan, math.inf])
def test_a_verifier_that_fails_is_an_error_of_the_harness(result):
    broken = Broken(result)
    environment = SingleTurn(broken)
    _, verdict = play(environment, example(), ["4"])
    assert (verdict.status, verdict.score) == ("error", 0.0)
    assert "broken" in verdict.note
    assert environment.counters()["verifier/broken/error"] == 1.0
    environment.close()
    assert broken.closed == 1


def test_many_threads_make_one_verifier():
    environment = SingleTurn()
    scores = []
    threads = [
        threading.Thread(target=lambda: scores.append(environment.reset(example(), 0).verify("4").score))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == [1.0] * 16
    assert environment.counters()["verifier/exact_text/calls"] == 16.0


@pytest.mark.parametrize("text", ["\0" * 1000, "\ud800", "4" * 10_000_000, "<think>" * 100_000, ""])
def test_hostile_answers(text):
    _, verdict = play(SingleTurn(), example(), [text])
    assert (verdict.status, verdict.score) == ("ok", 0.0)


def test_every_environment_has_what_the_trainer_asks_for():
    for made in (SingleTurn("numeric"), Calculator(), Workplace()):
        assert isinstance(made, Environment)
        assert "\n" not in made.describe()
        made.close()
