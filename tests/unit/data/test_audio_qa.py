"""A user's own questions about audio as a data source: its examples, verifiers, parts and splits."""

import os

import numpy as np
import pytest
import soundfile

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.core.examples import check_example
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.audio_controls import controlled
from bestiary.shared.data.audio_qa import AudioQAJsonl, as_record
from bestiary.shared.rl.rewards.registry import make_verifier
from bestiary.shared.testing.audio_rows import audio_folder, pieces, report, row, source, write

STREAM = Stream(0, "sft", 4)


@pytest.fixture
def folder(tmp_path):
    return audio_folder(tmp_path)


def test_a_row_becomes_an_example(folder):
    path = write(folder, row(id="q", start=0.5, end=1.25, task="key", meta={"key": "G", "mode": "major", "bpm": None}))
    data = source(path)
    assert isinstance(data, DataSource)
    data.check()
    (example,) = data.held_out("test")
    check_example(example)
    assert example["id"] == "q"
    assert pieces(example) == [(1, 6000), "Which key?"]
    assert (example["answer"], example["verifier"]) == ("G major", "exact_text")
    assert example["meta"] == {"task": "key", "metadata": {"key": "G major"}}
    audio = example["messages"][0]["content"][0]
    assert audio["value"].dtype == np.float32
    stat = (folder / "audio" / "a.wav").stat()
    assert audio["key"] == f"{folder}/audio/a.wav:0.5-1.25:{stat.st_mtime_ns}:{stat.st_size}:8000"


def test_audio_is_read_when_asked_for_at_the_rate_asked_for(folder):
    path = write(folder, row())
    examples = AudioQAJsonl(str(path), rate=4000).held_out("test")
    assert len(examples) == 1
    assert len(examples[0]["messages"][0]["content"][0]["value"]) == 8000
    # A file that is replaced between two looks has another key.
    soundfile.write(folder / "audio" / "a.wav", np.full(8000, 0.5, np.float32), 8000)
    assert pieces(examples[0])[0][0] == 5
    assert "32000" not in examples[0]["messages"][0]["content"][0]["key"]


@pytest.mark.parametrize(
    ("more", "verifier", "right", "wrong"),
    [
        ({}, "exact_text", "G major", "G minor"),
        ({"answer": 120}, "numeric", "It is 120.", "It is 121."),
        ({"answer": "96 bpm"}, "numeric", "about 96", "about 90"),
        ({"options": ["C", "G major"]}, "multiple_choice", "(B)", "(A)"),
        ({"options": {"A": "C", "B": "D"}, "answer": "A"}, "multiple_choice", "A", "B"),
        (
            {"task": "caption", "meta": {"key": "A", "mode": "minor", "metre": "3/4"}, "answer": "A waltz."},
            "metadata",
            "In A minor, 3/4.",
            "In C major.",
        ),
        ({"task": "caption", "answer": "A waltz."}, "exact_text", "A waltz.", "No."),
    ],
)
def test_the_verifier_is_chosen_by_the_form_of_the_question(folder, more, verifier, right, wrong):
    example = source(write(folder, row(**more))).held_out("test", "rl")[0]
    assert example["verifier"] == verifier
    judge = make_verifier(verifier)
    assert judge.verify(example["answer"], right, example).score == 1
    assert judge.verify(example["answer"], wrong, example).score == 0


def test_a_verifier_can_be_named(folder):
    path = write(folder, row(answer="5"))
    assert source(path, verifier="exact_text").held_out("test")[0]["verifier"] == "exact_text"
    with pytest.raises(ConfigError, match="there is no verifier 'exact'"):
        source(path, verifier="exact")


