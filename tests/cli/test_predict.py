"""tools/predict.py: prompts from files, answers in a file, and one message for each kind of bad input."""

import json
import shutil

import pytest


@pytest.fixture(scope="module")
def copy(whole, tmp_path_factory):
    """A stage folder alone: no run above it, no data."""
    folder = tmp_path_factory.mktemp("moved") / "weights, of mine"
    shutil.copytree(whole / "stages" / "chat", folder)
    return folder


def test_several_files(tool, copy, tmp_path):
    (tmp_path / "a.txt").write_text("say apple bread\nupper chair dance\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "swap eagle flame"}\n')
    job = tool("predict", f"checkpoint={copy}", "inputs=a.txt,b.jsonl", cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    assert job.stdout.strip() == str(tmp_path / "predictions" / "answers.jsonl")
    answers = [json.loads(line) for line in (tmp_path / "predictions" / "answers.jsonl").read_text().splitlines()]
    assert [a["prompt"] for a in answers] == ["say apple bread", "upper chair dance", "swap eagle flame"]
    assert all(set(a) == {"prompt", "answer"} for a in answers)


def test_out_and_the_runs_own_answers(tool, whole, tmp_path):
    """The answers to the prompts of the run's report are those of the report."""
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": s["prompt"]}) + "\n" for s in samples))
    job = tool("predict", f"checkpoint={whole}", f"inputs={file}", f"out={tmp_path}/deep/out", "device=cpu")
    assert job.returncode == 0, job.stderr
    answers = [json.loads(line) for line in (tmp_path / "deep" / "out" / "answers.jsonl").read_text().splitlines()]
    assert [a["answer"] for a in answers] == [s["answer"] for s in samples]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, ["none.txt: there is no such file"]),
        ("a.txt", "\n", ["a.txt has no prompt in it"]),
        ("a.png", "x", ["a.png: prompts come from .txt"]),
        ("a.jsonl", "{", ["a.jsonl: every line must be JSON"]),
        ("a.jsonl", '{"prompt": 3}', ["a.jsonl: every line must be JSON"]),
    ],
)
def test_bad_inputs(tool, copy, short, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    short(tool("predict", f"checkpoint={copy}", f"inputs={tmp_path / name}", cwd=tmp_path), *words, lines=1)
    assert not (tmp_path / "predictions").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inputs=x.txt"], ["checkpoint= is missing"]),
        (["checkpoint=x"], ["inputs= is missing"]),
        (["checkpoint=/nowhere", "inputs=x.txt"], ["/nowhere: no checkpoint there"]),
        (["checkpoint=x", "input=x.txt"], ["no key 'input'", "did you mean 'inputs'"]),
        (["checkpoint=x", "dataset.root=x"], ["no key 'dataset.root'"]),
    ],
)
def test_short_answers(tool, short, arguments, words):
    short(tool("predict", *arguments), *words)


def test_paths_are_cut_at_commas_unless_they_exist_with_them(tmp_path, monkeypatch):
    from bestiary.shared.core.command_line import split_paths

    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c,d,e.txt", "c"):
        (tmp_path / name).write_text("x")
    assert split_paths("x.txt,y.txt") == ["x.txt", "y.txt"]
    assert split_paths("a,b.txt") == "a,b.txt"
    assert split_paths("x.txt,a,b.txt,c,d,e.txt") == ["x.txt", "a,b.txt", "c,d,e.txt"]
    assert split_paths("c,d.txt") == ["c", "d.txt"]
    assert split_paths("x.txt,") == ["x.txt", ""]
