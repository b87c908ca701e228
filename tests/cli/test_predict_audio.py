"""tools/predict.py with a model that hears, trained for a step: files as people have them, one message each."""

import json
import shutil

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
FIELDS = ["instrument", "time_signature", "metre", "key_signature", "key", "tempo", "texture"]
ODD = "Música, 音楽 №1 (take 2).FLAC"


def tone(path, seconds: float = 0.5, rate: int = 16000, hertz: float = 440.0) -> None:
    """A file in the format that its ending says."""
    samples = 0.1 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    soundfile.write(path, samples, rate, format=path.suffix[1:].upper())


@pytest.fixture(scope="module")
def hears(tool, tmp_path_factory):
    """A stage folder alone, away from its run and its data. Its clips are cut at 12 s."""
    folder = tmp_path_factory.mktemp("hears")
    for name in ("train", "test"):
        tone(folder / f"{name}.wav")
    rows = [
        {"audio": f"{name}.wav", "question": "What is the key?", "answer": "C", "split": name}
        for name in ("train", "test")
    ]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = tool(
        "train",
        "+project=music_flamingo",
        "recipe=af3_sft",
        "recipe.run=[projector]",
        "recipe.steps=1",
        "recipe.batch_size=1",
        "recipe.max_new_tokens=2",
        "dataset=audio_qa_jsonl",
        f"dataset.path={folder / 'qa.jsonl'}",
        "encoder.front_end.max_seconds=12",
        "encoder.width=32",
        "encoder.ffn=32",
        "encoder.layers=1",
        "backbone.config.num_hidden_layers=1",
        f"paths.run_dir={folder / 'run'}",
    )
    assert job.returncode == 0, job.stdout + job.stderr
    shutil.copytree(folder / "run" / "stages" / "projector", folder / "stage")
    return folder / "stage"


