"""Rows of a user's questions about audio: what is read of each layout, and the report of what is wrong."""

import json

import numpy as np
import pytest
import soundfile

from bestiary.shared.core.errors import ConfigError, MissingDataError
from bestiary.shared.data.audio_qa import AudioQAJsonl
from bestiary.shared.testing.audio_rows import audio_folder, pieces, report, row, source, write


@pytest.fixture
def folder(tmp_path):
    return audio_folder(tmp_path)


def whole(folder, value):
    path = folder / "data.json"
    path.write_text(json.dumps(value, indent=1))
    return path


def test_options_are_listed_once(folder):
    data = source(
        write(
            folder,
            row(options=["C", "G major"]),
            row("b", options=["C", "G major"], question="Which? (A) C (B) G major"),
        )
    )
    asked = [pieces(e)[1] for e in data.held_out("test")]
    assert asked == ["Which key? (A) C (B) G major", "Which? (A) C (B) G major"]


def test_nvidias_conversations(folder):
    human, gpt = "human", "gpt"
    path = whole(
        folder,
        [
            {
                "id": "one",
                "sound": "audio/a.wav",
                "duration": 2.0,
                "conversations": [
                    {"from": human, "value": "<sound>\nWhat is it?"},
                    {"from": gpt, "value": "A waltz."},
                    {"from": human, "value": "In which key?"},
                    {"from": gpt, "value": "G major"},
                ],
                "split": "test",
            },
            {
                "id": "two",
                "sound": ["audio/b.wav", "audio/c.wav"],
                "conversations": [
                    {"from": human, "value": "First <sound-2>\nthen <sound-1>\n: which is louder?"},
                    {"from": gpt, "value": "the first"},
                ],
                "split": "test",
            },
            {
                "id": "none",
                "conversations": [{"from": human, "value": "What is a fugue?"}, {"from": gpt, "value": "Music."}],
                "split": "test",
            },
        ],
    )
    one, two, none = source(path).held_out("test")
    assert [m["role"] for m in one["messages"]] == ["user", "assistant", "user"]
    assert one["messages"][0]["content"][0]["type"] == "audio"
    assert one["messages"][0]["content"][1]["value"] == "What is it?"
    assert (one["messages"][1]["content"][0]["value"], one["answer"]) == ("A waltz.", "G major")
    assert pieces(two) == ["First ", (3, 16000), "then ", (2, 16000), ": which is louder?"]
    assert pieces(none) == ["What is a fugue?"]


def test_nvidias_evaluation_layout(folder):
    path = whole(
        folder,
        {
            "dataset_path": "audio",
            "split": "test",
            "split_path": ".",
            "flamingo_task": "MusicQA",
            "data": {"0": {"name": "d.wav", "prompt": "Key? (A) C (B) D", "output": "D"}},
        },
    )
    (example,) = source(path).held_out("test")
    assert pieces(example) == [(4, 16000), "Key? (A) C (B) D"]
    assert (example["id"], example["answer"], example["meta"]["task"]) == ("0", "D", "MusicQA")


def test_chat_messages_with_paths_and_arrays(folder):
    tone = [0.5] * 100
    user = [
        {"type": "audio", "path": "audio/e.wav"},
        {"type": "text", "text": "or"},
        {"type": "audio", "audio": {"array": tone, "sampling_rate": 8000}},
        {"type": "text", "text": "?"},
    ]
    path = write(
        folder,
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": user},
                {"role": "assistant", "content": [{"type": "text", "text": "the first"}]},
            ],
            "split": "test",
        },
    )
    (example,) = source(path).held_out("test")
    assert example["messages"][0] == {"role": "system", "content": [{"type": "text", "value": "Be brief."}]}
    assert pieces(example) == [(5, 16000), "or", (5, 100), "?"]
    assert (example["answer"], example["id"]) == ("the first", "line 1")


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt"])
def test_the_layout_is_told_by_content(folder, name):
    (folder / name).write_text("\n" + json.dumps(row()) + "\n" + json.dumps(row("b")))
    assert len(source(folder / name).held_out("test")) == 2
    (folder / name).write_text("\ufeff" + json.dumps([row(), row("b"), row("c")], indent=2))
    assert len(source(folder / name).held_out("test")) == 3


