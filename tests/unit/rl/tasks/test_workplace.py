import json
import pickle

import pytest

from bestiary.shared.core.build import build
from bestiary.shared.core.config import compose
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import check_example
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.rl.environments.tool_environment import play
from bestiary.shared.rl.environments.workplace import Workplace
from bestiary.shared.rl.environments.workplace_tasks import TEMPLATES
from bestiary.shared.rl.tasks.workplace import WorkplaceTasks

STREAM = Stream(0, "rl", 8)


def train(data, count, part=None, stream=STREAM):
    return [data.train_example(k, stream, part) for k in range(count)]


def texts(example):
    return [(m["role"], "".join(c["value"] for c in m["content"])) for m in example["messages"]]


def task(example):
    return json.dumps([example["meta"]["template"], example["meta"]["arguments"]], sort_keys=True)


def test_it_is_a_source():
    data = WorkplaceTasks()
    assert isinstance(data, DataSource)
    data.check()
    assert data.spec().task == "chat"
    for example in train(data, 20):
        check_example(example)
        assert set(example["meta"]) - {"fact"} == {"template", "arguments", "gold_calls", "world"}


def test_samples_are_pure():
    data = WorkplaceTasks()
    assert train(data, 50) == train(pickle.loads(pickle.dumps(data)), 50)
    assert train(data, 50, "rl") == train(data, 50)
    assert train(data, 50) != train(data, 50, stream=Stream(1, "rl", 8))
    assert [texts(e)[-1:] for e in train(data, 20)] != [texts(e)[-1:] for e in train(data, 20, "sft")]


def test_held_out_tasks_are_never_trained_on():
    data = WorkplaceTasks()
    seen = {task(e) for e in train(data, 3000)}
    questions = {texts(e)[0] for e in train(data, 3000)}
    held = {split: data.held_out(split) for split in ("val", "test")}
    for examples in held.values():
        assert len(examples) == len({e["id"] for e in examples}) == 128
        assert {e["meta"]["template"] for e in examples} == set(TEMPLATES)
        assert not {task(e) for e in examples} & seen
        assert not {texts(e)[0] for e in examples} & questions
    assert not {task(e) for e in held["val"]} & {task(e) for e in held["test"]}
    assert data.held_out("val") == WorkplaceTasks().held_out("val")


def test_whole_templates_can_be_held_out():
    new = {"move", "ask_count"}
    data = WorkplaceTasks(held_out_templates=sorted(new), held_out_tasks=40)
    assert {e["meta"]["template"] for e in train(data, 1000)} == set(TEMPLATES) - new
    assert {e["meta"]["template"] for e in data.held_out("test", "new")} == new
    assert not {e["meta"]["template"] for e in data.held_out("test", "known")} & new
    assert len(data.held_out("test", "new")) == 40
    assert data.revision != WorkplaceTasks().revision


@pytest.mark.parametrize("form", ["hermes", "nemotron_nano_v2", "nemotron_3", "compact"])
def test_demonstrations_are_what_the_environment_plays(form):
    """The turns of a demonstration, played as a policy's, get the answers that stand in it, and score 1."""
    data, environment = WorkplaceTasks(form), Workplace(form)
    for k in range(40):
        asked, shown = data.train_example(k, STREAM, "rl"), data.train_example(k, STREAM, "sft")
        check_example(shown)
        assert "answer" not in shown
        turns = texts(shown)
        assert turns[:2] == texts(environment.prompt(asked))
        said, verdict = play(environment, asked, [text for role, text in turns if role == "assistant"])
        assert said == [text for role, text in turns if role == "tool"]
        assert verdict.score == 1.0


def test_bad_settings():
    with pytest.raises(ConfigError, match="did you mean 'cancel'"):
        WorkplaceTasks(held_out_templates=["cancl"])
    with pytest.raises(ConfigError, match="at least one template"):
        WorkplaceTasks(held_out_templates=list(TEMPLATES))
    with pytest.raises(ConfigError, match="parts rl and sft to train on, not 'x'"):
        WorkplaceTasks().train_example(0, STREAM, "x")
    with pytest.raises(ConfigError, match="val and test, not 'train'"):
        WorkplaceTasks().held_out("train")
    with pytest.raises(ConfigError, match="not 'new'"):
        WorkplaceTasks().held_out("val", "new")


def test_the_config():
    data = build(compose(["+project=_examples", "dataset=workplace_tasks"])[0].dataset)
    assert train(data, 5) == train(WorkplaceTasks(), 5)
