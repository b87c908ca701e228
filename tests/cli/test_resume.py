"""Stop a run anywhere and start the same command again: every file of its result equals an unbroken run's."""

import json
import os
import shutil
import signal
import time

import pytest

FILES = ["stages/text/weights.safetensors", "stages/chat/weights.safetensors", "metrics.csv"]


def assert_same(folder, whole, files=FILES):
    for name in files:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    numbers = [json.loads((f / "result.json").read_text())["metrics"] for f in (folder, whole)]
    assert numbers[0] == numbers[1]


def kill_at(tool, line, number, *args, **options):
    """Start a run that is held at a line of its output, and send it a signal there."""
    # The child stops itself right after the line, so that the signal meets it at that very place.
    before = f"""
import builtins, os, signal
said = builtins.print
def spoken(*words, **options):
    said(*words, **options)
    if {line!r} in " ".join(map(str, words)):
        os.kill(os.getpid(), {int(number)})
builtins.print = spoken
"""
    job = tool("train", *args, before=before, **options)
    assert line in job.stdout, job.stdout + job.stderr
    return job


@pytest.mark.parametrize(
    "line",
    ["text 3/6", "text 6/6", pytest.param("chat 1/6", marks=pytest.mark.slow), "chat 2/6", "chat 6/6"],
    ids=["in stage 1", "after its last step", "first step of stage 2", "in stage 2", "after the last step"],
)
def test_killed_run_goes_on_bit_for_bit(tool, tiny, whole, tmp_path, line):
    folder = tmp_path / "run"
    killed = kill_at(tool, line, signal.SIGKILL, *tiny, f"paths.run_dir={folder}")
    assert killed.returncode == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    again = tool("train", *tiny, f"paths.run_dir={folder}")
    assert again.returncode == 0, again.stderr
    assert f"resuming {folder}" in again.stdout
    if "1/6" not in line:
        assert f"stage {line.split()[0]}: goes on from its last checkpoint" in again.stdout
        # The step before the kill was saved: at most the one that was under way is done again.
        first = next(x for x in again.stdout.splitlines() if x.startswith(line.split()[0]))
        assert int(first.split()[1].split("/")[0]) >= int(line[5])
    assert_same(folder, whole)


EXPERTS = [
    "+project=nemotron_h",
    "backbone=hybrid_moe_tiny",
    "recipe.steps=5",
    "recipe.batch_size=4",
    "recipe.micro_batch=2",
    "recipe.window=32",
    "dataset.held_out_documents=1",
    "dataset.held_out_chars=100",
    "callbacks.log_every_steps=1",
    "callbacks.save_every_steps=1",
]


def test_experts_and_their_balance_go_on_bit_for_bit(tool, tmp_path):
    """The selection bias moves after every step: it is saved, and the loads of a step that was cut off are not."""
    from safetensors.torch import load_file

    whole, folder = tmp_path / "whole", tmp_path / "run"
    done = tool("train", *EXPERTS, f"paths.run_dir={whole}")
    assert done.returncode == 0, done.stderr
    kill_at(tool, "pretrain 3/5", signal.SIGKILL, *EXPERTS, f"paths.run_dir={folder}")
    again = tool("train", *EXPERTS, f"paths.run_dir={folder}")
    assert again.returncode == 0, again.stderr
    assert "goes on from its last checkpoint" in again.stdout
    assert_same(folder, whole, ["stages/pretrain/weights.safetensors", "metrics.csv"])
    weights = load_file(folder / "stages" / "pretrain" / "weights.safetensors")
    biases = [v for n, v in weights.items() if n.endswith("e_score_correction_bias")]
    assert len(biases) == 4  # three layers and the MTP module
    assert all(b.abs().max() > 2e-3 for b in biases)
    assert "mtp_2" in (folder / "metrics.csv").read_text().splitlines()[0]