def test_a_line_may_hold_any_character(folder):
    """Some count U+2028 and U+0085 as ends of lines; JSON Lines does not."""
    odd = json.dumps(row(question="a\u2028b\x85c"), ensure_ascii=False)
    (folder / "data.jsonl").write_text(odd + "\n", encoding="utf-8")
    assert pieces(source(folder / "data.jsonl").held_out("test")[0])[1] == "a\u2028b\x85c"


FAULTS = [
    ("missing audio", row("zz"), "zz.wav: there is no such file"),
    ("unreadable audio", row("text"), "text.wav cannot be read as audio"),
    ("empty audio", row("none"), "none.wav has no samples"),
    ("duration", row(duration=4.1), "4.1 s are declared, and"),
    ("rate", row(rate=16000), "16000 samples a second are declared, and"),
    ("rate", row("slow"), "claims 10 samples a second"),
    ("question", row(question=" "), "no question"),
    ("answer", row(answer=None), "no answer"),
    ("answer", row(answer="<think>x</think>"), "no answer"),
    ("answer not among the options", row(options=["C", "D"]), "'G major' is neither a letter nor an option"),
    ("options", row(options=["G major", "g  major"]), "two options are the same"),
    ("options", row(options="AB"), "options are a list of texts"),
    ("options", row(options=["G major"]), "a choice has 2 to 10 options, not 1"),
    ("options", row(options={"B": "C", "A": "G major"}), "A, B, C and so on, in order"),
    ("split", row(split="dev"), "there is no split 'dev'"),
    ("span", row(start=2.5), "2.5 to 2 s is asked for"),
    ("span", row(start=0, end=3.5), "0 to 3.5 s is asked for, and"),
    ("span", row(start=1, end=1), "start 1 and end 1.0 leave nothing"),
    ("span", row(start=-1), "start -1 and end None leave nothing"),
    ("start", row(start="1"), "start is a number, not '1'"),
    ("duration", '{"audio": "audio/a.wav", "question": "q", "answer": "a", "duration": NaN}', "not nan"),
    ("url", row(audio="https://host/a.wav"), "is a url, which is never fetched"),
    ("audio", row(audio=""), "audio is a path, not ''"),
    ("missing audio", row(audio="audio"), "audio: there is no such file"),
    ("unreadable audio", row(audio="a" * 5000), "cannot be read as audio: File name too long"),
    ("unreadable audio", row("zero"), "zero.wav cannot be read as audio"),
    ("meta", row(meta=["ab"]), "meta is an object"),
    ("options", row(options=[{"a": 1}, "G major"]), "options are texts or numbers"),
    ("text", row(question="\ud800?"), "it holds half a character"),
    ("text", row(id="\ud800"), "it holds half a character"),
    ("layout", {"messages": "hi"}, "it has not the form that its keys promise (string indices must be integers"),
    ("audio", row(audio=3), "'int' object is not iterable"),
    ("unknown key", row(keys="G"), "unknown key 'keys'"),
    ("not JSON", "{", "not JSON"),
    ("layout", "[1]", "it is no object"),
    ("answer", row(task="caption", meta={"key": "H dur"}), "key 'H dur' cannot be read as key"),
    (
        "sounds",
        {"conversations": [{"from": "human", "value": "<sound-2> x"}, {"from": "gpt", "value": "y"}], "sound": "a.wav"},
        "<sound-2> stands there, and there are 1 sounds",
    ),
    (
        "sounds",
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "sound": "a.wav"},
        "1 sounds, and places for []",
    ),
    ("answer", {"conversations": [{"from": "human", "value": "x"}]}, "the last turn is not an answer"),
    ("layout", {"conversations": [{"from": "bot", "value": "x"}]}, "nobody is called 'bot'"),
    (
        "layout",
        {"messages": [{"role": "user", "content": [{"type": "video", "path": "x"}]}]},
        "content of type 'video'",
    ),
    (
        "url",
        {"messages": [{"role": "user", "content": [{"type": "audio", "url": "http://x/y.wav"}]}]},
        "never fetched",
    ),
]


