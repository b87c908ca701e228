"""Every file of conf/sweeps can be used by W&B and by tools/sweep_local.py alike."""

from __future__ import annotations

import itertools

import pytest
import yaml

from bestiary.shared.core.config import compose, conf_dir, options
from bestiary.shared.core.runs import Run, open_run
from bestiary.shared.results.sweeps import corners, read_sweep, render, trials

FILES = sorted((conf_dir() / "sweeps").glob("*.yaml"))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def sweep(request):
    return read_sweep(request.param)


def overrides(sweep, values):
    words = render(sweep.command, "PROGRAM", values)
    return words[words.index("PROGRAM") + 1 :]


def test_there_are_sweeps():
    assert FILES


def test_a_sweep_names_what_exists(sweep, root):
    assert (root / sweep.program).is_file()
    assert sweep.run_cap is not None or sweep.method == "grid"
    assert "logger=wandb" in sweep.command
    (project,) = [item.partition("=")[2] for item in sweep.command if item.startswith("+project=")]
    metafile = yaml.safe_load((root / "projects" / project / "metafile.yaml").read_text(encoding="utf-8"))
    assert sweep.metric in {f"val/{name}" for name in metafile["metrics"]}
    lines = sweep.path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(f"# {sweep.path.stem}: ")


def test_groups_that_are_swept_stand_in_the_defaults(sweep):
    text = yaml.safe_load((conf_dir() / "train.yaml").read_text(encoding="utf-8"))
    groups = {key for entry in text["defaults"] if isinstance(entry, dict) for key in entry if " " not in key}
    for parameter in sweep.parameters:
        if "." not in parameter.name and (conf_dir() / parameter.name).is_dir():
            assert parameter.name in groups
            assert set(parameter.grid() or []) <= set(options(parameter.name))


def test_corners_and_trials_compose(sweep):
    some = list(itertools.islice(trials(sweep), 4))
    for values in [*corners(sweep), *some]:
        cfg, choices = compose(overrides(sweep, values))
        assert cfg.logger.wandb.id is None  # so that the agent's WANDB_RUN_ID is used
        for name, value in values.items():
            if name in choices:
                assert choices[name] == value
            else:
                node = cfg
                for part in name.split("."):
                    node = node[part]
                assert node == value


def test_a_trial_on_the_agents_id_has_a_folder_of_that_name(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "trial42x")
    monkeypatch.delenv("BESTIARY_RUN_DIR", raising=False)
    words = [*overrides(sweep, corners(sweep)[0]), f"paths.runs={tmp_path}"]
    run: Run = open_run(*compose(words), words)
    run.close()
    monkeypatch.delenv("BESTIARY_RUN_DIR")
    assert run.folder.name.endswith("_trial42x")


def test_wandb_renders_the_same(sweep, monkeypatch):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils", reason="W&B's own renderer is not here")
    monkeypatch.setenv("SOME_NAME", "some value")
    command = [*sweep.command[:-1], "a=${envvar:SOME_NAME}-${envvar:NOT_THERE}", "x${env}", sweep.command[-1]]
    tricky = {"a.b": [1, 2], "c": 1e-05, "d": True, "e": "two words", "f": 3}
    for values in [*corners(sweep), tricky]:
        # What the agent does (wandb/wandb_agent.py) with what these two give.
        words = utils.create_sweep_command(list(command))
        macros = utils.create_sweep_command_args({"args": {name: {"value": v} for name, v in values.items()}})
        macros |= {"interpreter": ["python"], "program": ["tools/train.py"], "env": ["/usr/bin/env"]}
        theirs = []
        for word in words:
            theirs += macros[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
        assert render(command, "tools/train.py", values) == theirs
