"""Models of this repository as writers and listeners: tiny ones, saved as runs save them."""

import threading

import numpy as np
import pytest
import torch

from bestiary.projects.music_flamingo.model import MusicFlamingo
from bestiary.shared.audio.mel import LogMel
from bestiary.shared.audio.whisper_encoder import WhisperEncoder
from bestiary.shared.core.errors import ConfigError, UserError
from bestiary.shared.core.examples import text_message
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.language.causal_lm import CausalLM
from bestiary.shared.language.hf_causal_lm import HFCausalLM
from bestiary.shared.music import models as module
from bestiary.shared.music.models import completer, listener, load_model

pytest.importorskip("transformers")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def hears():
    torch.manual_seed(0)
    front_end = LogMel(n_mels=16, window_seconds=1.0, max_seconds=3.0)
    encoder = WhisperEncoder(front_end, width=40, layers=1, heads=4, ffn=64)
    model = MusicFlamingo(HFCausalLM("qwen2", TEXT, "byte"), encoder, {}).eval()
    for parameter in (*encoder.parameters(), *model.projector.parameters()):
        parameter.data.uniform_(-0.4, 0.4)
    return model


@pytest.fixture(scope="module")
def reads():
    torch.manual_seed(0)
    return CausalLM(HFCausalLM("qwen2", TEXT, "byte")).eval()


def tone(hertz, seconds=1.5, rate=16000):
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def test_a_writer_says_what_its_model_generates(reads):
    """As generate() does by itself, with the noise of the first prompt, then of the second."""
    complete = completer(reads, 8, 0.9)
    example = {"id": "prompt", "messages": [text_message("user", "Write.")], "meta": {}}
    for seed in (0, 1):
        rollout = reads.generate(reads.processor()([example], "prompt"), 1, Sampling(8, 0.9, seed=seed))
        assert complete("Write.") == rollout.texts[0]
    assert completer(reads, 8, 0.9)("Write.") == completer(reads, 8, 0.9)("Write.")


def test_a_writer_of_several_threads_answers_one_at_a_time(reads, monkeypatch):
    inside, most = [0], [0]

    def generate(model, example, sampling):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        seeds.append(sampling.seed)
        threading.Event().wait(0.01)
        inside[0] -= 1
        return ""

    seeds: list[int] = []
    monkeypatch.setattr(module, "_generate", generate)
    complete = completer(reads)
    threads = [threading.Thread(target=complete, args=("x",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert seeds == list(range(8))


def test_a_model_that_hears_can_write_too(hears):
    assert isinstance(completer(hears, 4)("Write."), str)


def test_a_listener_hears(hears):
    """Other sounds, other words; the same sound, the same."""
    listen = listener(hears, max_new_tokens=12)
    low, high = listen(tone(200), 16000), listen(tone(3000), 16000)
    assert low == listen(tone(200), 16000)
    assert low != high


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("<think>So.</think>\n A slow\n waltz. ", "A slow waltz."),
        ("<think>So.</think><answer>A waltz.</answer>", "A waltz."),
        ("<answer> A  waltz.</answer> bye", "A waltz."),
        ("A waltz.", "A waltz."),
    ],
)
def test_what_a_listener_says_is_without_its_thoughts(hears, monkeypatch, said, heard):
    monkeypatch.setattr(module, "_generate", lambda model, example, sampling: said)
    assert listener(hears)(tone(200), 16000) == heard


def test_a_listener_without_ears_is_refused(reads):
    with pytest.raises(ConfigError, match="does not hear"):
        listener(reads)


@pytest.mark.parametrize(("tokens", "temperature"), [(0, 0.5), (5, -1.0)])
def test_numbers_that_cannot_be(reads, tokens, temperature):
    with pytest.raises(ConfigError, match="max_tokens is 1 or more"):
        completer(reads, tokens, temperature)


def test_a_folder_of_transformers(tmp_path):
    """Its logits are those of transformers itself."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    with pytest.raises(ConfigError, match="does not read"):
        completer(load_model(str(tmp_path / "hf"), "cpu"))
    words = {word: n for n, word in enumerate(("Write", ".", "user", "assistant"))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="."))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token=".", eos_token=".").save_pretrained(
        tmp_path / "hf"
    )
    ours = load_model(str(tmp_path / "hf"), "cpu")
    batch = ours.processor()([{"id": "x", "messages": [text_message("user", "Write.")], "meta": {}}], "prompt")
    with torch.no_grad():
        found, wanted = ours(batch).logits, theirs(batch["input_ids"]).logits
    torch.testing.assert_close(found, wanted)
    assert isinstance(completer(ours, 4)("Write."), str)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_no_checkpoint(tmp_path, make):
    make(tmp_path / "run")
    with pytest.raises(UserError, match="run"):
        load_model(str(tmp_path / "run"))
