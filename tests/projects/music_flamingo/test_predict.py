"""Questions about files: what is answered is what the model says to each alone, and a clip is encoded once."""

import json

import numpy as np
import pytest
import torch

from bestiary.projects.music_flamingo.model import MusicFlamingo
from bestiary.projects.music_flamingo.predict import FACTS, answers, record, split
from bestiary.shared.audio.files import read_audio
from bestiary.shared.audio.frozen import freeze_encoder
from bestiary.shared.audio.mel import LogMel
from bestiary.shared.audio.whisper_encoder import WhisperEncoder
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.language.hf_causal_lm import HFCausalLM

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
pytest.importorskip("transformers")
RATE = 16000
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}


def flamingo() -> MusicFlamingo:
    """A tiny model whose windows are a second and whose clips are three; weights large enough to hear with."""
    torch.manual_seed(0)
    front_end = LogMel(n_mels=16, window_seconds=1.0, max_seconds=3.0)
    encoder = WhisperEncoder(front_end, width=40, layers=2, heads=4, ffn=64)
    model = MusicFlamingo(HFCausalLM("qwen2", TEXT, "byte"), encoder, {}).eval()
    for parameter in (*encoder.parameters(), *model.projector.parameters()):
        parameter.data.uniform_(-0.4, 0.4)
    return model


@pytest.fixture(scope="module")
def model() -> MusicFlamingo:
    return flamingo()


@pytest.fixture
def windows(model, monkeypatch):
    """Counts of windows that the encoder was given, a call each."""
    seen: list[int] = []
    forward = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda f, n, **more: seen.append(len(f)) or forward(f, n, **more))
    return seen


def write(path, seconds: float, seed: int = 0, rate: int = RATE):
    samples = np.random.default_rng(seed).standard_normal(int(seconds * rate)) * 0.1
    soundfile.write(path, samples.astype(np.float32), rate)
    return path


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def alone(model, path, question: str, new: int = 6) -> str:
    """What the model says to one question, by its own generate."""
    clip = {"type": "audio", "value": read_audio(path, RATE), "rate": RATE}
    messages = [{"role": "user", "content": [clip, {"type": "text", "value": question}]}]
    with torch.no_grad():
        return model.generate(model.processor()([{"id": "x", "messages": messages}], "prompt"), 1, Sampling(new)).texts[
            0
        ]


def test_facts_are_the_answers_to_each_question_alone_and_encode_a_clip_once(model, windows, tmp_path):
    files = [write(tmp_path / "a.wav", 2.4, 1), write(tmp_path / "b.wav", 0.7, 2)]
    [out] = model.predict([tmp_path], tmp_path / "out", facts=True, max_new_tokens=6)
    assert windows == [3, 1]
    found = lines(out)
    assert [row["audio"] for row in found] == [str(file) for file in files]
    said = [[alone(model, file, question) for question in FACTS.values()] for file in files]
    assert [list(row["said"].values()) for row in found] == said
    # Clips and questions are told apart, or nothing above would show a mistake.
    assert said[0] != said[1]
    assert len(set(said[0])) > 1


def test_rows_of_several_clips_in_any_order(model, windows, tmp_path):
    a, b, c = (write(tmp_path / f"{n}.wav", s, at) for at, (n, s) in enumerate([("a", 0.4), ("b", 2.2), ("c", 1.0)]))
    asked = [(b, "key?"), (a, "who plays?"), (b, "which metre is this?"), (c, "key?"), (a, "key?")]
    got = answers(model, [{"audio": str(f), "question": q} for f, q in asked], Sampling(6))
    assert windows == [5]
    assert got == [alone(model, f, q) for f, q in asked]


def test_a_frozen_encoder_hears_a_clip_once_too(tmp_path, monkeypatch):
    frozen = freeze_encoder(flamingo()).eval()
    file = write(tmp_path / "a.wav", 2.4, 1)
    seen: list[int] = []
    forward = frozen.encoder.encoder.forward
    monkeypatch.setattr(frozen.encoder.encoder, "forward", lambda f, n: seen.append(len(f)) or forward(f, n))
    rows = [{"audio": str(file), "question": question} for question in FACTS.values()]
    got = answers(frozen, rows, Sampling(6))
    assert seen == [3]
    assert got == [alone(frozen, file, question) for question in FACTS.values()]


def test_of_a_long_clip_the_beginning_is_heard_and_it_is_said(model, tmp_path):
    long = write(tmp_path / "long.wav", 4.5, 3)
    soundfile.write(tmp_path / "cut.wav", read_audio(long, RATE)[: 3 * RATE], RATE, subtype="FLOAT")
    with pytest.warns(UserWarning, match=r"long\.wav has 4\.5 s, and the model hears the first 3 s") as told:
        [out] = model.predict([long, tmp_path / "cut.wav"], tmp_path / "out", max_new_tokens=6)
    assert len(told) == 1
    first, second = (row["answer"] for row in lines(out))
    assert first == second


def test_a_record_has_texts_or_nothing():
    rows = [{"audio": "a.wav", "field": name, "question": "?"} for name in FACTS]
    said = [
        "<think>x</think><answer> flute </answer>",
        "<answer></answer>",
        "flute",
        "<answer>a</answer><answer>C major</answer>",
        "<think><answer>no</answer></think>",
        "<answer>cut off",
        "",
    ]
    got = record(rows, said)
    assert list(got) == ["audio", *FACTS, "said"]
    assert [got[name] for name in FACTS] == ["flute", None, None, "C major", None, None, None]
    assert list(got["said"].values()) == said


def test_an_answer_and_its_thoughts():
    assert split("<think> slow </think>\n<answer>Largo</answer>") == ("Largo", "slow")
    assert split("<think>x</think> Largo ") == ("Largo", "x")
    assert split("Largo") == ("Largo", None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"facts": True, "question": "key?"}, "facts=true asks its own questions"),
        ({"question": " "}, "question= is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, not 0"),
    ],
)
def test_options_that_make_no_sense(model, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        model.predict([write(tmp_path / "a.wav", 0.2)], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"audio": "a.wav"}]', r"q\.jsonl, line 1: a line is like"),
        (b'\n{"audio": "a.wav", "question": ""}', r"q\.jsonl, line 2: a line is like"),
        (b'{"question": "key?"}', r"q\.jsonl, line 1: a line is like"),
        (b'{"audio": "a.wav"', r"q\.jsonl, line 1: a line is like"),
        (b"\xff\xfe{}", r"q\.jsonl is not UTF-8 text"),
        (b'{"audio": "none.wav"}', r"none\.wav: there is no such file"),
        (b"\n", r"no audio file in .*q\.jsonl"),
    ],
)
def test_files_of_questions_that_cannot_be_used(model, tmp_path, content, words):
    write(tmp_path / "a.wav", 0.2)
    (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(BadDataError, match=words):
        model.predict([tmp_path / "q.jsonl"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
