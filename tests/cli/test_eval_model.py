"""tools/eval_model.py: the numbers of the run, from wherever its folder is."""

import json
import shutil

import pytest


def numbers(text):
    return {
        line.split()[0]: float(line.split()[1])
        for line in text.splitlines()
        if line.startswith(("test/", "val/")) and len(line.split()) == 2
    }


@pytest.fixture(scope="module")
def copy(whole, tmp_path_factory):
    """The run folder under another name, in another place."""
    folder = tmp_path_factory.mktemp("moved") / "a run"
    shutil.copytree(whole, folder)
    return folder


def test_the_numbers_of_the_run(tool, copy):
    job = tool("eval_model", "checkpoint=a run", cwd=copy.parent)
    assert job.returncode == 0, job.stderr
    expected = json.loads((copy / "result.json").read_text())["metrics"]
    assert json.loads((copy / "stages" / "chat" / "eval_test.json").read_text()) == expected
    assert numbers(job.stdout) == {k: pytest.approx(v, abs=5e-5) for k, v in expected.items()}
    assert "differs" not in job.stdout


def test_the_validation_part_of_a_stage(tool, copy):
    job = tool("eval_model", f"checkpoint={copy}/stages/text", "split=val")
    assert job.returncode == 0, job.stderr
    stage = json.loads((copy / "stages" / "text" / "metrics.json").read_text())
    found = numbers(job.stdout)
    assert found["val/bits_per_byte"] == pytest.approx(stage["val/bits_per_byte"], abs=5e-5)
    assert "val/exact_match" in found
    assert not any(k.startswith("test/") for k in found)


def test_overrides_change_what_is_scored(tool, copy):
    job = tool("eval_model", f"checkpoint={copy}", "dataset.held_out_chats=5", "device=cpu")
    assert job.returncode == 0, job.stderr
    assert numbers(job.stdout)["test/prompts"] == 5


def test_another_protocol_in_a_file_of_its_own(tool, copy):
    own = copy / "stages" / "chat" / "eval_test.json"
    own.write_text("the run's own")
    job = tool("eval_model", f"checkpoint={copy}", "protocol=label", "part=chat", "protocol.batch_size=2")
    assert job.returncode == 0, job.stderr
    stored = json.loads((copy / "stages" / "chat" / "eval_test_label_chat_batch_size=2.json").read_text())
    assert 0 <= stored["test/accuracy"] <= 1
    assert "test/macro_f1" in stored
    assert "test/bits_per_byte" not in stored
    assert own.read_text() == "the run's own"


def test_the_stored_config_wins_and_differences_are_listed(tool, copy):
    file = copy / "config.yaml"
    text = file.read_text()
    file.write_text(text.replace("held_out_chats: 2", "held_out_chats: 3"))
    job = tool("eval_model", f"checkpoint={copy}")
    file.write_text(text)
    assert job.returncode == 0, job.stderr
    assert "differs from today's conf/ (the stored value is used): dataset.held_out_chats: 3 -> 2" in job.stdout
    assert numbers(job.stdout)["test/prompts"] == 3


def test_a_stored_config_is_checked(tool, copy, short, tmp_path):
    file = copy / "config.yaml"
    text = file.read_text()
    file.write_text(text.replace("bestiary.projects._examples.data.TinyTalk", "os.system"))
    job = tool("eval_model", f"checkpoint={copy}")
    file.write_text(text)
    short(job, "os.system", "not allowed")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["split=test"], ["checkpoint= is missing", "usage: python tools/eval_model.py"]),
        (["checkpoint=/nowhere"], ["/nowhere: no checkpoint there"]),
        (["checkpoint=/nowhere/a,b"], ["/nowhere/a,b: no checkpoint there"]),
        (["runs/x"], ["'runs/x' is not key=value"]),
        (["checkpoint=RUN", "splt=val"], ["no key 'splt'", "did you mean 'split'"]),
        (["checkpoint=RUN", "split=tset"], ["split=tset"]),
        (["checkpoint=RUN", "split=train"], ["split=train"]),
        (["checkpoint=RUN", "device=gpuu"], ["device=gpuu"]),
        (["checkpoint=RUN", "protocol=mmaw"], ["no protocol 'mmaw'", "did you mean 'mmau'"]),
        (
            ["checkpoint=RUN", "protocol=mmau", "protocol.matchr=label"],
            ["mmau.yaml has no key", "did you mean 'matcher'"],
        ),
        (["checkpoint=RUN", "protocol=mmau", "protocol.matcher=lable"], ["no matcher 'lable'", "did you mean 'label'"]),
        (["checkpoint=RUN", "protocol.matcher=label"], ["protocol.matcher=label goes with protocol=NAME"]),
        (["checkpoint=RUN", "part=rl"], ["part= goes with protocol=NAME"]),
        (["checkpoint=RUN", "audio=silence"], ["audio is real, silent, swapped, not 'silence'"]),
        (["checkpoint=RUN", "dataset.windw=3"], ["no key 'dataset.windw'", "did you mean 'window'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_short_answers(tool, copy, short, arguments, words):
    short(tool("eval_model", *[a.replace("RUN", str(copy)) for a in arguments]), *words)


def test_help(tool):
    job = tool("eval_model", "--help")
    assert job.returncode == 0
    assert job.stdout.startswith("usage: python tools/eval_model.py checkpoint=RUN")
    assert tool("eval_model").returncode == 2


def test_damaged_weights(tool, copy, short, tmp_path):
    shutil.copytree(copy, tmp_path / "run")
    file = tmp_path / "run" / "stages" / "chat" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    short(tool("eval_model", f"checkpoint={tmp_path}/run"), str(file), "damaged")