def test_thoughts_are_shown_where_asked(folder):
    path = write(
        folder,
        row(id="t", think="Sharps.", split="train"),
        row("b", id="u", answer="<think> Two. </think>\n<answer>D major</answer>", split="train"),
        row("c", id="v", split="train"),
    )
    plain, shown = source(path), source(path, thoughts=True)

    def answers(data, part):
        return {e["id"]: e["answer"] for e in (data.train_example(k, STREAM, part) for k in range(3))}

    assert answers(plain, "sft") == {"t": "G major", "u": "D major", "v": "G major"}
    thought = {
        "t": "<think>Sharps.</think><answer>G major</answer>",
        "u": "<think>Two.</think><answer>D major</answer>",
    }
    assert answers(shown, "sft") == {**thought, "v": "G major"}
    assert answers(plain, "think") == thought
    assert answers(source(path, thoughts=True, tagged=True), "sft") == {**thought, "v": "<answer>G major</answer>"}
    assert answers(source(path, tagged=True), "rl") == answers(plain, "rl")
    assert answers(shown, "rl") == answers(plain, "sft")
    assert "verifier" not in plain.train_example(0, STREAM, "sft")
    with pytest.raises(ConfigError, match="the parts sft, think and rl, not 'x'"):
        plain.train_example(0, STREAM, "x")


def test_an_epoch_holds_every_row_once(folder):
    data = source(write(folder, *(row(id=str(i), split="train") for i in range(7))))
    ids = [data.train_example(k, STREAM)["id"] for k in range(14)]
    assert sorted(ids[:7]) == sorted(ids[7:]) == list("0123456")


def test_rows_of_one_recording_are_on_one_side(folder):
    """Directly, or through a row that hears two; and wherever the folder is."""
    rows = [
        {**row(name), "id": f"{name}{n}", "split": None, "question": f"question {n}"}
        for name in "abcdef"
        for n in range(5)
    ]
    rows.append({**row(), "id": "both", "audio": ["audio/a.wav", "./audio/b.wav"], "split": None})

    def sides(data):
        splits = data._splits
        return {r.id: side for side, rows in splits.items() for r in rows}

    found = sides(source(write(folder, *rows)))
    for name in "abcdef":
        assert len({found[f"{name}{n}"] for n in range(5)}) == 1
    assert found["a0"] == found["b0"] == found["both"]
    moved = folder.with_name("moved")
    os.rename(folder, moved)
    assert sides(source(moved / "data.jsonl")) == found


def test_a_tenth_each_is_held_out_and_a_named_split_binds_its_recording(folder):
    for n in range(200):
        os.link(folder / "audio" / "a.wav", folder / "audio" / f"n{n}.wav")
    rows = [{**row(f"n{n}"), "split": None} for n in range(200)]
    rows.append({**row("n7"), "split": "val"})
    data = source(write(folder, *rows))
    val, test = data.held_out("val"), data.held_out("test")
    assert 8 <= len(val) <= 35
    assert 8 <= len(test) <= 35
    assert "line 8" in [e["id"] for e in val]


def test_a_recording_in_two_splits_is_refused(folder):
    text = report(write(folder, row(id="x", split="train"), row(id="y", split="test"), row("b", id="z")))
    assert "2 rows cannot be used (2 x recording in two splits)" in text
    assert "line 1: its recording is in test and train" in text


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    data = AudioQAJsonl(str(tmp_path / "none.jsonl"))
    assert data.spec().modalities == ("audio",)
    with pytest.raises(MissingDataError):
        data.revision  # noqa: B018


def test_another_file_has_another_revision(folder):
    one = source(write(folder, row())).revision
    assert one != source(write(folder, row(answer="D"))).revision
    assert one == source(write(folder, row())).revision


def test_no_row_to_train_on(folder):
    data = source(write(folder, row(), row("b", split="train")))
    with pytest.raises(BadDataError, match="no row is to train on with thoughts"):
        data.train_example(0, STREAM, "think")
    with pytest.raises(ConfigError, match="val and test, not 'train'"):
        data.held_out("train")


def test_swapping_reads_no_audio_to_plan(folder):
    examples = source(write(folder, row(id="x"), row("b", id="y"))).held_out("test")
    assert examples.audio_keys == [[e["messages"][0]["content"][0]["key"]] for e in examples]
    assert [pieces(e)[0][0] for e in controlled(examples, "swapped")] == [2, 1]


def test_a_record_of_metadata():
    assert as_record({"Key": "C", "Mode": "minor", "bpm": "", "x": []}) == {"Key": "C minor"}
    assert as_record({"key": "C minor", "mode": "minor"}) == {"key": "C minor"}
    assert as_record({"mode": "dorian"}) == {"mode": "dorian"}
