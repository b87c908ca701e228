"""Whisper tiny.en out of its CTranslate2 file: against CTranslate2 where it is fetched, and on files made here."""

import math
import struct

import numpy as np
import pytest
import torch

from bestiary.shared.audio.whisper_tiny import read_encoder, variables, whisper_tiny
from bestiary.shared.core.errors import BadDataError

pytest.importorskip("torchaudio")


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def model_file(path, entries, version=6, kind="WhisperSpec"):
    """A model.bin with these variables."""
    numbers = {np.dtype(np.float32): 0, np.dtype(np.int8): 1, np.dtype(np.float16): 4}
    parts = [struct.pack("<I", version), text(kind), struct.pack("<II", 3, len(entries))]
    for name, values in entries.items():
        parts += [text(name), struct.pack("<B", values.ndim), struct.pack(f"<{values.ndim}I", *values.shape)]
        parts += [struct.pack("<BI", numbers[values.dtype], values.nbytes), values.tobytes()]
    path.write_bytes(b"".join(parts))
    return path


def test_names_and_the_joined_projection(tmp_path):
    joined = np.arange(24, dtype=np.float16).reshape(12, 2)
    bias = np.arange(12, dtype=np.float32)
    entries = {
        "decoder/embeddings/weight": np.zeros((3, 2), np.float32),
        "encoder/num_heads": np.array(2, np.int8),
        "encoder/conv1/weight": np.ones((2, 2, 3), np.float16),
        "encoder/layer_norm/gamma": np.ones(2, np.float32),
        "encoder/layer_3/self_attention/linear_0/weight": joined,
        "encoder/layer_3/self_attention/linear_0/bias": bias,
        "encoder/layer_3/ffn/layer_norm/beta": np.zeros(2, np.float32),
        "encoder/position_encodings/encodings": np.zeros((5, 2), np.float16),
    }
    state = read_encoder(model_file(tmp_path / "model.bin", entries))
    assert set(state) == {
        "conv1.weight",
        "layer_norm.weight",
        *(f"layers.3.self_attn.{p}_proj.weight" for p in "qkv"),
        *(f"layers.3.self_attn.{p}_proj.bias" for p in "qv"),
        "layers.3.final_layer_norm.bias",
        "embed_positions.weight",
    }
    assert state["layers.3.self_attn.v_proj.weight"].tolist() == joined[8:].tolist()
    assert state["layers.3.self_attn.v_proj.bias"].tolist() == [8, 9, 10, 11]


def test_files_that_are_no_float_whisper_are_refused(tmp_path):
    file = tmp_path / "model.bin"
    good = {"encoder/conv1/weight": np.ones((2, 2, 3), np.float32)}
    for options in ({"version": 5}, {"kind": "TransformerSpec"}):
        with pytest.raises(BadDataError, match="version 6 of Whisper"):
            list(variables(model_file(file, good, **options)))
    whole = model_file(file, good).read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(BadDataError, match="cannot be read"):
        list(variables(file))
    file.write_bytes(whole[:20])
    with pytest.raises(BadDataError, match="cut short"):
        list(variables(file))
    with pytest.raises(BadDataError, match="int8"):
        read_encoder(model_file(file, {"encoder/conv1/weight": np.ones((2, 2, 3), np.int8)}))


@torch.no_grad()
def test_it_says_what_ctranslate2_says(need_asset):
    """Real speech; 1e-3 is asked, and outputs are as large as 13."""
    folder, speech = need_asset("whisper_tiny"), need_asset("pocketsphinx_testdata")
    ctranslate2 = pytest.importorskip("ctranslate2")
    transformers = pytest.importorskip("transformers")
    from bestiary.shared.audio.files import read_audio

    clip = read_audio(min((speech / "librivox").glob("*.wav")))
    extractor = transformers.WhisperFeatureExtractor(feature_size=80)
    mel = extractor(clip, sampling_rate=16000, return_tensors="np")["input_features"]
    peer = ctranslate2.models.Whisper(str(folder), device="cpu", compute_type="float32")
    wanted = np.array(peer.encode(ctranslate2.StorageView.from_array(mel)))[0]
    encoder = whisper_tiny()
    items, total = encoder.preprocess((clip, 16000))
    tokens, _ = encoder(**items)
    assert total == math.ceil(math.ceil(len(clip) / 160) / 2)
    assert np.abs(tokens.numpy() - wanted[:total]).max() < 1e-3
