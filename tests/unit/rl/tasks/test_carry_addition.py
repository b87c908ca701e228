"""Addition with a teacher that forgets carries: sums by arithmetic, the teacher's errors, and what is held out."""

import hashlib

import pytest

from bestiary.shared.core.build import build
from bestiary.shared.core.config import conf_dir
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import check_example
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.rl.tasks.carry_addition import PROMPTS, CarryAddition, add

STREAM = Stream(0, "sft", 128)


def prompt_of(example):
    assert [m["role"] for m in example["messages"]] == ["user"]
    return example["messages"][0]["content"][0]["value"]


def place(prompt):
    return int(hashlib.md5(prompt.encode()).hexdigest(), 16) % 10


def from_yaml(group, name):
    from omegaconf import OmegaConf

    return build(OmegaConf.load(conf_dir() / group / f"{name}.yaml"))


def test_it_is_a_source():
    data = from_yaml("dataset", "carry_addition")
    assert isinstance(data, DataSource)
    data.check()
    assert data.spec().task == "chat"
    assert data.revision != CarryAddition(noise=0.5).revision


def test_sums_by_hand():
    assert [add(37, 58), add(37, 58, carries=False)] == ["095", "085"]
    assert [add(99, 99), add(99, 99, carries=False)] == ["198", "088"]
    assert [add(50, 60), add(50, 60, carries=False)] == ["110", "010"]
    assert [add(12, 34), add(12, 34, carries=False)] == ["046", "046"]


def test_the_prompts():
    assert len(PROMPTS) == len(set(PROMPTS)) == 10_000
    assert {len(p) for p in PROMPTS} == {6}
    assert {"00+00=", "37+58=", "99+99="} <= set(PROMPTS)


def test_the_rl_part_is_exact():
    data = CarryAddition()
    for part in ("rl", None):
        for k in range(300):
            example = check_example(data.train_example(k, STREAM, part))
            a, b = map(int, prompt_of(example)[:-1].split("+"))
            assert int(example["answer"]) == a + b
            assert len(example["answer"]) == 3
            assert example["verifier"] == "exact_text"
            assert example["id"] == prompt_of(example)[:-1]  # one id a prompt: pass rates are kept by it
            assert example["meta"]["carry"] == (a % 10 + b % 10 > 9 or a // 10 + b // 10 > 9)


def test_the_teacher():
    data = CarryAddition()
    examples = [data.train_example(k, STREAM, "sft") for k in range(6000)]
    wrong = {True: [], False: []}
    for example in examples:
        check_example(example)
        assert "verifier" not in example
        a, b = map(int, prompt_of(example)[:-1].split("+"))
        wrong[example["meta"]["carry"]].append(int(example["answer"]) != a + b)
        assert example["answer"] in (f"{a + b:03}", f"0{(a // 10 + b // 10) % 10}{(a + b) % 10}")
    assert not any(wrong[False])
    assert sum(wrong[True]) / len(wrong[True]) == pytest.approx(0.6, abs=0.03)  # 4 standard deviations
    assert len(wrong[True]) / len(examples) == pytest.approx(1 - 0.55 * 0.55, abs=0.025)
    assert all(
        int(e["answer"]) == eval_sum(e) for e in (CarryAddition(0).train_example(k, STREAM, "sft") for k in range(50))
    )


def eval_sum(example):
    a, b = prompt_of(example)[:-1].split("+")
    return int(a) + int(b)


def test_nothing_held_out_is_trained_on():
    data = CarryAddition()
    held = {split: {prompt_of(e) for e in data.held_out(split)} for split in ("val", "test")}
    count = len(data.prompts("train"))
    trained = {part: [prompt_of(data.train_example(k, STREAM, part)) for k in range(count)] for part in ("sft", "rl")}
    for prompts in trained.values():
        assert len(set(prompts)) == count  # each once before any comes again
        assert {place(p) for p in prompts} == set(range(2, 10))
    assert {place(p) for p in held["test"]} == {0}
    assert {place(p) for p in held["val"]} == {1}
    assert sum(len(data.prompts(s)) for s in ("train", "val", "test")) == 10_000


def test_the_held_out_draws():
    data = CarryAddition()
    for split in ("val", "test"):
        examples = data.held_out(split)
        assert len(examples) == len({e["id"] for e in examples}) == 512
        assert all(int(check_example(e)["answer"]) == eval_sum(e) for e in examples)
        assert 300 < len({prompt_of(e) for e in examples}) < 512  # with replacement
        assert sum(e["meta"]["carry"] for e in examples) / 512 == pytest.approx(0.6975, abs=0.08)
        assert CarryAddition(noise=0.1).held_out(split, "sft") == examples
    assert len(CarryAddition(held_out=7).held_out("val")) == 7


def test_sample_k_is_a_pure_function():
    first, second = CarryAddition(), CarryAddition()
    order = [second.train_example(k, STREAM, "sft") for k in (500, 3, 8000)]
    assert order == [first.train_example(k, STREAM, "sft") for k in (500, 3, 8000)]
    assert first.train_example(3, Stream(1, "sft", 128), "rl") != first.train_example(3, STREAM, "rl")


def test_it_refuses():
    data = CarryAddition()
    with pytest.raises(ConfigError, match="parts sft and rl, not 'chat'"):
        data.train_example(0, STREAM, "chat")
    with pytest.raises(ConfigError, match="holds out val and test, not 'train'"):
        data.held_out("train")
    with pytest.raises(ConfigError, match="noise is a probability"):
        CarryAddition(noise=6)
    with pytest.raises(ConfigError, match="held_out must be 1"):
        CarryAddition(held_out=0)


def test_the_tiny_model_reads_it():
    backbone = from_yaml("backbone", "qwen2_tiny")
    assert sum(p.numel() for p in backbone.parameters()) == 297_600
    example = CarryAddition().held_out("test")[0]
    from bestiary.shared.language.processor import TextProcessor

    row = TextProcessor(backbone.tokenizer)([example], "train")
    assert row["input_ids"].shape == (1, 10)
    assert int((row["labels"] >= 0).sum()) == 4
