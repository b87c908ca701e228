"""From a folder to questions: what comes of it, and what an interruption does."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from bestiary.shared.core.errors import UserError
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.audio_qa import AudioQAJsonl
from bestiary.shared.music import pipeline as module
from bestiary.shared.music.endpoint import EndpointError
from bestiary.shared.music.pipeline import STAGES
from bestiary.shared.music.write import Item, TemplateWriter, Written, template_thoughts

soundfile = pytest.importorskip("soundfile")
REAL = module.extract
NAMES = ["a.wav", "b.wav", "below/e.wav", "c d.wav", "é.wav"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch, lab):
    monkeypatch.setattr(module, "extract", lab.quick)


@pytest.fixture
def only_threads(monkeypatch):
    """Stage 2 in threads too: a process of its own would not know the extractor of this test."""
    monkeypatch.setattr(module, "_processes", module.ThreadPoolExecutor)


def refuse(*args):
    raise AssertionError(f"this was done already: {args}")


def thinker(record, item, captions):
    return template_thoughts(record)


# ------------------------------------------------------------------ what comes of it


def test_a_whole_run_on_music_that_is_measured(lab, synth, tmp_path, monkeypatch):
    """The key of the cadences that are played is the answer, and the data set reads what is written."""
    pytest.importorskip("librosa")
    monkeypatch.setattr(module, "extract", REAL)
    keys = {
        "one.wav": (2, "major", "D major"),
        "two.flac": (9, "minor", "A minor"),
        "deep/three.wav": (7, "major", "G major"),
    }
    for name, (tonic, mode, _) in keys.items():
        (tmp_path / "music" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "music" / name, synth.cadences(tonic, mode, 2)[0], synth.rate)
    (tmp_path / "music" / "one.json").write_text('{"Meter": "4/4", "Genre": ["march", "hymn"]}')
    (tmp_path / "music" / "one.txt").write_text(" ".join(f"word{n}" for n in range(20)))
    out = tmp_path / "out"
    report = lab.run(tmp_path / "music", out, thinker=thinker)
    made = lab.rows(out / "audio_qa.jsonl")
    assert {row["audio"] for row in made} == {f"../music/{name}" for name in keys}
    for row in made:
        assert row["meta"]["Key"] == keys[row["id"].split("#")[0]][2]
        if row["question"] == "What is the key?":
            assert row["answer"] == row["meta"]["Key"]
    assert sum(row["question"] == "What is the key?" for row in made) == 3
    (words,) = (row for row in made if row["task"] == "lyrics")
    assert words["answer"] == "word0 word1 word2 word3"
    assert report.files == 3
    assert sum(report.made.values()) == report.thoughts == len(made)
    source = AudioQAJsonl(str(out / "audio_qa.jsonl"))
    source.check()
    example = source.train_example(0, Stream(0, "x"))
    assert len(example["messages"][0]["content"][0]["value"]) == pytest.approx(16000 * 8, abs=2)
    thought = source.train_example(0, Stream(0, "x"), "think")["answer"]
    assert re.fullmatch(r"<think>.+</think><answer>.+</answer>", thought, re.DOTALL)


def test_rows_are_in_the_order_of_names_whoever_is_done_first(lab, music, tmp_path, only_threads):
    def slow_for_some(record, captions, name):
        time.sleep(0.05 if name in ("a.wav", "c d.wav") else 0)
        return TemplateWriter()(record, captions, name)

    lab.run(music, tmp_path / "one", thinker=thinker)
    lab.run(music, tmp_path / "four", slow_for_some, thinker=thinker, workers=4)
    one, four = ((tmp_path / name / "audio_qa.jsonl").read_bytes() for name in ("one", "four"))
    assert one == four
    assert [row["id"] for row in lab.rows(tmp_path / "one" / "kept.jsonl")] == NAMES
    assert [row["id"] for row in lab.rows(tmp_path / "four" / "written.jsonl")] != NAMES


@pytest.mark.slow
def test_processes_measure_what_one_does(lab, music, tmp_path, monkeypatch):
    """In processes of their own the true extractor works: of a pure tone it says the same as here."""
    pytest.importorskip("librosa")
    monkeypatch.setattr(module, "extract", REAL)
    lab.run(music, tmp_path / "one")
    lab.run(music, tmp_path / "two", workers=2)
    one, two = ({row["id"]: row for row in lab.rows(tmp_path / name / "metadata.jsonl")} for name in ("one", "two"))
    assert one == two


def test_initial_captions_are_of_half_minutes(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_S", 2.0)
    lab.tone(tmp_path / "music" / "long.wav", 4.5)
    lab.tone(tmp_path / "music" / "longer.wav", 5.2)
    lab.tone(tmp_path / "music" / "short.wav", 0.5)
    heard, told = [], {}

    def listen(samples, rate):
        heard.append((len(samples) / rate, rate))
        return f"part of {len(samples) / rate:.1f} s"

    def write(record, captions, name):
        told[name] = list(captions)
        return Written([Item("caption", "Describe.", "Calm.")])

    judged = []
    lab.run(tmp_path / "music", tmp_path / "out", write, listener=listen,
        judge=lambda item, record, captions: judged.append(list(captions)),
        thinker=lambda record, item, captions: " ".join(captions))  # fmt: skip
    assert told == {
        "long.wav": ["part of 2.0 s", "part of 2.0 s"],
        "longer.wav": ["part of 2.0 s", "part of 2.0 s", "part of 1.2 s"],
        "short.wav": ["part of 0.5 s"],
    }
    assert {rate for _, rate in heard} == {16000}
    assert judged == list(told.values())
    assert lab.rows(tmp_path / "out" / "audio_qa.jsonl")[2]["think"] == "part of 0.5 s"


def test_what_is_dropped_is_counted_and_thoughts_are_checked(lab, music, tmp_path):
    """Of five pieces: a wrong caption, a judged question, wrong thoughts, none, and good ones that are mended."""
    wrong = "In 4/4. In 2/4. It goes on."
    chains = {"a.wav": wrong, "b.wav": None, "c d.wav": "In 4/4. It goes on. It goes on. It ends."}

    def write(record, captions, name):
        caption = "In D major." if name == "é.wav" else f"This is {name}."
        return Written([Item("caption", "Describe.", caption)], Counter({"question: not asked": 2}))

    report = lab.run(
        music,
        tmp_path / "out",
        write,
        judge=lambda item, record, captions: "too low" if "below" in item.answer else None,
        thinker=lambda record, item, captions: chains[item.answer.removeprefix("This is ")[:-1]],
    )
    assert report.made == {"caption": 3}
    assert report.thoughts == 1
    assert report.dropped == {
        "question: not asked": 10,
        "caption: contradicts Key": 1,
        "caption: too low": 1,
        "thoughts: too many wrong steps": 1,
        "thoughts: none": 1,
    }
    think = {row["id"]: row.get("think") for row in lab.rows(tmp_path / "out" / "audio_qa.jsonl")}
    assert think == {"a.wav#0": None, "b.wav#0": None, "c d.wav#0": "In 3/4. It goes on. It goes on. It ends."}
    text = str(report)
    assert "5 audio files, 0 of them unusable\n3 rows made: 3 caption\n1 of them with thoughts" in text
    assert text.endswith(f"dataset=audio_qa_jsonl dataset.path={tmp_path / 'out' / 'audio_qa.jsonl'}")


def test_a_run_that_made_nothing_says_so(lab, music, tmp_path):
    """The data set would refuse the file."""
    report = lab.run(music, tmp_path / "out", lambda *args: Written(dropped=Counter({"caption: not JSON": 1})))
    assert str(report) == (
        "5 audio files, 0 of them unusable\n0 rows made\n5 dropped: caption: not JSON\n"
        f"{tmp_path / 'out' / 'audio_qa.jsonl'} is empty: there is nothing to train on"
    )


# ------------------------------------------------------------------ interruptions


def test_what_is_done_is_not_done_again(lab, music, tmp_path, monkeypatch):
    lab.run(music, tmp_path / "out", listener=lambda samples, rate: "soft")
    whole = (tmp_path / "out" / "audio_qa.jsonl").read_bytes()
    (tmp_path / "out" / "audio_qa.jsonl").unlink()
    monkeypatch.setattr(module, "extract", refuse)
    lab.run(music, tmp_path / "out", refuse, listener=refuse, judge=refuse, thinker=refuse)
    assert (tmp_path / "out" / "audio_qa.jsonl").read_bytes() == whole


def test_music_that_comes_later_is_added(lab, music, tmp_path):
    lab.run(music, tmp_path / "out")
    before = {stage: (tmp_path / "out" / f"{stage}.jsonl").read_bytes() for stage in STAGES[1:]}
    lab.tone(music / "aa.wav")
    (music / "b.wav").unlink()
    done = []

    def write(record, captions, name):
        done.append(name)
        return TemplateWriter()(record, captions, name)

    report = lab.run(music, tmp_path / "out", write)
    assert done == ["aa.wav"]
    assert report.files == 5
    assert all((tmp_path / "out" / f"{s}.jsonl").read_bytes().startswith(old) for s, old in before.items())
    ids = {row["id"].split("#")[0] for row in lab.rows(tmp_path / "out" / "audio_qa.jsonl")}
    assert ids == {"a.wav", "aa.wav", "below/e.wav", "c d.wav", "é.wav"}


def slowly(lab, music, out, log):
    """A run in a process that is to be killed: every step takes a while, and is written down when it begins."""

    def noting(stage, work):
        def step(*args):
            name = next(str(a) for a in reversed(args) if isinstance(a, str | Path) and str(a).endswith(".wav"))
            with open(log, "a") as handle:
                handle.write(f"{stage} {name.removeprefix(f'{music}/')}\n")
            time.sleep(0.05)
            return work(*args)

        return step

    module.extract = noting("metadata", lambda path, tools: lab.quick(path))
    lab.run(music, out, noting("written", TemplateWriter()), thinker=thinker)


def test_a_run_that_is_killed_goes_on(lab, music, tmp_path):
    """Killed nine times, wherever that is: of each killing at most the step that was under way is done again."""
    out, log = tmp_path / "out", tmp_path / "log"
    log.touch()
    fork = multiprocessing.get_context("fork")
    kills = 0
    for steps in range(1, 30):
        before = {stage: (out / f"{stage}.jsonl") for stage in ("metadata", "written")}
        done = {f"{s} {row['id']}" for s, file in before.items() if file.exists() for row in whole_rows(file)}
        seen = len(log.read_text().splitlines())
        process = fork.Process(target=slowly, args=(lab, music, out, log))
        process.start()
        while process.is_alive() and (steps > 9 or len(log.read_text().splitlines()) - seen < 1 + steps % 2):
            time.sleep(0.002)
        if process.is_alive():
            time.sleep(0.01 * (steps % 7))
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        again = set(log.read_text().splitlines()[seen:])
        assert not again & done
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills > 4
    steps = Counter(log.read_text().splitlines())
    assert set(steps) == {f"{stage} {name}" for stage in ("metadata", "written") for name in NAMES}
    assert sum(steps.values()) <= 10 + kills
    lab.run(music, tmp_path / "whole", thinker=thinker)
    for name in ("written.jsonl", "kept.jsonl", "audio_qa.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def whole_rows(file):
    text = file.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("cut", [1, 10])
def test_a_torn_last_line_is_done_again(lab, music, tmp_path, stage, cut):
    listen = {"listener": lambda samples, rate: "soft"}
    lab.run(music, tmp_path / "whole", **listen)
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    file = tmp_path / "out" / f"{stage}.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    heard = []
    lab.run(music, tmp_path / "out", listener=lambda samples, rate: heard.append(1) or "soft")
    assert len(heard) == (stage == "captions")
    for name in [*(f"{stage}.jsonl" for stage in STAGES), "audio_qa.jsonl"]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_of_the_model_ends_the_run_and_loses_nothing(lab, music, tmp_path, workers, only_threads):
    lock, answered = threading.Lock(), []

    def write(record, captions, name):
        with lock:
            if len(answered) == 3:
                raise EndpointError("no answer")
            answered.append(name)
        return TemplateWriter()(record, captions, name)

    with pytest.raises(EndpointError, match="no answer"):
        lab.run(music, tmp_path / "out", write, workers=workers)
    file = tmp_path / "out" / "written.jsonl"
    # With several threads the error may come before anything that was answered is on the disk.
    written = [row["id"] for row in lab.rows(file)] if workers == 1 or file.exists() else []
    assert set(written) <= set(answered)
    assert workers > 1 or len(written) == 3
    done = []
    lab.run(music, tmp_path / "out", lambda *args: done.append(args[2]) or TemplateWriter()(*args))
    assert sorted(written + done) == sorted(NAMES)


def test_a_worker_that_dies(lab, music, tmp_path, monkeypatch):
    """As one that takes too much memory is killed."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "dying_extractor.py").write_text(
        "import os, signal\n"
        "def measured(path, tools):\n"
        "    if path.endswith('c d.wav'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return {'stamp': '', 'record': {'seconds': 1.0}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "code")
    import dying_extractor  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(module, "_measured", dying_extractor.measured)
    with pytest.raises(UserError, match=r"a worker died.*fewer --workers"):
        lab.run(music, tmp_path / "out", workers=2)


def test_workers_end_with_a_run_that_is_killed(root, clean_env):
    """Otherwise they would wait for work for ever."""
    code = (
        "import os, time\n"
        "from bestiary.shared.music.pipeline import _processes\n"
        "if __name__ == '__main__':\n"
        "    print(_processes(1).submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    env = clean_env(PYTHONPATH=str(root / "src"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, text=True)
    worker = int(process.stdout.readline())
    assert Path(f"/proc/{worker}").exists()
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < end, "the worker lives on"
        time.sleep(0.05)
