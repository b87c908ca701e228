"""What people do wrong with the readers of benchmarks: each gives one message that names the file and what to do."""

from __future__ import annotations

import json

import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.data.music_benchmarks.mmau import MMAR, MMAU, MMAUPro
from bestiary.shared.data.music_benchmarks.muchomusic import MuChoMusic, RULMuChoMusic
from bestiary.shared.data.music_benchmarks.musdb18_lyrics import MUSDB18Lyrics
from bestiary.shared.data.music_benchmarks.nsynth import NSynth
from bestiary.shared.data.music_benchmarks.records import read_records

CHOICE = {"question": "q", "choices": ["x", "y"], "answer": "x"}
NOTE = {"instrument_source_str": "acoustic", "instrument_family_str": "bass", "pitch": 3}
MUCHO = {"prompt": "Question: q Options: o", "answers": ["x", "y"], "answer_orders": [0, 1], "audio_path": "a.wav"}
READERS = {
    "mmau": (MMAU, "mmau-test-mini.json", [{"id": "1", "audio_id": "a.wav", "task": "music", **CHOICE}]),
    "mmau_pro": (MMAUPro, "test.json", [{"id": "1", "audio_path": ["a.wav"], "category": "music", **CHOICE}]),
    "mmar": (MMAR, "MMAR-meta.json", [{"id": "1", "audio_path": "a.wav", "modality": "music", **CHOICE}]),
    "muchomusic": (MuChoMusic, "muchomusic.json", [{"id": "a", **MUCHO}]),
    "rul_muchomusic": (
        RULMuChoMusic,
        "RUL-MuchoMusic.json",
        [{"id": "a", "question": "q", "correct_answer": "x", "distractors": ["b", "c", "d"]}],
    ),
    "nsynth": (NSynth, "examples.json", [{"note_str": "a", **NOTE}]),
    "musdb18_lyrics": (MUSDB18Lyrics, "lyrics.json", [{"name": "a", "start": 0, "end": 0.05, "text": "la"}]),
}


@pytest.fixture(params=READERS)
def reader(request, tmp_path, tone):
    """(make, file of the questions, its rows, the audio file) in a folder where all is well."""
    make, file, rows = READERS[request.param]
    sound = tone("audio/a.wav" if request.param == "nsynth" else "a.wav")
    (tmp_path / file).write_text(json.dumps(rows))
    assert make(tmp_path).held_out("test")[0]["id"]
    return make, tmp_path / file, rows, sound


def refused(make, root, **options) -> str:
    with pytest.raises(BadDataError) as told:
        make(root, **options).check()
    return str(told.value)


