"""init_from starts from another run's weights, and refuses a net or data that are not this run's."""

import json

import pytest

LM = [
    *("+project=_examples", "debug=fast", "dataset.held_out_chats=2", "backbone.config.num_hidden_layers=1"),
    *("recipe.run=[text]", "dataset.window=64"),
]


@pytest.fixture(scope="module")
def first(tool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("init") / "first"
    done = tool("train", *LM, f"paths.run_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def test_the_structure_is_of_the_new_run(tool, first, tmp_path):
    done = tool("train", *LM, "seed=5", f"init_from={first}", f"paths.run_dir={tmp_path / 'second'}")
    assert done.returncode == 0, done.stderr
    structure = json.loads((tmp_path / "second" / "stages" / "text" / "structure.json").read_text())
    assert "seed=5" in structure["overrides"]


def test_another_net_is_refused_before_a_folder_is_made(tool, first, tmp_path):
    done = tool(
        "train", *LM, "backbone.config.hidden_size=64", f"init_from={first}", f"paths.run_dir={tmp_path / 'no'}"
    )
    assert done.returncode == 2
    assert "backbone.config.hidden_size: 96 -> 64" in done.stderr
    assert not (tmp_path / "no").exists()


def test_eval_changes_one_value_and_keeps_the_stored_rest(tool, first, tmp_path):
    """A value edited in the stored config is used, whatever else is overridden."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    config = copy / "config.yaml"
    text = config.read_text()
    assert "window: 256" in text
    config.write_text(text.replace("window: 256", "window: 32"))  # the protocol's
    plain = tool("eval_model", f"checkpoint={copy}", "split=val")
    changed = tool("eval_model", f"checkpoint={copy}", "split=val", "dataset.held_out_chats=1")
    assert plain.returncode == changed.returncode == 0, plain.stderr + changed.stderr

    def bits(done):
        return next(line for line in done.stdout.splitlines() if line.startswith("val/bits_per_byte"))

    assert bits(plain) == bits(changed)
    assert bits(plain) != bits(tool("eval_model", f"checkpoint={first}", "split=val"))
    wrong = tool("eval_model", f"checkpoint={copy}", "split=val", "dataset.windw=3")
    assert wrong.returncode == 2
    assert "did you mean 'window'" in wrong.stderr
