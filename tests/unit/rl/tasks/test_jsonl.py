"""A user's own prompts as JSON lines: what is read, how it is split, and one report of all that is wrong."""

import hashlib
import json

import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.core.examples import check_example
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.rl.tasks.jsonl import LONGEST_LINE, RLJsonl

STREAM = Stream(0, "grpo", 4)


@pytest.fixture
def write(tmp_path):
    """``write(rows)`` puts rows (objects, text or bytes) into a file, one a line, and returns its path."""

    def make(*rows):
        path = tmp_path / "data.jsonl"
        lines = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return make


def row(prompt="what?", **more):
    return {"prompt": prompt, "answer": "7", "verifier": "numeric", **more}


def many(count):
    return [row(f"question {i}", answer=str(i)) for i in range(count)]


def report(path, **options):
    with pytest.raises(BadDataError) as caught:
        RLJsonl(path, **options).check()
    return str(caught.value)


# ------------------------------------------------------------------ what is read


def test_it_is_a_source(write):
    data = RLJsonl(write(*many(50)))
    assert isinstance(data, DataSource)
    data.check()
    assert data.spec().task == "chat"


def test_a_row_becomes_an_example(write):
    path = write(
        row("2+5?", split="train", id="sum", meta={"level": 3}),
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]},
            ],
            "answer": {"x": [1, "é"]},
            "verifier": "json_schema",
            "meta": {"schema": {"type": "object"}},
            "split": "val",
        },
        row("no answer needed", split="test", answer=None, verifier="format", id=12),
    )
    data = RLJsonl(path)
    assert check_example(data.train_example(0, STREAM)) == {
        "id": "sum",
        "messages": [{"role": "user", "content": [{"type": "text", "value": "2+5?"}]}],
        "answer": "7",
        "verifier": "numeric",
        "meta": {"level": 3},
    }
    (val,) = data.held_out("val")
    assert val["id"] == "line 2"
    assert [(m["role"], m["content"][0]["value"]) for m in val["messages"]] == [("system", "be brief"), ("user", "ab")]
    assert val["answer"] == '{"x": [1, "é"]}'
    (test,) = data.held_out("test")
    assert test["id"] == "12"
    assert "answer" not in test


def test_numbers_as_answers_and_a_verifier_for_all(write):
    path = write({"prompt": "a", "answer": 7, "split": "train"}, {"prompt": "b", "answer": 0.5, "split": "train"})
    data = RLJsonl(path, verifier="math")
    examples = [data.train_example(k, STREAM) for k in range(2)]
    assert {e["answer"] for e in examples} == {"7", "0.5"}
    assert {e["verifier"] for e in examples} == {"math"}
    with pytest.raises(ConfigError, match=r"dataset.verifier: there is no verifier 'maths'.*math"):
        RLJsonl(path, verifier="maths")


def test_empty_lines_and_a_byte_order_mark(write):
    path = write(b"\xef\xbb\xbf" + json.dumps(row("a", split="train")).encode(), "", "  ", row("b", split="train"))
    data = RLJsonl(path)
    assert {data.train_example(k, STREAM)["id"] for k in range(2)} == {"line 1", "line 4"}


def test_a_round_has_each_row_once(write):
    data = RLJsonl(write(*many(60)))
    count = 60 - len(data.held_out("val")) - len(data.held_out("test"))
    ids = [data.train_example(k, STREAM)["id"] for k in range(2 * count)]
    assert len(set(ids[:count])) == len(set(ids[count:])) == count
    assert ids[:count] != ids[count:]
    assert RLJsonl(data.path).train_example(7, STREAM) == data.train_example(7, STREAM)


# ------------------------------------------------------------------ splits


def test_a_prompt_that_comes_twice_stays_in_one_split(write):
    data = RLJsonl(write(*many(200), *({**r, "id": f"again {i}"} for i, r in enumerate(many(200)))))
    splits = {"val": data.held_out("val"), "test": data.held_out("test")}
    asked = {name: {e["messages"][0]["content"][0]["value"] for e in examples} for name, examples in splits.items()}
    trained = {data.train_example(k, STREAM)["messages"][0]["content"][0]["value"] for k in range(400)}
    assert all(5 < len(prompts) < 40 for prompts in asked.values())
    assert not asked["val"] & asked["test"]
    assert not trained & (asked["val"] | asked["test"])
    assert all(len(examples) == 2 * len(asked[name]) for name, examples in splits.items())


def test_rows_that_are_added_move_no_other(write):
    before = {e["answer"] for e in RLJsonl(write(*many(100))).held_out("val")}
    after = {e["answer"] for e in RLJsonl(write(row("new", answer="-1"), *many(100))).held_out("val")}
    assert before == after - {"-1"}


def test_a_split_of_its_own_must_not_leak(write):
    text = report(write(row("same", split="train"), row("same", split="val", id="x")))
    assert "line 2: what it asks is in the split val, and at line 1 in train" in text