def test_the_wrong_folder(reader, tmp_path):
    make, file, _, sound = reader
    for root in (tmp_path / "nowhere", sound.parent / "empty"):
        with pytest.raises(MissingDataError, match=f"{root}: {make.name} is not there"):
            make(root).check()
        (sound.parent / "empty").mkdir(exist_ok=True)
    text = refused(make, file)
    assert text == f"{file} is a file: set dataset.root to the folder that {make.name} is in"


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", "3", "[1]", '{"a": 1}', "[" * 100000, "\udcff", "half"])
def test_a_file_of_questions_that_is_none(reader, content):
    make, file, rows, _ = reader
    text = json.dumps(rows)
    file.write_text(text[: len(text) // 2] if content == "half" else content, errors="surrogateescape")
    told = refused(make, file.parent)
    assert str(file) in told.splitlines()[0]
    assert told.endswith(
        f"Is {file.parent} the folder of {make.name}, and its files whole? What to get: conf/dataset/{make.name}.yaml"
    )
    assert len(told.splitlines()) == 2


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": "\u2028"}]', '{"a": 1}\n\n{"a": "\u2028"}\n'])
def test_objects_on_lines_or_a_list_whatever_the_ending(name, content, put):
    assert read_records(put(name, content)) == [{"a": 1}, {"a": "\u2028"}]


@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>", b"RIFF"])
def test_audio_that_is_none(reader, content):
    make, file, _, sound = reader
    sound.write_bytes(content)
    told = refused(make, file.parent)
    assert f"{sound} " in told
    assert ("is empty or not there" if not content else "cannot be read as audio") in told
    assert "dataset.leave_out=true" in told
    # Where all is left out there is nothing: the faults are told all the same.
    left = refused(make, file.parent, leave_out=True)
    assert f"{sound} " in left
    assert left.endswith("None is left without them.")


def test_audio_that_was_not_unpacked(reader):
    make, file, _, sound = reader
    sound.unlink()
    told = refused(make, file.parent)
    assert str(file) in told
    assert str(file.parent) in told
    assert "1 faults in 1 rows" in told


def test_a_rate_that_is_none(reader):
    make, file, _, _ = reader
    for rate in (0, -1, "16k"):
        with pytest.raises(ConfigError, match=r"dataset\.rate is a whole number of samples a second"):
            make(file.parent, rate=rate)


@pytest.mark.parametrize("make", [MMAU, MMAR, MMAUPro, RULMuChoMusic, NSynth])
def test_an_id_that_stands_twice(make, tmp_path, tone, put):
    name, rows = next((file, rows) for reader, file, rows in READERS.values() if reader is make)
    tone("audio/a.wav" if make is NSynth else "a.wav")
    put(name, rows * 2)
    told = refused(make, tmp_path)
    assert "this id stands there twice" in told
    assert str(tmp_path / name) in told
    again = make(tmp_path, leave_out=True)
    assert len({e["id"] for e in again.held_out("test")}) == len(again.held_out("test"))


@pytest.mark.parametrize(("make", "option"), [(MMAU, "task"), (MMAR, "modality"), (MMAUPro, "category")])
def test_a_column_that_is_not_there(make, option, tmp_path, tone, put):
    name, rows = next((file, rows) for reader, file, rows in READERS.values() if reader is make)
    tone("a.wav")
    put(name, [rows[0], {**rows[0], "id": "2", option: "speech"}])
    with pytest.raises(
        ConfigError, match=rf"no row whose {option} is 'musik'; did you mean 'music'\? there are music, speech"
    ):
        make(tmp_path, **{option: "musik"}).check()
    assert len(make(tmp_path, **{option: None}).held_out("test")) == 2
    assert [e["id"] for e in make(tmp_path, **{option: "Speech"}).held_out("test")] == ["2"]


def test_a_line_of_many_is_named(tmp_path, tone, put):
    tone("a.wav")
    row = json.dumps(READERS["mmau"][2][0])
    put("rows.jsonl", f"{row}\n\n{row[:-4]}\n")
    assert "rows.jsonl cannot be read as jsonl: line 3: " in refused(MMAU, tmp_path)


def test_words_behind_the_end_of_a_mix(tmp_path, tone, put):
    tone("a.wav", seconds=2)
    line = {"name": "a", "start": 0, "end": 1, "text": "la"}
    put("lyrics.json", [line, {**line, "start": 2.5, "end": 3}])
    told = refused(MUSDB18Lyrics, tmp_path)
    assert f"a-1: it begins at 2.5 s, and its audio {tmp_path / 'a.wav'} has 2 s" in told


def test_a_part_is_swapped_within_itself(tmp_path, tone, put, pieces):
    """Each note goes to another one, once, whatever the task; and the same in every part."""
    for n in range(6):
        tone(f"audio/n{n}.wav", value=n / 10)
    put("examples.json", [{**NOTE, "note_str": f"n{n}", "pitch": n} for n in range(6)])

    def levels(part):
        examples = NSynth(tmp_path, audio="swapped", seed=2).held_out("test", part)
        assert [e["id"] for e in examples] == [f"n{n}-{part}" for n in range(6)]
        return [round(float(pieces(e)[0][0]["value"].mean()) * 10) for e in examples]

    pitch = levels("pitch")
    assert sorted(pitch) == list(range(6))
    assert all(got != n for n, got in enumerate(pitch))
    assert levels("pitch") == pitch == levels("source")
