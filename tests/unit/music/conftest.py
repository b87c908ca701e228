"""Music whose truth is known because it is made here, of sines and clicks; and a server that answers like a model."""

import http.server
import json
import threading
import time

import numpy as np
import pytest

from bestiary.shared.audio.files import duration, read_audio
from bestiary.shared.music.pipeline import Pipeline
from bestiary.shared.music.records import Record, Value
from bestiary.shared.music.write import TemplateWriter

RATE = 22050
TRIADS = {"major": (0, 4, 7), "minor": (0, 3, 7)}
NAMES = ["C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B"]


class Synth:
    """Sines with harmonics, and clicks."""

    rate = RATE

    def clicks(self, bpm, seconds=12.0, first=0.25):
        """(N,) a short burst of 1 kHz on every beat, louder every fourth."""
        out = np.zeros(int(seconds * RATE), np.float32)
        burst = np.sin(2 * np.pi * 1000 * np.arange(600) / RATE) * np.exp(-np.arange(600) / 120)
        for n, at in enumerate(np.arange(first, seconds - 0.05, 60 / bpm)):
            place = round(at * RATE)
            piece = out[place : place + 600]
            piece += (1.0 if n % 4 == 0 else 0.6) * burst[: len(piece)]
        return out

    def notes(self, midi, seconds):
        """(N,) these notes at once, each with four harmonics that fall off, and an attack."""
        t = np.arange(round(seconds * RATE)) / RATE
        out = np.zeros(len(t))
        for note in midi:
            f = 440 * 2 ** ((note - 69) / 12)
            out += sum(np.sin(2 * np.pi * f * k * t) / k**2 for k in range(1, 5))
        return (0.2 * out * np.minimum(1, t / 0.01) * np.exp(-1.5 * t)).astype(np.float32)

    def chords(self, chords, bpm=120):
        """(samples, [(start, end, name)]): two beats of each (root, mode), struck on each beat."""
        beat = 60 / bpm
        out, truth = [], []
        for n, (root, mode) in enumerate(chords):
            pitches = [48 + root, *(60 + (root + step) % 12 for step in TRIADS[mode])]
            out += [self.notes(pitches, beat), self.notes(pitches, beat)]
            truth.append((2 * n * beat, 2 * (n + 1) * beat, f"{NAMES[root]} {mode}"))
        return np.concatenate(out), truth

    def cadences(self, tonic, mode, times=3):
        """(samples, truth) of I IV V I, or i iv V i, in a key."""
        four = (5, "major" if mode == "major" else "minor")
        steps = [(0, mode), four, (7, "major"), (0, mode)]
        return self.chords([((tonic + step) % 12, kind) for step, kind in steps * times])


@pytest.fixture(scope="session")
def synth():
    return Synth()


class Lab:
    """What tests of the pipeline do again and again."""

    @staticmethod
    def tone(path, seconds=1.2, hertz=220.0, rate=8000):
        """Write a sine."""
        soundfile = pytest.importorskip("soundfile")
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.2 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate), rate)

    @staticmethod
    def quick(path, tools=None):
        """An extractor that reads the file, and knows a little of it."""
        read_audio(path, 8000)
        values = {"Key": "C major", "BPM": 100.0, "Meter": "3/4", "Instruments": ["flute"]}
        return Record(duration(path), {name: Value(value, "made") for name, value in values.items()})

    @staticmethod
    def run(folder, out, writer=None, **options):
        """Run the pipeline to its report."""
        options = {"say": lambda text: None, **options}
        return Pipeline(folder, out, writer or TemplateWriter(), **options).run()

    @staticmethod
    def rows(file):
        """The objects of a file, one a line."""
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def lab():
    return Lab()


@pytest.fixture
def music(lab, tmp_path):
    """Five files, one of them in a folder below."""
    for number, name in enumerate(("a", "b", "c d", "é", "below/e")):
        lab.tone(tmp_path / "music" / f"{name}.wav", hertz=200 + 50 * number)
    return tmp_path / "music"


class FakeServer(http.server.ThreadingHTTPServer):
    """An OpenAI-compatible server that gives these replies in turn, the last of them for ever.

    A reply is a status, headers and a body; or a number of seconds to wait before it hangs up.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.replies, self.asked = [self.chat("yes")], []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    @staticmethod
    def chat(text, finish="stop", **message):
        """A chat completion, as the API's reference has it."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
        return 200, {}, {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}

    @staticmethod
    def error(status, text, **headers):
        """An error that asks to come back at once, so that tests do not wait."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return status, {"retry-after-ms": "1", **named}, {"error": {"message": text, "type": "x"}}


class FakeHandler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, dict(self.headers), body))
            replies = self.server.replies
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if callable(reply):
            reply = reply(body["messages"][0]["content"])
        if isinstance(reply, float):
            time.sleep(reply)
            return
        status, headers, body = reply
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(raw), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    made = FakeServer()
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