@pytest.fixture
def broken(folder):
    (folder / "audio" / "text.wav").write_text("no audio")
    (folder / "audio" / "zero.wav").write_bytes(b"")
    soundfile.write(folder / "audio" / "none.wav", np.zeros(0, np.float32), 8000)
    soundfile.write(folder / "audio" / "slow.wav", np.zeros(20, np.float32), 10)
    return folder


@pytest.mark.parametrize(("kind", "bad", "words"), FAULTS, ids=lambda v: v if isinstance(v, str) and " " in v else "")
def test_every_fault_is_named(broken, kind, bad, words):
    text = report(write(broken, row("f"), bad))
    if kind != "audio":  # several kinds of layout fault are told by Python
        assert f"1 rows cannot be used (1 x {kind})" in text
    assert f"line 2: {words}" in text or (words in text and "line 2: " in text)


def test_all_faults_come_in_one_report(broken):
    bad = [row("zz")] * 12 + [row(answer="")] * 15
    text = report(write(broken, *(({**b, "id": str(i)}) for i, b in enumerate(bad))))
    lines = text.splitlines()
    assert "27 rows cannot be used (15 x answer, 12 x missing audio):" in lines[0]
    assert len(lines) == 22
    assert lines[1].startswith("  line 1: ")
    assert lines[20].startswith("  line 20: ")
    assert lines[21] == "  and 7 more"


def test_a_file_that_was_half_copied(folder):
    text = "".join(json.dumps(row(name)) + "\n" for name in "abc")
    assert "line 3: not JSON" in report(write(folder, text[:-20]))
    (folder / "half.json").write_text(json.dumps([row(), row("b")])[:-20])
    assert f"{folder / 'half.json'} is not JSON" in report(folder / "half.json")


@pytest.mark.parametrize("options", [{"rate": 0}, {"rate": "16k"}, {"max_seconds": 0}, {"max_seconds": "long"}])
def test_settings_that_are_none(folder, options):
    (name,) = options
    with pytest.raises(ConfigError, match=rf"dataset\.{name} is a "):
        AudioQAJsonl(str(write(folder, row())), **options)


def test_an_id_is_used_once(folder):
    text = report(write(folder, row(id="x"), row("b", id="y"), row("c", id="x")))
    assert "1 rows cannot be used (1 x duplicate id)" in text
    assert "line 3: the id 'x' is that of line 1 too" in text


def test_a_clip_that_is_too_long(folder):
    assert "2 s of" in report(write(folder, row()), max_seconds=1.5)
    source(write(folder, row(end=1.0)), max_seconds=1.5).check()


def test_a_little_over_the_end_is_fine(folder):
    """Ends are often rounded up: to 3 s of 2 s is a second over."""
    assert pieces(source(write(folder, row(start=1, end=3.0, duration=2.9))).held_out("test")[0])[0] == (1, 8000)


def test_files_that_cannot_be_read(folder):
    with pytest.raises(MissingDataError, match=r"none\.jsonl: there is no such file\. Set dataset\.path to a \.jsonl"):
        source(folder / "none.jsonl").check()
    assert (
        report(folder) == f"{folder} is a folder: set dataset.path to a .jsonl or .json file of questions about audio"
    )
    (folder / "e.jsonl").write_text("")
    assert "is empty" in report(folder / "e.jsonl")
    (folder / "e.jsonl").write_text("question,answer\n")
    assert "neither JSON nor JSON lines" in report(folder / "e.jsonl")
    for text in ("null", "3", "\n\n", "<html>"):
        (folder / "e.json").write_text(text)
        assert f"{folder / 'e.json'} begins neither with {{ nor with [" in report(folder / "e.json")
    for text in ("[]", '{"data": {}}'):
        (folder / "e.json").write_text(text)
        assert report(folder / "e.json") == f"{folder / 'e.json'} has no rows"
    (folder / "e.json").write_text("[{]")
    assert "is not JSON" in report(folder / "e.json")
    (folder / "e.jsonl").write_bytes(json.dumps(row()).encode() + b"\n{\xff}\n")
    assert "line 2: not JSON: not UTF-8 at byte 2" in report(folder / "e.jsonl")
