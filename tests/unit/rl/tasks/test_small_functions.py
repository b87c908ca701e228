"""Small functions: programs by hand, what their tests find, the teacher's mistake, and what is held out."""

import pytest

from bestiary.shared.core.build import build
from bestiary.shared.core.config import compose
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import check_example
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.rl.rewards.code import Code
from bestiary.shared.rl.rewards.registry import self_test
from bestiary.shared.rl.tasks.small_functions import FAMILIES, SmallFunctions

STREAM = Stream(0, "rl", 8)
BY_HAND = {
    "number: plus 3, then times 2": "def f(x): return (x + 3) * 2",
    "number: times 2, then minus 4": "def f(x): return (x * 2 - 4)",
    "text: reverse, then first 2": "def f(x): return x[::-1][:2]",
    "text: upper case, then twice": "def f(x): return (x.upper() * 2)",
    "list: sort, then last 3": "def f(x): return sorted(x)[-3:]",
    "list: drop 1, then sort": "def f(x): return sorted(x[1:])",
}


def asked(example):
    return example["messages"][0]["content"][0]["value"]


def everything(data):
    count = len(data._questions["train"])
    return [data.train_example(k, STREAM) for k in range(count)] + [*data.held_out("val"), *data.held_out("test")]


def run(program, argument):
    """The data set's own programs, which this file names, are no model's: they may run here."""
    scope = {}
    exec(program, scope)
    return scope["f"](argument)


@pytest.fixture(scope="module")
def examples():
    return {asked(example): example for example in everything(SmallFunctions())}


def test_it_is_a_source():
    data = build(compose(["+project=_examples", "dataset=small_functions"])[0].dataset)
    assert isinstance(data, DataSource)
    data.check()
    assert data.spec().task == "chat"
    assert data.revision != SmallFunctions(noise=0.5).revision


def test_programs_by_hand(examples):
    for question, program in BY_HAND.items():
        assert examples[question]["meta"]["solution"] == program


def test_every_solution_passes_its_tests(examples):
    assert len(examples) > 1000
    for example in examples.values():
        check_example(example)
        meta = example["meta"]
        assert len(meta["tests"]["calls"]) == 5
        for call in meta["tests"]["calls"]:
            found = run(meta["solution"], call["args"][0])
            assert (found, type(found)) == (call["expected"], type(call["expected"]))
        results = [call["expected"] for call in meta["tests"]["calls"]]
        assert any(result != results[0] for result in results), asked(example)  # no constant passes


def test_the_teacher():
    data = SmallFunctions()
    wrong = {True: [], False: []}
    order = {asked(e): e["meta"] for e in everything(data)}
    for k in range(3000):
        example = check_example(data.train_example(k, STREAM, "sft"))
        assert "verifier" not in example
        program = example["answer"].removeprefix("```python\n").removesuffix("\n```")
        meta = order[asked(example)]
        passed = all(run(program, c["args"][0]) == c["expected"] for c in meta["tests"]["calls"])
        assert passed or meta["order_matters"]
        wrong[meta["order_matters"]].append(not passed)
        assert len(example["answer"]) <= 60
    assert not any(wrong[False])
    assert sum(wrong[True]) / len(wrong[True]) == pytest.approx(0.6, abs=0.05)
    assert all(
        data.train_example(k, STREAM, "sft")["answer"] == f"```python\n{order[asked(e)]['solution']}\n```"
        for data in [SmallFunctions(noise=0)]
        for k, e in ((k, data.train_example(k, STREAM, "sft")) for k in range(50))
    )


def test_nothing_held_out_is_trained_on():
    data = SmallFunctions()
    held = {split: {asked(e) for e in data.held_out(split)} for split in ("val", "test")}
    assert not held["val"] & held["test"]
    assert min(len(questions) for questions in held.values()) >= 100
    for part in (None, "rl", "sft"):
        trained = {asked(data.train_example(k, STREAM, part)) for k in range(len(data._questions["train"]))}
        assert len(trained) == len(data._questions["train"])  # each once before any comes again
        assert not trained & (held["val"] | held["test"])
    assert {e["meta"]["family"] for e in data.held_out("test")} == set(FAMILIES)


def test_samples_are_pure():
    first, second = SmallFunctions(), SmallFunctions()
    order = [second.train_example(k, STREAM, "sft") for k in (500, 3, 1800)]
    assert order == [first.train_example(k, STREAM, "sft") for k in (500, 3, 1800)]
    assert first.held_out("test", "sft") == first.held_out("test")


def test_the_reward_knows_them():
    data, code = SmallFunctions(calls=3), Code()
    try:
        code.describe()
    except ConfigError as error:
        pytest.skip(f"no sandbox here: {error}")
    some = list(data.held_out("test"))[::20]
    assert self_test({"code": code}, some).tested == {"code": len(some)}
    code.close()


def test_it_refuses():
    with pytest.raises(ConfigError, match="parts sft and rl"):
        SmallFunctions().train_example(0, STREAM, "x")
    with pytest.raises(ConfigError, match="holds out val and test"):
        SmallFunctions().held_out("train")
    for wrong in ({"noise": 2}, {"families": ["poem"]}, {"families": []}, {"calls": 0}):
        with pytest.raises(ConfigError, match="small_functions"):
            SmallFunctions(**wrong)
