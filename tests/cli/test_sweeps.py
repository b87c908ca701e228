"""A sweep's trial as W&B's agent starts it, offline: the metric, the ids and the parameters reach the run's files."""

from __future__ import annotations

import csv
import json
import struct

import pytest

from bestiary.shared.results.sweeps import corners, read_sweep, render

SMALL = ["debug=fast", "dataset.downsample=4", "model.sw_overlap=0", "callbacks.log_every_steps=1"]


def records(file):
    """The records of W&B's file of an offline run: LevelDB's log format, 32 KiB blocks, after 7 bytes of W&B's own."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    place, parts = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@pytest.fixture(scope="module")
def trial(root, tool, tmp_path_factory, need_asset):
    """One trial with what the agent sets, and the values it was given."""
    pytest.importorskip("wandb")
    need_asset("icbm152")
    folder = tmp_path_factory.mktemp("agent")
    sweep = read_sweep(root / "conf" / "sweeps" / "asm_unet_lr.yaml")
    values = corners(sweep)[1]
    assert values["backbone"] == "none"
    params = folder / "config-trial42x.yaml"
    params.write_text("wandb_version: 1\n\n" + "".join(f"{k}:\n  value: {json.dumps(v)}\n" for k, v in values.items()))
    words = render(sweep.command, str(root / "tools" / "train.py"), values)
    assert words[:2] == ["/usr/bin/env", "python"]
    env = {
        "WANDB_MODE": "offline",
        "WANDB_SWEEP_ID": "sweep7y",
        "WANDB_RUN_ID": "trial42x",
        "WANDB_SWEEP_PARAM_PATH": str(params),
    }
    # The fork of a server that has imported everything stands for `env python tools/train.py`.
    job = tool("train", *words[3:], *SMALL, runs=folder / "runs", env=env)
    assert job.returncode == 0, job.stdout + job.stderr
    (run,) = (folder / "runs" / "asm_unet").iterdir()
    return run, values, sweep


def test_the_agents_run_id_reaches_the_folder(trial):
    run, _, _ = trial
    assert run.name.endswith("_trial42x")
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert offline.name.endswith("-trial42x")


def test_the_swept_metric_is_logged_under_its_name(trial):
    run, _, sweep = trial
    with (run / "metrics.csv").open(newline="") as file:
        logged = [row for row in csv.DictReader(file) if row[sweep.metric]]
    assert len(logged) == 1  # once per evaluation, and debug=fast makes one
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(file)
        if record.WhichOneof("record_type") == "history"
    ]
    sent = [line[sweep.metric] for line in history if sweep.metric in line]
    assert sent == pytest.approx([float(logged[0][sweep.metric])], rel=1e-6)


def test_sweep_id_and_parameters_reach_the_runs_file(trial):
    run, values, _ = trial
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    (head,) = [record.run for record in records(file) if record.WhichOneof("record_type") == "run"]
    assert (head.run_id, head.sweep_id) == ("trial42x", "sweep7y")
    config = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in head.config.update}
    # A group that is swept has the name that was chosen, not the node of the same key in the config.
    assert {name: config[name] for name in values} == values
    assert config["recipe"]["lr"] == values["recipe.lr"]


def test_a_trial_that_fails_says_so(root, tool, tmp_path, short):
    sweep = read_sweep(root / "conf" / "sweeps" / "asm_unet_lr.yaml")
    words = render(sweep.command, "train.py", {"recipe.lrr": 1})
    short(tool("train", *words[3:], runs=tmp_path / "runs", env={"WANDB_RUN_ID": "a"}), "did you mean 'lr'")
