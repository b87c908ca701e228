import pickle

import pytest

from bestiary.shared.core.build import build
from bestiary.shared.core.config import compose
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import check_example
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.splits import split_of
from bestiary.shared.language.byte_tokenizer import ByteTokenizer
from bestiary.shared.rl.environments.calculator import Calculator
from bestiary.shared.rl.environments.tool_environment import play
from bestiary.shared.rl.tasks.calculator import CalculatorTasks

STREAM = Stream(0, "rl", 8)


def train(data, count, part=None, stream=STREAM):
    return [data.train_example(k, stream, part) for k in range(count)]


def texts(example):
    return [(m["role"], "".join(c["value"] for c in m["content"])) for m in example["messages"]]


def question(example):
    return texts(example)[-1][1].removesuffix("=")


def test_it_is_a_source():
    data = CalculatorTasks()
    assert isinstance(data, DataSource)
    data.check()
    assert data.spec().task == "chat"
    for example in train(data, 50):
        check_example(example)
        left, right = question(example).split("*")
        assert len(left) == len(right) == 2
        assert example["answer"] == str(int(left) * int(right))
        assert example["verifier"] == "exact_text"


def test_operands_are_as_asked():
    data = CalculatorTasks(digits=[1, 3], terms=[2, 4], operations="+-")
    seen = set()
    for example in train(data, 500):
        asked = question(example)
        numbers = asked.replace("-", "+").split("+")
        assert all(str(int(n)) == n and len(n) <= 3 for n in numbers)
        seen |= {len(numbers), *(f"{len(n)} digits" for n in numbers)}
        signed = [int(t) for t in asked.replace("-", "+-").split("+")]
        assert example["answer"] == str(sum(signed))
    assert seen == {2, 3, 4, "1 digits", "2 digits", "3 digits"}


def test_samples_are_pure():
    data = CalculatorTasks()
    assert train(data, 50, "sft") == train(pickle.loads(pickle.dumps(data)), 50, "sft")
    assert train(data, 50, "rl") == train(data, 50)
    assert train(data, 50) != train(data, 50, stream=Stream(1, "rl", 8))


def test_held_out_questions_are_never_trained_on():
    data = CalculatorTasks()
    seen = {question(e) for e in train(data, 4000)} | {texts(e)[0][1][:-1] for e in train(data, 4000, "sft")}
    assert len(seen) > 2500
    for split in ("val", "test"):
        held = [question(e) for e in data.held_out(split)]
        assert len(set(held)) == len(held) == 256
        assert not set(held) & seen
        assert {split_of(q) for q in held} == {split}
        assert data.held_out(split, "rl") == data.held_out(split)


def test_the_teacher():
    data = CalculatorTasks(tool_share=0.3, wrong_direct=0.8)
    direct = right = 0
    for example in (shown := train(data, 2000, "sft")):
        check_example(example)
        turns = texts(example)
        left, second = turns[0][1].removesuffix("=").split("*")
        value = str(int(left) * int(second))
        if example["meta"]["tool"]:
            expected = [("assistant", f"calc({left}*{second})"), ("tool", value), ("assistant", value)]
            assert turns[1:] == expected
        else:
            ((role, answer),) = turns[1:]
            assert role == "assistant"
            assert len(answer) == len(value)
            direct, right = direct + 1, right + (answer == value)
    assert abs(direct / len(shown) - 0.7) < 0.05
    assert abs(right / direct - 0.2) < 0.05
    assert not any(e["meta"]["tool"] for e in train(CalculatorTasks(tool_share=0), 50, "sft"))
    assert all(e["meta"]["tool"] for e in train(CalculatorTasks(tool_share=1), 50, "sft"))


@pytest.mark.parametrize("form", ["compact", "hermes", "nemotron_nano_v2", "nemotron_3"])
def test_demonstrations_are_what_the_environment_plays(form):
    data, environment = CalculatorTasks(format=form, tool_share=1.0), Calculator(form)
    for k in range(20):
        asked, shown = data.train_example(k, STREAM, "rl"), data.train_example(k, STREAM, "sft")
        before = texts(environment.prompt(asked))
        turns = texts(shown)
        assert turns[: len(before)] == before
        said, verdict = play(environment, asked, [text for role, text in turns if role == "assistant"])
        assert said == [text for role, text in turns if role == "tool"]
        assert verdict.score == 1.0


def test_all_turns_of_the_assistant_carry_loss():
    tokenizer = ByteTokenizer()
    (shown,) = train(CalculatorTasks(tool_share=1.0), 1, "sft")
    ids, own = tokenizer.chat(shown["messages"])
    learned = tokenizer.decode([i for i, mine in zip(ids, own, strict=True) if mine])
    call, answer = (text for role, text in texts(shown) if role == "assistant")
    assert learned == call + answer
    assert len(ids) < 50  # short enough for a tiny model


def test_a_teacher_that_is_wrong_on_purpose_scores_nothing():
    data, environment = CalculatorTasks(tool_share=0.0, wrong_direct=1.0, operations="+-*"), Calculator()
    for k in range(200):
        asked, shown = data.train_example(k, STREAM, "rl"), data.train_example(k, STREAM, "sft")
        assert play(environment, asked, [texts(shown)[-1][1]])[1].score == 0.0


def test_bad_settings():
    for options in ({"digits": [0, 2]}, {"digits": [3, 2]}, {"digits": [1]}, {"digits": [1, 99]}, {"terms": [1, 2]}):
        with pytest.raises(ConfigError, match="calculator_tasks: "):
            CalculatorTasks(**options)
    for options in ({"operations": "/"}, {"operations": ""}, {"tool_share": 1.5}, {"wrong_direct": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            CalculatorTasks(**options)
    with pytest.raises(ConfigError, match="did you mean 'compact'"):
        CalculatorTasks(format="compct")
    with pytest.raises(ConfigError, match="val and test"):
        CalculatorTasks().held_out("train")
    with pytest.raises(ConfigError, match="parts rl and sft"):
        CalculatorTasks().train_example(0, STREAM, "chat")


def test_few_questions_are_all_found():
    data = CalculatorTasks(digits=[1, 1])
    held = {question(e) for s in ("val", "test") for e in data.held_out(s)}
    every = {f"{a}*{b}" for a in range(10) for b in range(10)}
    assert held == {q for q in every if split_of(q) != "train"}


def test_the_config():
    data = build(compose(["+project=_examples", "dataset=calculator_tasks"])[0].dataset)
    assert train(data, 20, "sft") == train(CalculatorTasks(), 20, "sft")
