"""Generated tasks as a data source: splits that share no question, mixtures, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import pytest

from bestiary.shared.core.build import build
from bestiary.shared.core.config import conf_dir
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import check_example
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.rl.tasks.reasoning_gym import SYSTEM, ReasoningGymTask

gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
STREAM = Stream(0, "grpo", 4)


def question(example):
    return example["messages"][-1]["content"][0]["value"]


def test_it_is_a_source_by_its_config():
    from omegaconf import OmegaConf

    data = build(OmegaConf.load(conf_dir() / "dataset" / "reasoning_gym.yaml"))
    assert isinstance(data, DataSource)
    assert data.system == SYSTEM
    data.check()
    assert data.spec().task == "chat"
    assert data.revision.startswith("reasoning_gym-0.")


def test_an_example():
    data = ReasoningGymTask("chain_sum", {"min_terms": 2, "max_terms": 2, "max_digits": 1})
    example = check_example(data.train_example(5, STREAM))
    assert [m["role"] for m in example["messages"]] == ["system", "user"]
    assert "<answer>" in example["messages"][0]["content"][0]["value"]
    entry = example["meta"]["entry"]
    assert entry["question"] == question(example)
    # The task's own arithmetic.
    left, sign, right = entry["metadata"]["expression"].split()
    assert int(example["answer"]) == int(left) + (1 if sign == "+" else -1) * int(right)
    assert example["verifier"] == "reasoning_gym"
    assert json.loads(json.dumps(example)) == example
    assert [m["role"] for m in ReasoningGymTask("gcd", system=None).train_example(0, STREAM)["messages"]] == ["user"]


SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_no_question_is_in_two_splits():
    """Sums of two digits: some 200 questions, so that a thousand items are sure to meet the held-out ones."""
    data = ReasoningGymTask("chain_sum", SMALL, size=1000, held_out=20)
    held = {split: [question(e) for e in data.held_out(split)] for split in ("val", "test")}
    trained = {question(data.train_example(k, STREAM)) for k in range(1000)}
    everything = {q for qs in held.values() for q in qs} | trained
    assert len(everything) < 300
    assert all(len(set(qs)) == len(qs) == 20 for qs in held.values())
    assert not set(held["val"]) & set(held["test"])
    assert not trained & {*held["val"], *held["test"]}
    assert len(trained) > 100


def test_neighbouring_seeds_share_nothing():
    """reasoning-gym numbers items by seed + index, so its seeds 0 and 1 give nearly the same set."""
    own = [gym.create_dataset("chain_sum", seed=s, size=50) for s in (0, 1)]
    assert [own[0][i + 1]["question"] for i in range(49)] == [own[1][i]["question"] for i in range(49)]
    ours = [ReasoningGymTask("chain_sum", {"min_digits": 4}, seed=s, size=50, held_out=50) for s in (0, 1)]
    sets = [{question(d.train_example(k, STREAM)) for k in range(50)} for d in ours]
    sets += [{question(e) for e in d.held_out(split)} for d in ours for split in ("val", "test")]
    assert sum(map(len, sets)) == len(set.union(*sets))


def test_sample_k_is_a_pure_function():
    first, second = (ReasoningGymTask("gcd", size=30, held_out=4) for _ in range(2))
    order = [second.train_example(k, STREAM) for k in (40, 2, 7)]
    assert order == [first.train_example(k, STREAM) for k in (40, 2, 7)]
    again = pickle.loads(pickle.dumps(first))
    assert again.train_example(2, STREAM) == order[1]
    assert again.held_out("val") == second.held_out("val")
    assert first.revision == second.revision != ReasoningGymTask("gcd", size=30, held_out=4, seed=1).revision


def test_a_round_has_each_item_once():
    data = ReasoningGymTask("chain_sum", {"min_digits": 6, "max_digits": 9}, size=40, held_out=2)
    assert len({data.train_example(k, STREAM)["id"] for k in range(40)}) == 40
    assert {data.train_example(k, STREAM)["id"] for k in range(40)} == {
        data.train_example(k, STREAM)["id"] for k in range(40, 80)
    }


def test_a_mixture():
    tasks = {"chain_sum": {"weight": 3}, "gcd": {"config": {"min_numbers": 2}}, "lcm": {"weight": 0.5, "config": None}}
    data = ReasoningGymTask(tasks=tasks, held_out=3, size=50)
    data.check()
    drawn = Counter(data.train_example(k, STREAM)["meta"]["task"] for k in range(900))
    assert drawn["chain_sum"] == pytest.approx(600, abs=75)  # 5 standard deviations
    assert drawn["gcd"] == pytest.approx(200, abs=65)
    assert drawn["lcm"] == pytest.approx(100, abs=50)
    assert [e["meta"]["task"] for e in data.held_out("val")] == ["chain_sum"] * 3 + ["gcd"] * 3 + ["lcm"] * 3
    assert {data.train_example(k, STREAM, "lcm")["meta"]["task"] for k in range(20)} == {"lcm"}
    assert [e["meta"]["task"] for e in data.held_out("test", "gcd")] == ["gcd"] * 3
    with pytest.raises(ConfigError, match="parts chain_sum, gcd, lcm here, not 'sft'"):
        data.train_example(0, STREAM, "sft")


def test_nothing_is_printed(capfd):
    ReasoningGymTask("bf", size=20, held_out=2).check()
    ReasoningGymTask("codeio", size=20, held_out=2).check()
    out = capfd.readouterr()
    assert out.out == out.err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "chain_sun"}, "no task 'chain_sun'.*chain_sum"),
        ({"task": "composite"}, "composite cannot be used: it is a mixture"),
        ({"task": "game_of_life_halting"}, "cannot be used: its scoring takes nearly any text"),
        ({"task": "puzzle24"}, "cannot be used: .*any four numbers"),
        ({"task": "coin_flip"}, "cannot be used: .*any beginning"),
        ({"task": "rush_hour"}, "knows no right answer beforehand.*allow_no_gold=true"),
        ({"task": "chain_sum", "config": {"min_term": 3}}, "no option 'min_term'.*min_terms"),
        ({"task": "chain_sum", "config": {"seed": 3}}, "no option 'seed'.*the data set's own"),
        ({"task": "chain_sum", "config": {"min_terms": 0}}, "chain_sum refuses its config"),
        ({"task": "chain_sum", "config": {"min_terms": "x"}}, "chain_sum refuses its config"),
    ],
)
def test_check_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        ReasoningGymTask(**options, held_out=2).check()


def test_it_refuses_what_cannot_be():
    for options in (
        {},
        {"task": "gcd", "tasks": {"lcm": {}}},
        {"tasks": {}},
        {"tasks": {"gcd": {}}, "config": {"a": 1}},
    ):
        with pytest.raises(ConfigError, match=r"one task .* or a mixture"):
            ReasoningGymTask(**options)
    with pytest.raises(ConfigError, match="takes weight and config"):
        ReasoningGymTask(tasks={"gcd": {"wieght": 1}})
    with pytest.raises(ConfigError, match="needs positive weights"):
        ReasoningGymTask(tasks={"gcd": {"weight": -1}})
    with pytest.raises(ConfigError, match="size=0"):
        ReasoningGymTask("gcd", size=0)
    with pytest.raises(ConfigError, match="val and test, not 'train'"):
        ReasoningGymTask("gcd").held_out("train")


def test_a_task_without_enough_questions():
    """One question and no more: it is held out, and nothing is left to train on."""
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    data = ReasoningGymTask("chain_sum", config, held_out=500)
    with pytest.raises(BadDataError, match=r"chain_sum with these options has (so|too) few different questions"):
        data.check()


def test_tasks_without_gold_are_let_in():
    data = ReasoningGymTask("rush_hour", allow_no_gold=True, size=10, held_out=2)
    data.check()
    assert "answer" not in data.train_example(0, STREAM)


def test_an_integral_that_is_left_to_do_is_no_gold_answer():
    """Some items of intermediate_integration have their own question for an answer."""
    data = ReasoningGymTask("intermediate_integration", size=60, held_out=2)
    undone = [i for i in range(60) if "Integral(" in data._item("intermediate_integration", "train", i)["answer"]]
    assert undone
    assert not any("Integral(" in data._train_item("intermediate_integration", i)["answer"] for i in undone[:5])