def records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_folder_of_several_formats_with_other_files_in_it(tool, hears, tmp_path):
    music = tmp_path / "my music"
    (music / "below" / "folder.wav").mkdir(parents=True)
    for name in ("a.wav", "b.mp3", "below/c.flac"):
        tone(music / name, rate=22050)
    tone(music / ODD, rate=48000)
    (music / "notes.txt").write_text("not audio")
    (music / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    job = tool("predict", f"checkpoint={hears}", f"inputs={music}", "facts=true", "max_new_tokens=3", cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    assert job.stdout.strip() == str(tmp_path / "predictions" / "facts.jsonl")
    found = records(tmp_path / "predictions" / "facts.jsonl")
    assert {row["audio"] for row in found} == {str(music / n) for n in ("a.wav", "b.mp3", "below/c.flac", ODD)}
    for row in found:
        assert list(row) == ["audio", *FIELDS, "said"]
        assert all(row[name] is None or (isinstance(row[name], str) and row[name]) for name in FIELDS)
        assert list(row["said"]) == FIELDS
        assert all(isinstance(text, str) for text in row["said"].values())


def test_one_question_of_several_files(tool, hears, tmp_path):
    for name in ("a.wav", "b.mp3", "c d.flac"):
        tone(tmp_path / name)
    (tmp_path / "own.jsonl").write_text('{"audio": "a.wav", "question": "Who plays?"}\n\n{"audio": "b.mp3"}\n')
    files = ["a.wav", "b.mp3", "c d.flac", "own.jsonl"]
    asked = "Is it in 3/4, or in ${x}?"
    arguments = [f"inputs={','.join(files)}", f"question={asked}", "facts=false", "max_new_tokens=3", "out=deep/out"]
    job = tool("predict", f"checkpoint={hears}", *arguments, cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    found = records(tmp_path / "deep" / "out" / "answers.jsonl")
    assert [(row["audio"], row["question"]) for row in found] == [
        *((name, asked) for name in files[:3]),
        ("a.wav", "Who plays?"),
        ("b.mp3", asked),
    ]
    for row in found:
        assert list(row) == ["audio", "question", "answer", "thoughts"]
        assert isinstance(row["answer"], str)
        assert row["thoughts"] is None or isinstance(row["thoughts"], str)


def test_without_a_question_and_again(tool, hears, tmp_path):
    """The model's own question; the same command writes the same file, not a second one behind it."""
    tone(tmp_path / "a.wav")
    written = []
    for _ in range(2):
        job = tool("predict", f"checkpoint={hears}", "inputs=a.wav", "question=null", "max_new_tokens=3", cwd=tmp_path)
        assert job.returncode == 0, job.stderr
        written.append((tmp_path / "predictions" / "answers.jsonl").read_bytes())
    assert written[0] == written[1]
    [row] = records(tmp_path / "predictions" / "answers.jsonl")
    assert row["question"] == "Describe this music."


def test_a_clip_over_the_longest_is_cut_and_named(tool, hears, tmp_path):
    tone(tmp_path / "long.wav", 15)
    job = tool("predict", f"checkpoint={hears}", "inputs=long.wav", "max_new_tokens=3", cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    assert "long.wav has 15 s, and the model hears the first 12 s" in job.stderr
    assert len(records(tmp_path / "predictions" / "answers.jsonl")) == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.wav", None, ["none.wav: there is no such file"]),
        ("text.wav", b"not audio", ["text.wav cannot be read as audio"]),
        ("empty.mp3", b"", ["empty.mp3 cannot be read as audio"]),
        ("film.mp4", b"\0\0\0\x18ftypmp42", ["film.mp4 cannot be read as audio"]),
        ("notes.txt", b"hello", ["notes.txt cannot be read as audio"]),
        ("folder/notes.txt", b"hello", ["no audio file in", "folder", ".wav, .flac, .mp3"]),
        ("folder/text.flac", b"not audio", ["folder/text.flac cannot be read as audio"]),
    ],
)
def test_what_cannot_be_heard(tool, hears, short, tmp_path, name, content, words):
    file = tmp_path / name
    if content is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    given = file.parent if name.startswith("folder") else file
    short(tool("predict", f"checkpoint={hears}", f"inputs={given}", cwd=tmp_path), *words, lines=1)
    assert not (tmp_path / "predictions").exists()


def test_a_file_without_samples(tool, hears, short, tmp_path):
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 16000)
    job = tool("predict", f"checkpoint={hears}", "inputs=nothing.wav", cwd=tmp_path)
    short(job, "nothing.wav has no samples", lines=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inputs=a.wav", "facts=true", "question=Who plays?"], ["facts=true asks its own questions"]),
        (["inputs=a.wav", "facts=maybe"], ["facts is true or false, not 'maybe'"]),
        (["inputs=a.wav", "max_new_tokens=0"], ["max_new_tokens is a whole number, 1 or more, not '0'"]),
        (["inputs=a.wav", "max_new_tokens=many"], ["max_new_tokens is a whole number, 1 or more, not 'many'"]),
        (["inputs=a.wav", "question="], ["question= is empty"]),
        (["inputs=a.wav", "out=a.wav"], ["a.wav: File exists"]),
        (["inputs=a.wav,"], ["inputs= holds an empty path"]),
        (["inputs="], ["inputs= holds an empty path"]),
        (["inputs=q.jsonl", "facts=true"], ["q.jsonl brings its own questions"]),
    ],
)
def test_careless_options(tool, hears, short, tmp_path, arguments, words):
    tone(tmp_path / "a.wav")
    (tmp_path / "q.jsonl").write_text('{"audio": "a.wav"}\n')
    short(tool("predict", f"checkpoint={hears}", *arguments, cwd=tmp_path), *words, lines=1)
    assert not (tmp_path / "predictions").exists()


def test_a_model_without_ears_is_asked_no_question(tool, whole, short, tmp_path):
    job = tool("predict", f"checkpoint={whole}", "inputs=a.wav", "question=Who plays?", cwd=tmp_path)
    short(job, "has no argument 'question'", lines=1)
