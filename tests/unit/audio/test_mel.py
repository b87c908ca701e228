"""The front end against transformers' Whisper extractor, and against a transform written out in float64."""

import math

import numpy as np
import pytest
import torch

from bestiary.shared.audio.mel import TAIL, LogMel
from bestiary.shared.core.errors import BadDataError, ConfigError

pytest.importorskip("torchaudio")
WINDOW = 480000


def noise(count: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(count) * 0.1).astype(np.float32)


def whisper(clip: np.ndarray, bins: int = 128):
    """Features (W, M, 3000) and real frames (W,) of transformers' extractor, cut as its Flamingo processors cut."""
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=bins)
    parts = [clip[i : i + WINDOW] for i in range(0, len(clip), WINDOW)]
    out = extractor(parts, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
    return out["input_features"], out["attention_mask"].sum(-1)


@pytest.mark.parametrize("count", [1, 2, 159, 160, 161, 16001, 479700, 479999, 480000, 480001, 959900])
def test_every_frame_an_encoder_looks_at_is_whispers(count):
    clip = noise(count)
    features, lengths = LogMel()(clip)
    wanted, real = whisper(clip)
    assert torch.equal(lengths, real)
    for window, length in enumerate(lengths.tolist()):
        frames = min(3000, length + TAIL)
        assert features[window, :, :frames].sub(wanted[window, :, :frames]).abs().max() < 5e-5


def test_filled_windows_are_whispers_to_the_end():
    clip = noise(70000)
    features, _ = LogMel(n_mels=80, fill=True)(clip)
    assert features.shape == (1, 80, 3000)
    assert features.sub(whisper(clip, 80)[0]).abs().max() < 5e-5


def test_it_equals_a_transform_written_out_in_float64():
    """A direct Fourier sum, with a window shorter than the transform, and slaney's triangles from their definition."""
    mel = LogMel(rate=8000, n_fft=64, hop=20, window=48, n_mels=6, window_seconds=0.1, max_seconds=1)
    clip = noise(333, 3)
    features, lengths = mel(clip)
    signal = np.pad(clip.astype(np.float64), (0, 800 - 333))
    signal = np.concatenate([signal[32:0:-1], signal, signal[-2:-34:-1]])
    taper = np.zeros(64)
    taper[8:56] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(48) / 48)
    angles = 2 * np.pi * np.arange(33)[:, None] * np.arange(64) / 64
    power = np.zeros((33, 40))
    for frame in range(40):
        piece = signal[frame * 20 : frame * 20 + 64] * taper
        power[:, frame] = (np.cos(angles) @ piece) ** 2 + (np.sin(angles) @ piece) ** 2

    def hz_to_mel(f):
        return f / (200 / 3) if f < 1000 else 15 + math.log(f / 1000) / (math.log(6.4) / 27)

    def mel_to_hz(m):
        return m * 200 / 3 if m < 15 else 1000 * math.exp((m - 15) * math.log(6.4) / 27)

    edges = [mel_to_hz(m) for m in np.linspace(0, hz_to_mel(4000), 8)]
    frequency = np.arange(33) * 8000 / 64
    bank = np.stack(
        [
            np.maximum(0, np.minimum((frequency - a) / (b - a), (c - frequency) / (c - b))) * 2 / (c - a)
            for a, b, c in zip(edges, edges[1:], edges[2:], strict=False)
        ]
    )
    wanted = np.log10(np.maximum(bank @ power, 1e-10))
    wanted = (np.maximum(wanted, wanted.max() - 8) + 4) / 4
    assert lengths.tolist() == [17]
    assert np.abs(features[0].numpy() - wanted[:, : 17 + TAIL]).max() < 2e-5


def test_a_clip_is_cut_at_the_longest_and_says_so():
    mel = LogMel(n_mels=8, window_seconds=1, max_seconds=3)
    features, lengths = mel(noise(16000 * 4))
    assert len(features) == 3
    assert lengths.tolist() == [100, 100, 100]
    assert mel.is_cut(48001)
    assert not mel.is_cut(48000)


def test_silence_is_finite_and_flat():
    features, lengths = LogMel()(np.zeros(32000, np.float32))
    assert lengths.tolist() == [200]
    assert (features == (-10 + 4) / 4).all()


@pytest.mark.parametrize(
    ("clip", "says"),
    [
        (np.zeros(0, np.float32), "no samples"),
        (np.zeros((2, 100), np.float32), "mono"),
        (np.array([0.0, np.nan], np.float32), "not finite"),
    ],
)
def test_what_is_no_clip_is_refused(clip, says):
    with pytest.raises(BadDataError, match=says):
        LogMel()(clip)


@pytest.mark.parametrize(
    "options",
    [
        {"hop": 0},
        {"window": 500},
        {"window_seconds": 30.001},
        {"window_seconds": 0.0125, "n_fft": 1024, "hop": 50},
        {"max_seconds": 10},
        {"hop": 480000 // 6},
    ],
)
def test_numbers_that_cannot_be_are_refused(options):
    with pytest.raises(ConfigError, match=r"front_end|window"):
        LogMel(**options)
