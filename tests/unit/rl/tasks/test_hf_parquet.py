"""Prompts from parquet files: columns by a map, templates, structs, and what is refused."""

import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.rl.tasks.hf_parquet import HFParquet

STREAM = Stream(0, "grpo", 4)


@pytest.fixture
def write(tmp_path):
    """``write(rows, name)`` puts rows into a parquet file."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")

    def make(rows, name="data.parquet"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    return make


def everything(data):
    held = [*data.held_out("val"), *data.held_out("test")]
    count = 0
    seen = {}
    while count == len(seen):  # a round of training rows, until one comes again
        example = data.train_example(count, STREAM)
        seen[example["id"]] = example
        count += 1
    return {e["id"]: e for e in [*held, *seen.values()]}


def asked(example):
    return [(m["role"], m["content"][0]["value"]) for m in example["messages"]]


def test_gsm8k_by_name(write):
    rows = [{"question": f"How many {i}?", "answer": f"Some\nsteps. <<1+1>>\n#### {i},000"} for i in range(30)]
    data = HFParquet(write(rows), "gsm8k")
    assert isinstance(data, DataSource)
    data.check()
    examples = everything(data)
    assert len(examples) == 30
    assert {e["answer"] for e in examples.values()} == {f"{i},000" for i in range(30)}
    assert {e["verifier"] for e in examples.values()} == {"numeric"}
    assert asked(examples["data.parquet row 3"]) == [("user", "How many 2?")]


def test_a_map_with_templates_structs_and_chats(write):
    rows = [
        {
            "context": f"c{i}",
            "question": f"q{i}",
            "reward_model": {"ground_truth": i, "style": "rule"},
            "chat": [{"role": "system", "content": "s"}, {"role": "user", "content": f"u{i}"}],
            "name": f"row-{i}",
            "kind": "math",
            "solved": 0.25,
            "fold": "train" if i else "val",
        }
        for i in range(4)
    ]
    path = write(rows)
    common = {"answer": "reward_model.ground_truth", "id": "name", "verifier": "kind", "split": "fold"}
    data = HFParquet(path, {"prompt": "{context}: {question}?", **common, "meta": {"pass_rate": "solved"}})
    (val,) = data.held_out("val")
    assert asked(val) == [("user", "c0: q0?")]
    assert (val["id"], val["answer"], val["verifier"], val["meta"]) == ("row-0", "0", "math", {"pass_rate": 0.25})
    assert {data.train_example(k, STREAM)["id"] for k in range(3)} == {"row-1", "row-2", "row-3"}
    chat = HFParquet(path, {"prompt": "chat", **common}).held_out("val")[0]
    assert asked(chat) == [("system", "s"), ("user", "u0")]


def test_a_folder_of_files(write, tmp_path):
    for shard in range(3):
        write([{"q": f"{shard}-{i}", "a": "1"} for i in range(10)], f"set/deep/shard-{shard}.parquet")
    data = HFParquet(tmp_path / "set", {"prompt": "q", "answer": "a"}, verifier="numeric")
    assert len(everything(data)) == 30
    one = HFParquet(tmp_path / "set" / "deep" / "shard-0.parquet", {"prompt": "q", "answer": "a"}, verifier="numeric")
    assert data.revision != one.revision


def test_one_report_of_all_rows(write):
    rows = [{"q": None if i % 2 else f"q{i}", "a": "no mark" if i % 4 == 2 else "#### 1"} for i in range(60)]
    schema = {"prompt": "Say: {q}", "answer": "a", "answer_after": "####"}
    with pytest.raises(BadDataError) as caught:
        HFParquet(write(rows), schema, verifier="numeric").check()
    text = str(caught.value)
    assert "45 of 60 rows cannot be used" in text
    assert "data.parquet row 2: its column 'q' is empty" in text
    assert "data.parquet row 3: its answer has no '####'" in text
    assert text.endswith("and 25 more")


def test_a_column_that_is_not_there(write):
    path = write([{"question": "a", "answer": "b"}])
    with pytest.raises(ConfigError, match=r"no column 'questoin'.*question.*it has question, answer"):
        HFParquet(path, {"prompt": "questoin", "answer": "answer"}, verifier="math").check()


def test_files_that_are_none(write, tmp_path):
    schema = {"prompt": "q"}
    junk = tmp_path / "junk.parquet"
    junk.write_bytes(b"PAR1 and no more")
    with pytest.raises(BadDataError, match="is no parquet file that can be read"):
        HFParquet(junk, schema, verifier="format").check()
    whole = write([{"q": "x" * 1000 + str(i)} for i in range(2000)])
    cut = tmp_path / "cut.parquet"
    data = bytearray(whole.read_bytes())
    data[200 : len(data) // 2] = b"\0" * (len(data) // 2 - 200)
    cut.write_bytes(data)
    with pytest.raises(BadDataError, match=r"cut\.parquet"):
        HFParquet(cut, schema, verifier="format").check()


def test_paths_that_are_none(tmp_path):
    with pytest.raises(MissingDataError, match=r"no \*\.parquet file is in this folder"):
        HFParquet(tmp_path, {"prompt": "q"}).check()
    with pytest.raises(MissingDataError, match="there is no such file"):
        HFParquet(tmp_path / "x.parquet", "gsm8k").check()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("gsm8", "no schema 'gsm8'.*gsm8k"),
        ({"promt": "q"}, "unknown key 'promt'.*prompt"),
        ({"answer": "q"}, "says nothing of the prompt"),
        ({"prompt": 3}, "schema.prompt names a column"),
        ({"prompt": "q", "meta": "m"}, "schema.meta names a column"),
    ],
)
def test_schemas_that_cannot_be(tmp_path, schema, message):
    with pytest.raises(ConfigError, match=message):
        HFParquet(tmp_path, schema)


def test_the_extra_is_named_where_pyarrow_is_missing(tmp_path, monkeypatch):
    import sys

    from bestiary.shared.core.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtraError, match="pyarrow is not installed"):
        HFParquet(tmp_path, "gsm8k").check()
