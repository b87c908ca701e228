"""Two processes equal one."""

import json
import signal

import pytest

pytestmark = pytest.mark.timeout(280)
DDP = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
FSDP = ["trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"]


def assert_close(folder, whole):
    from safetensors.torch import load_file

    for stage in ("text", "chat"):
        one, other = (load_file(f / "stages" / stage / "weights.safetensors") for f in (folder, whole))
        assert one.keys() == other.keys()
        difference = sum((one[n] - other[n]).double().pow(2).sum() for n in one) ** 0.5
        size = sum(v.double().pow(2).sum() for v in other.values()) ** 0.5
        assert difference < 1e-6 * size, stage
    numbers = [json.loads((f / "result.json").read_text())["metrics"] for f in (folder, whole)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)


def losses(folder):
    import csv

    with open(folder / "metrics.csv", newline="") as handle:
        return [(r["stage"], r["step"], float(r["train/loss"])) for r in csv.DictReader(handle)]


@pytest.fixture(scope="module")
def ddp(root, clean_env, tiny, tmp_path_factory):
    """A run on two processes, with a compared run after it."""
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("ddp") / "run"
    command = [sys.executable, str(root / "tools" / "train.py"), *tiny, *DDP, f"paths.run_dir={folder}"]
    done = subprocess.run(
        [*command, "+compare.x=['seed=1']"],
        cwd=folder.parent,
        env=clean_env(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def test_two_processes_equal_one(ddp, whole):
    folder, done = ddp
    assert_close(folder, whole)
    ours, theirs = losses(folder), losses(whole)
    assert [x[:2] for x in ours] == [x[:2] for x in theirs]
    assert [x[2] for x in ours] == pytest.approx([x[2] for x in theirs], rel=1e-5)
    # One process speaks.
    assert done.stdout.count("text 6/6") == 2  # the run's and the compared run's
    assert done.stdout.count("run folder") == 1


def test_a_compared_run_is_distributed_too(ddp):
    folder, _ = ddp
    result = json.loads((folder / "compare" / "x" / "result.json").read_text())
    assert result["seed"] == 1
    assert result["metrics"] != json.loads((folder / "result.json").read_text())["metrics"]


@pytest.mark.slow
def test_sharded_equals_one(run_tool, tiny, whole, tmp_path):
    folder = tmp_path / "run"
    done = run_tool("train", *tiny, *FSDP, f"paths.run_dir={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_close(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_a_stopped_run_on_two_processes_goes_on(root, clean_env, run_tool, tiny, whole, tmp_path, trainer):
    import subprocess
    import sys

    folder = tmp_path / "run"
    arguments = [*tiny, *trainer, f"paths.run_dir={folder}"]
    process = subprocess.Popen(
        [sys.executable, str(root / "tools" / "train.py"), *arguments],
        cwd=tmp_path,
        env=clean_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    for line in process.stdout:
        said += line
        if "text 2/6" in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143, said
    assert "the same command goes on from here" in said
    done = run_tool("train", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on from its last checkpoint" in done.stdout
    assert_close(folder, whole)


@pytest.mark.slow
def test_a_batch_that_cannot_be_divided(run_tool, tiny, tmp_path):
    done = run_tool("train", *tiny, *DDP, "recipe.batch_size=3", f"paths.run_dir={tmp_path}/run")
    assert done.returncode == 2
    assert "batch_size 3 cannot be divided over 2 processes" in done.stderr
    assert "Traceback" not in done.stderr


def test_multirun_on_many_devices_is_refused(tool, tiny, short):
    short(tool("train", *tiny, *DDP, "-m", "seed=0,1"), "start the runs one by one")