def test_the_revision_is_the_hash_of_the_file(write):
    path = write(*many(3))
    expected = hashlib.sha256(path.name.encode() + b"\0" + path.read_bytes()).hexdigest()
    assert RLJsonl(path).revision == f"rl_jsonl-{expected}"
    assert RLJsonl(write(*many(4))).revision != f"rl_jsonl-{expected}"


# ------------------------------------------------------------------ what is wrong

FAULTS = {
    "not JSON: Expecting": "{prompt: 1}",
    "not JSON: NaN is not JSON": '{"prompt": "a", "answer": NaN, "verifier": "math"}',
    "not JSON: nested too deeply": "[" * 200_000,
    "not UTF-8: byte 14 is 0xff": b'{"prompt": "a\xff"}',
    "not JSON: Exceeds the limit": '{"answer": ' + "9" * 5000 + "}",
    "a row is an object with prompt and answer, not 3": 3,
    "neither prompt nor messages": {"answer": "7", "verifier": "math"},
    "both prompt and messages": row(messages=[{"role": "user", "content": "a"}]),
    "a prompt is text, not '  '": row("  "),
    "a prompt is text, not 5": row(5),
    "unknown key 'promt'; did you mean 'prompt'? what is": {"promt": "a", "answer": "7", "verifier": "math"},
    "no verifier (name one": {"prompt": "a", "answer": "7"},
    "there is no verifier 'mth'": row(verifier="mth"),
    "there is no verifier ['math']": row(verifier=["math"]),
    "no answer, and the verifier numeric": row(answer=None),
    "no answer, and the verifier exact_text": row(answer=" ", verifier="exact_text"),
    'no meta["instructions"], which the verifier instructions needs': row(verifier="instructions"),
    "unknown role 'robot'; roles are system, user": {
        "messages": [{"role": "robot", "content": "a"}],
        "verifier": "format",
    },
    "the last message is the assistant's; an answer belongs under answer": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "verifier": "format",
    },
    "message 1: its content is no text, or empty: ''": {
        "messages": [{"role": "user", "content": ""}],
        "verifier": "format",
    },
    "its content is no text, or empty: [{'type': 'image'": {
        "messages": [{"role": "user", "content": [{"type": "image", "value": "a.png"}]}],
        "verifier": "format",
    },
    "messages is a list of {role, content}, not []": {"messages": [], "verifier": "format"},
    "message 1: unknown role None": {"messages": ["hi"], "verifier": "format"},
    "meta is an object, not 'x'": row(meta="x"),
    "an id is text or a whole number, not ''": row(id=""),
    "there is no split 'dev'; there are train, val, test": row(split="dev"),
    "half a character": '{"prompt": "\\ud800", "answer": "7", "verifier": "math"}',
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_with_its_line(write, fault):
    text = report(write(row("fine", split="train"), FAULTS[fault]))
    assert "1 of 2 rows cannot be used" in text
    assert "line 2: " in text
    assert fault in text
    assert len(text) < 2000


def test_one_report_of_all_lines(write):
    path = write(*(row(f"q{i}", verifier="nope" if i % 2 else "math") for i in range(100)), row("q0", id="line 1"))
    text = report(path)
    assert "51 of 101 rows cannot be used" in text
    assert text.count("\n  line ") == 20
    assert text.endswith("and 31 more")
    assert "line 2: " in text
    assert "line 40: " in text


def test_a_duplicate_id(write):
    text = report(write(row("a", id="x"), row("b", id="y"), row("c", id="x")))
    assert "line 3: the id 'x' is that of line 1 too" in text


def test_a_row_with_several_faults_is_one_line(write):
    text = report(write({"verifier": "nope", "split": "dev", "colour": 1}))
    assert "unknown key 'colour'" in text
    assert "neither prompt nor messages; there is no verifier 'nope'" in text
    assert "no split 'dev'" in text


def test_a_line_that_is_too_long_is_passed_over(write):
    text = report(write(row("x" * (LONGEST_LINE + 10)), row("fine", split="train")))
    assert "line 1: longer than 16 MiB" in text
    assert "1 of 2 rows" in text
    assert len(text) < 500


def test_files_that_are_none(write, tmp_path):
    with pytest.raises(MissingDataError, match=r"nowhere.jsonl: there is no such file. Set dataset.path"):
        RLJsonl(tmp_path / "nowhere.jsonl").check()
    with pytest.raises(BadDataError, match=r"is a folder: set dataset\.path to a file"):
        RLJsonl(tmp_path).check()
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(BadDataError, match="is empty"):
        RLJsonl(empty).check()
    assert "has no rows" in report(write("", ""))
    assert "none of its rows is to train on (1 are val and 0 test)" in report(write(row(split="val")))
    assert "kept in memory" in report(write(*many(50)), max_mb=0.001)


def test_what_it_does_not_have(write):
    data = RLJsonl(write(row(split="train")))
    with pytest.raises(ConfigError, match="has no parts; part='sft'"):
        data.train_example(0, STREAM, "sft")
    with pytest.raises(ConfigError, match="val and test, not 'train'"):
        data.held_out("train")
    assert list(data.held_out("val")) == []
