"""tools/make_music_qa.py from end to end: templates, a server that stands for a model, and careless use."""

import http.server
import json
import signal
import threading

import numpy as np
import pytest

from bestiary.shared.data.audio_qa import AudioQAJsonl

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("librosa")
pytest.importorskip("torchaudio")
KEY = "sk-0123456789abcdefghij"
RATE = 16000
QUICK = """
import bestiary.shared.music.pipeline as p
from bestiary.shared.music.extract import _known
def extract(path, tools):
    record = p.Record(p.duration(path))
    _known(p.Path(path).with_suffix(".json"), record)
    return record
p.extract, p._processes = extract, p.ThreadPoolExecutor
"""
"""Run before a tool: nothing is measured, which takes long, and what the user knows is all that is known."""


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Two pieces of a C major chord struck at 120 a minute, and what is known of them; and a file that is no audio."""
    folder = tmp_path_factory.mktemp("my music")
    beat = np.arange(RATE // 2) / RATE
    struck = sum(np.sin(2 * np.pi * f * beat) for f in (261.63, 329.63, 392.0)) * np.exp(-6 * beat)
    (folder / "below").mkdir()
    for name in ("one.wav", "below/zwei ü.flac"):
        soundfile.write(folder / name, 0.2 * np.tile(struck, 8), RATE)
    known = {"Key": "C major", "Meter": "4/4", "Instruments": ["organ"], "BPM": 120}
    (folder / "one.json").write_text(json.dumps(known))
    (folder / "below" / "zwei ü.json").write_text(json.dumps(known))
    (folder / "broken.wav").write_text("no audio")
    return folder


def made(out):
    source = AudioQAJsonl(str(out / "audio_qa.jsonl"))
    source.check()
    return [json.loads(line) for line in (out / "audio_qa.jsonl").read_text(encoding="utf-8").splitlines()]


def test_templates_and_once_more(tool, music, tmp_path):
    job = tool("make_music_qa", music, "--out", "out", "--think", cwd=tmp_path)
    assert job.returncode == 0, job.stderr
    rows = made(tmp_path / "out")
    assert "3 audio files, 1 of them unusable" in job.stdout
    assert "broken.wav cannot be read as audio" in job.stdout
    assert f"{len(rows)} rows made: " in job.stdout
    assert f"{len(rows)} of them with thoughts" in job.stdout
    asked = {row["question"]: row["answer"] for row in rows}
    assert asked["What is the key?"] == "C major"
    assert asked["What is the time signature?"] == "4/4"
    assert asked["What is the tempo?"] == "120 bpm"
    assert asked["Which of these instruments is heard?"] == "organ"
    assert {row["id"].split("#")[0] for row in rows} == {"one.wav", "below/zwei ü.flac"}
    again = tool("make_music_qa", music, "--out", "out", "--think", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, job.stdout)
    other = tool("make_music_qa", music, "--out", "out", cwd=tmp_path)
    assert other.returncode == 2
    assert other.answer.startswith("make_music_qa.py: out was begun with think True (now False)")


def test_who_stops_it_is_told_that_it_goes_on(tool, music, tmp_path):
    waits = "import time\np.Pipeline._write = lambda *args: (print('writing', flush=True), time.sleep(600))\n"
    job = tool.start("make_music_qa", music, "--out", "out", cwd=tmp_path, before=QUICK + waits)
    job.wait_for("writing")
    job.signal(signal.SIGINT)
    assert job.wait().returncode == 130
    assert job.answer.splitlines()[-1] == "stopped: the same command goes on from here"
    assert "Traceback" not in job.stderr
    assert tool("make_music_qa", music, "--out", "out", cwd=tmp_path, before=QUICK).returncode == 0


@pytest.mark.slow
def test_several_workers_in_a_process_of_its_own(run_tool, music, tmp_path):
    """Not the server that the other tests use: its children start from the script itself."""
    job = run_tool("make_music_qa", music, "--out", tmp_path / "out", "--workers", 2, "--tools", "librosa")
    assert job.returncode == 0, job.stderr
    assert len({row["audio"] for row in made(tmp_path / "out")}) == 2


# ------------------------------------------------------------------ an endpoint


class Model(http.server.BaseHTTPRequestHandler):
    """Writes what the prompts ask for: a right and a wrong question, a score of 9 or 2, a chain with a wrong step."""

    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        self.server.prompts.append(prompt)
        if self.headers["Authorization"] != f"Bearer {KEY}":
            self.send(401, {"error": {"message": f"wrong key: {self.headers['Authorization']}"}})
            return
        if "Write one description" in prompt:
            answer = {"caption": "An organ plays in C major at 120 bpm."}
        elif "multiple-choice" in prompt:
            right = {"options": ["C major", "D major", "E major", "F major"], "skill": "attribute"}
            first = {**right, "question": "What is the key of the piece?", "answer": "C major"}
            wrong = {**right, "question": "Which key is it?", "answer": "D major"}
            vague = {**right, "question": "What mood?", "answer": "a", "options": ["a", "b", "c", "d"]}
            answer = {"questions": [first, wrong, vague]}
        elif "Score from 0" in prompt:
            answer = {"score": 2 if "What mood?" in prompt else 9}
        else:
            answer = {"steps": ["An organ is heard", "It is in 3/4", "It is calm", "It goes on"]}
        text = "```json\n" + json.dumps(answer) + "\n```"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        self.send(200, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})

    def send(self, status, body):
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    pytest.importorskip("openai")
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model)
    made.prompts = []
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_an_endpoint_that_judges_and_thinks(tool, music, tmp_path, server):
    address = f"http://127.0.0.1:{server.server_port}/v1"
    asked = ["--writer", "endpoint", "--base-url", address, "--model", "m", "--key-env", "MY_KEY", "--judge", "--think"]
    job = tool(
        "make_music_qa", music, "--out", "out", *asked, "--workers", 2, cwd=tmp_path, env={"MY_KEY": KEY}, before=QUICK
    )
    assert job.returncode == 0, job.stdout + job.stderr
    rows = made(tmp_path / "out")
    assert [(row["task"], row["answer"]) for row in rows] == [
        ("caption", "An organ plays in C major at 120 bpm."),
        ("attribute", "C major"),
    ] * 2
    assert {row["think"] for row in rows} == {"An organ is heard. It is in 4/4. It is calm. It goes on."}
    assert "2 dropped: question: contradicts Key" in job.stdout
    assert "2 dropped: question: the judge scored it low" in job.stdout
    # A caption and a question of each piece are thought about; what the rules drop is not judged.
    assert len(server.prompts) == 2 * (2 + 3 + 2)
    everything = [file.read_text() for file in (tmp_path / "out").iterdir()]
    assert not any(KEY in text for text in [*everything, job.stdout, job.stderr])


def test_a_wrong_key_is_one_line_without_it(tool, music, tmp_path, server):
    address = f"http://127.0.0.1:{server.server_port}/v1"
    asked = ["--writer", "endpoint", "--base-url", address, "--model", "m", "--key-env", "MY_KEY"]
    job = tool(
        "make_music_qa",
        music,
        "--out",
        "out",
        *asked,
        cwd=tmp_path,
        env={"MY_KEY": "sk-wrong-9876543210"},
        before=QUICK,
    )
    assert job.returncode == 2
    last = job.answer.splitlines()[-1]
    assert last.startswith(f"make_music_qa.py: {address} refuses model 'm': status 401")
    assert "wrong key: Bearer ***" in last
    assert "9876543210" not in job.stdout + job.stderr
    assert "Traceback" not in job.stderr


# ------------------------------------------------------------------ careless use


ENDPOINT = ["--writer", "endpoint", "--model", "m"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (ENDPOINT, "--writer endpoint needs --base-url"),
        (["--writer", "endpoint", "--base-url", "http://localhost:1/v1"], "--writer endpoint needs --model"),
        ([*ENDPOINT, "--base-url", "localhost:1"], "base_url is an address such as http://localhost:8000/v1"),
        ([*ENDPOINT, "--base-url", "http://localhost:1", "--key-env", "NO_SUCH"], "NO_SUCH holds no API key"),
        ([*ENDPOINT, "--base-url", "http://localhost:1", "--retries", "-1"], "timeout is above 0"),
        ([*ENDPOINT, "--base-url", "http://127.0.0.1:9", "--retries", "0"], "http://127.0.0.1:9 gave no answer"),
        (["--writer", "local"], "--writer local needs --checkpoint"),
        (["--writer", "local", "--checkpoint", "nowhere"], "nowhere"),
        (["--listener", "nowhere"], "nowhere"),
        (["--base-url", "http://localhost:1"], "--base-url belongs to --writer endpoint, not template"),
        (["--judge"], "--judge needs a model"),
        (["--tools", "librosa,aubio"], "there is no tool 'aubio'; tools are librosa, madmom, essentia"),
        (["--workers", "0"], "workers is 1 or more, not 0"),
        (["--questions", "-1"], "--questions is 0 or more, not -1"),
    ],
)
def test_careless_arguments(tool, music, tmp_path, arguments, words):
    refused(tool("make_music_qa", music, "--out", "out", *arguments, cwd=tmp_path, before=QUICK), words)


def test_careless_folders(tool, music, tmp_path):
    refused(tool("make_music_qa", "no such folder", "--out", "out", cwd=tmp_path), "no such folder is no folder")
    refused(tool("make_music_qa", music / "one.wav", "--out", "out", cwd=tmp_path), "one.wav is no folder")
    refused(tool("make_music_qa", music, "--out", music / "qa", cwd=tmp_path), f"qa is inside {music}")
    refused(tool("make_music_qa", ".", "--out", "qa", cwd=music), "qa is inside .")
    (tmp_path / "nothing").mkdir()
    refused(tool("make_music_qa", "nothing", "--out", "out", cwd=tmp_path), "nothing holds no usable audio")
    (tmp_path / "file").touch()
    refused(tool("make_music_qa", music, "--out", "file", cwd=tmp_path), "file: File exists")
    assert not (music / "qa").exists()
    assert not (tmp_path / "out").exists()


def refused(job, words):
    assert job.returncode == 2, job.stderr
    assert job.stdout == ""
    *progress, line = job.answer.splitlines()
    assert line.startswith("make_music_qa.py: ")
    assert words in line
    assert all(text.startswith("metadata: ") for text in progress)