@pytest.mark.slow
def test_killed_while_checkpoints_are_rare(tool, tiny, whole, tmp_path):
    folder = tmp_path / "run"
    rare = [*(a for a in tiny if "save_every" not in a), f"paths.run_dir={folder}", "callbacks.save_every_steps=4"]
    kill_at(tool, "text 6/6", signal.SIGKILL, *rare)
    again = tool("train", *rare)
    assert again.returncode == 0, again.stderr
    assert "text 5/6" in again.stdout
    assert "text 4/6" not in again.stdout
    assert_same(folder, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(tool, tiny, whole, tmp_path, number):
    folder = tmp_path / "run"
    # Saved by time alone, so what is there afterwards was saved because of the signal.
    args = [*(a for a in tiny if "save_every" not in a), f"paths.run_dir={folder}"]
    stopped = kill_at(tool, "text 3/6", number, *args)
    assert stopped.returncode == 143
    assert stopped.stdout.strip().splitlines()[-1] == f"stopped; the same command goes on from here: {folder}"
    assert "Traceback" not in stopped.stderr
    assert float((folder / "wall_s.json").read_text()) > 0
    again = tool("train", *args)
    assert again.returncode == 0, again.stderr
    assert "text 4/6" in again.stdout
    assert "text 3/6" not in again.stdout
    assert_same(folder, whole)
    assert json.loads((folder / "result.json").read_text())["wall_s"] > float((folder / "wall_s.json").read_text())


def test_a_signal_from_outside(tool, tiny, tmp_path):
    folder = tmp_path / "run"
    args = [*tiny, f"paths.run_dir={folder}", "recipe.steps=100000"]
    job = tool.start("train", *args)
    job.wait_for("text 3/")
    job.signal(signal.SIGTERM)
    assert job.wait().returncode == 143
    assert (folder / "stages" / "text" / "last.ckpt").is_file()


def test_killed_while_it_evaluates_between_stages(tool, tiny, whole, tmp_path):
    folder = tmp_path / "run"
    before = """
import os, signal
import bestiary.shared.core.stages as stages
stages.write_json = lambda file, values: os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = tool("train", *tiny, f"paths.run_dir={folder}", before=before)
    assert killed.returncode == -signal.SIGKILL
    assert (folder / "stages" / "text" / "weights.safetensors").is_file()
    assert not (folder / "stages" / "text" / "DONE").exists()
    assert tool("train", *tiny, f"paths.run_dir={folder}").returncode == 0
    assert_same(folder, whole)


def test_killed_between_the_stages(tool, tiny, whole, tmp_path):
    folder = tmp_path / "run"
    before = """
import os, signal
import bestiary.shared.core.stages as stages
write = stages.write_json
def last_word(file, values):
    write(file, values)
    if file.name == "DONE":
        os.kill(os.getpid(), signal.SIGKILL)
stages.write_json = last_word
"""
    assert tool("train", *tiny, f"paths.run_dir={folder}", before=before).returncode == -signal.SIGKILL
    again = tool("train", *tiny, f"paths.run_dir={folder}")
    assert "stage text: done before" in again.stdout
    assert_same(folder, whole)


def test_killed_while_it_writes_a_checkpoint(tool, tiny, whole, tmp_path):
    folder = tmp_path / "run"
    before = """
import os, signal
import bestiary.shared.core.callbacks as callbacks
from lightning.pytorch import Trainer
save = Trainer.save_checkpoint
calls = []
def half(self, path, *args, **options):
    save(self, path, *args, **options)
    calls.append(path)
    if len(calls) == 4:
        data = open(path, "rb").read()
        open(path, "wb").write(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.save_checkpoint = half
"""
    assert tool("train", *tiny, f"paths.run_dir={folder}", before=before).returncode == -signal.SIGKILL
    again = tool("train", *tiny, f"paths.run_dir={folder}")
    assert again.returncode == 0, again.stderr
    assert "text 4/6" in again.stdout
    assert "text 3/6" not in again.stdout
    assert_same(folder, whole)


def test_a_row_of_metrics_that_was_cut_short(tool, tiny, whole, tmp_path):
    folder = tmp_path / "run"
    kill_at(tool, "text 6/6", signal.SIGKILL, *tiny, f"paths.run_dir={folder}")
    file = folder / "metrics.csv"
    text = file.read_text()
    file.write_text(text + "text,1")  # was to be a step beyond the last checkpoint
    assert tool("train", *tiny, f"paths.run_dir={folder}").returncode == 0
    assert_same(folder, whole)


def test_with_workers(tool, tiny, whole, tmp_path):
    folder = tmp_path / "run"
    workers = ["+recipe.stages.text.num_workers=2", "+recipe.stages.chat.num_workers=2", f"paths.run_dir={folder}"]
    kill_at(tool, "text 3/6", signal.SIGKILL, *tiny, *workers)
    again = tool("train", *tiny, *workers)
    assert again.returncode == 0, again.stderr
    assert_same(folder, whole)


@pytest.fixture(scope="module")
def fast(tiny):
    return [*tiny, "debug=fast", "resume=auto"]


def folders(runs):
    return sorted(p for p in (runs / "_examples").iterdir())


def test_auto_finds_the_unfinished_run_of_the_same_config(tool, fast, tmp_path):
    runs = tmp_path / "runs"
    kill_at(tool, "text 2/3", signal.SIGKILL, *fast, runs=runs)
    (first,) = folders(runs)

    changed = tool("train", *fast, "seed=1", runs=runs)
    assert changed.returncode == 0, changed.stderr
    assert len(folders(runs)) == 2
    assert "resuming" not in changed.stdout

    afresh = tool("train", *[a for a in fast if "resume" not in a], "resume=never", runs=runs)
    assert len(folders(runs)) == 3
    assert "text 1/3" in afresh.stdout

    # Where it is written and logged to does not make another experiment.
    again = tool("train", *fast, "logger=csv", runs=runs)
    assert f"resuming {first}" in again.stdout
    assert "text 1/3" not in again.stdout
    assert len(folders(runs)) == 3
    assert (first / "stages/chat/weights.safetensors").read_bytes() == (
        next(f for f in folders(runs) if str(f) in afresh.stdout) / "stages/chat/weights.safetensors"
    ).read_bytes()

    # All are finished now: the next one begins a new run.
    tool("train", *fast, runs=runs)
    assert len(folders(runs)) == 4


@pytest.mark.slow
def test_resume_names_a_folder(tool, tiny, whole, tmp_path, short):
    folder = tmp_path / "elsewhere" / "run"
    kill_at(tool, "text 3/6", signal.SIGKILL, *tiny, f"paths.run_dir={folder}")
    again = tool("train", *tiny, f"resume={folder}")
    assert again.returncode == 0, again.stderr
    assert_same(folder, whole)
    short(tool("train", *tiny, f"resume={tmp_path}/nowhere"), "nowhere", "no run")
    assert not (tmp_path / "nowhere").exists()


def test_another_config_in_the_same_folder_is_refused(tool, tiny, whole, tmp_path, short):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy)
    os.unlink(copy / "result.json")
    short(tool("train", *tiny, "seed=1", f"paths.run_dir={copy}"), str(copy), "another configuration")


def test_a_finished_run_is_not_run_again(tool, tiny, whole):
    before = {p: p.stat().st_mtime_ns for p in (whole / "stages").rglob("*")}
    again = tool("train", *tiny, f"paths.run_dir={whole}")
    assert again.returncode == 0
    assert f"this run is finished: {whole}" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in (whole / "stages").rglob("*")} == before


def test_two_at_once_do_not_share_a_folder(tool, fast, tmp_path, short):
    runs = tmp_path / "runs"
    long = [*(a for a in fast if "debug" not in a), "recipe.steps=100000"]
    first = tool.start("train", *long, runs=runs)
    first.wait_for("text 2/")
    second = tool.start("train", *long, runs=runs)
    second.wait_for("text 2/")
    assert len(folders(runs)) == 2
    folder = next(f for f in folders(runs) if str(f) in first.stdout)
    short(tool("train", *long, f"paths.run_dir={folder}", runs=runs), "another process is writing this run")
    for job in (first, second):
        job.signal(signal.SIGKILL)
        job.wait()
    # The lock goes with the process.
    third = tool.start("train", *long, runs=runs)
    third.wait_for("resuming")
    third.signal(signal.SIGKILL)
    third.wait()


def test_a_full_disk_keeps_the_checkpoint_before(tool, tiny, whole, tmp_path):
    folder = tmp_path / "run"
    before = """

import lightning.fabric.plugins.io.torch_io as io
save = io._atomic_save
calls = []
def full(checkpoint, path):
    calls.append(path)
    if len(calls) == 4:
        raise OSError(28, "No space left on device", str(path))
    return save(checkpoint, path)
io._atomic_save = full
"""
    job = tool("train", *tiny, f"paths.run_dir={folder}", before=before)
    assert job.returncode == 2, job.stderr
    assert len(job.answer.splitlines()) == 1
    assert "disk is full" in job.answer
    assert tool("train", *tiny, f"paths.run_dir={folder}").returncode == 0
    assert_same(folder, whole)


def test_a_full_disk_at_the_end_of_a_stage(tool, tiny, whole, tmp_path):
    folder = tmp_path / "run"
    # What safetensors raises on a full disk.
    before = """
import bestiary.shared.core.checkpoint as checkpoint
def full(model, path, *_):
    open(path, "wb").write(b"half")
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    raise checkpoint.SafetensorError(text)
checkpoint.save_model = full
"""
    job = tool("train", *tiny, f"paths.run_dir={folder}", before=before)
    assert job.returncode == 2, job.stderr
    assert len(job.answer.splitlines()) == 1
    assert "disk is full" in job.answer
    # What was half written does not keep the disk full.
    assert not list((folder / "stages" / "text").glob(".weights*"))
    assert tool("train", *tiny, f"paths.run_dir={folder}").returncode == 0
    assert_same(folder, whole)


@pytest.mark.slow
def test_wall_time_adds_up_over_processes(tool, tiny, tmp_path):
    folder = tmp_path / "run"
    began = time.monotonic()
    kill_at(tool, "chat 2/6", signal.SIGTERM, *tiny, f"paths.run_dir={folder}")
    tool("train", *tiny, f"paths.run_dir={folder}")
    spent = time.monotonic() - began
    first = float((folder / "wall_s.json").read_text())
    total = json.loads((folder / "result.json").read_text())["wall_s"]
    assert first < total <= spent + 0.1
