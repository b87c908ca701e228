"""The encoder against transformers' Whisper and AF-Whisper, on the same weights."""

import warnings

import numpy as np
import pytest
import torch

from bestiary.shared.audio.frozen import FrozenEncoder
from bestiary.shared.audio.mel import LogMel
from bestiary.shared.audio.whisper_encoder import WhisperEncoder, sinusoids
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.prepare import set_trainable

pytest.importorskip("torchaudio")
transformers = pytest.importorskip("transformers")
LENGTHS = torch.tensor([100, 1, 2, 3, 51, 100, 98])


def encoder(pool: int, fill: bool = False) -> WhisperEncoder:
    torch.manual_seed(0)
    front_end = LogMel(n_mels=16, window_seconds=1.0, max_seconds=10, fill=fill)
    return WhisperEncoder(front_end, width=40, layers=2, heads=4, ffn=64, pool=pool).eval()


def peer(pool: int):
    shape = {"num_mel_bins": 16, "max_source_positions": 50, "dropout": 0.0}
    if pool == 2:
        sizes = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = transformers.AudioFlamingo3EncoderConfig(**shape, **sizes)
        return transformers.AudioFlamingo3Encoder(config).eval()
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Peer

    sizes = {"d_model": 40, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    return Peer(transformers.WhisperConfig(**shape, **sizes)).eval()


@torch.no_grad()
def test_af_whisper_is_transformers_on_windows_of_any_length():
    ours, theirs = encoder(2), peer(2)
    ours.load_state_dict(theirs.state_dict())
    features = torch.randn(7, 16, 100)
    mask = torch.arange(100) < LENGTHS[:, None]
    wanted = theirs(features, input_features_mask=mask).last_hidden_state
    tokens, counts = ours(features, LENGTHS)
    assert counts.tolist() == [25, 0, 0, 1, 13, 25, 24]
    rows = torch.cat([wanted[i, :n] for i, n in enumerate(counts.tolist())])
    torch.testing.assert_close(tokens, rows, atol=1e-5, rtol=0)


@torch.no_grad()
def test_whisper_is_transformers_which_attends_to_silence():
    ours, theirs = encoder(1, fill=True), peer(1)
    ours.load_state_dict(theirs.state_dict())
    features = torch.randn(7, 16, 100)
    wanted = theirs(features).last_hidden_state
    tokens, counts = ours(features, LENGTHS)
    assert counts.tolist() == [50, 1, 1, 2, 26, 50, 49]
    rows = torch.cat([wanted[i, :n] for i, n in enumerate(counts.tolist())])
    torch.testing.assert_close(tokens, rows, atol=1e-5, rtol=0)


def test_positions_are_whispers_and_are_never_trained():
    from transformers.models.whisper.modeling_whisper import sinusoids as theirs

    torch.testing.assert_close(sinusoids(1500, 384), theirs(1500, 384))
    model = encoder(2)
    assert torch.equal(model.state_dict()["embed_positions.weight"], sinusoids(50, 40))
    assert all("positions" not in name for name, _ in model.named_parameters())


def test_one_forward_in_any_float_type():
    """Features are cast inside: a bfloat16 model takes the float32 that a front end makes."""
    model = encoder(2).bfloat16()
    tokens, _ = model(torch.randn(1, 16, 100), torch.tensor([100]))
    assert tokens.dtype is torch.bfloat16


@pytest.mark.parametrize("count", [1, 480, 16000, 16001, 40000])
def test_a_clips_tokens_are_counted_before_they_are_made(count):
    model = encoder(2)
    items, total = model.preprocess((np.full(count, 0.1, np.float32), 16000))
    tokens, counts = model(**items)
    assert len(tokens) == total == int(counts.sum())
    assert torch.equal(counts, items["counts"])
    assert items["window"].tolist() == list(range(len(counts)))


def test_recomputing_layers_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        model = encoder(2).train()
        model.recompute = recompute
        tokens, _ = model(torch.ones(1, 16, 100), torch.tensor([100]))
        tokens.square().sum().backward()
        grads.append(model.conv1.weight.grad)
    torch.testing.assert_close(*grads)


def test_a_clip_over_the_longest_is_cut_aloud():
    hears = encoder(2)
    with pytest.warns(UserWarning, match="clips over 10 s are cut"):
        items, _ = hears.preprocess((np.zeros(160001, np.float32), 16000))
    assert len(items["lengths"]) == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hears.preprocess((np.zeros(160000, np.float32), 16000))


@torch.no_grad()
def test_a_wider_pool_averages_as_many_tokens_and_drops_the_rest():
    """Worked by hand from the tokens before the pool, which an encoder without a last norm shows."""
    single, pooled = encoder(1), encoder(7)
    single.layer_norm = pooled.layer_norm = torch.nn.Identity()
    features = torch.randn(7, 16, 100)
    tokens, many = single(features, LENGTHS)
    found, few = pooled(features, LENGTHS)
    assert few.tolist() == [7, 0, 0, 0, 3, 7, 7]
    rows = [row[: len(row) // 7 * 7].unflatten(0, (-1, 7)).mean(1) for row in tokens.split(many.tolist())]
    torch.testing.assert_close(found, torch.cat(rows))
    assert (pooled.tokens_per_window, pooled.step_seconds) == (7, pytest.approx(0.14))


@pytest.mark.parametrize("pool", [0, -1, True])
def test_a_pool_that_is_no_number_of_tokens_is_refused(pool):
    with pytest.raises(ConfigError, match="how many tokens"):
        encoder(pool)


def test_a_frozen_encoder_gives_the_same_tokens_and_is_never_trained():
    plain, frozen = encoder(2), FrozenEncoder(encoder(2))
    clip = (np.random.default_rng(0).standard_normal(37000) * 0.1).astype(np.float32)
    items, total = plain.preprocess((clip, 16000))
    tokens, counts = plain(**items)
    made, same = frozen.preprocess((clip, 16000))
    found, again = frozen(**made)
    assert total == same
    assert torch.equal(counts, again)
    torch.testing.assert_close(found, tokens)
    assert not list(frozen.parameters())
    with pytest.raises(ConfigError, match="nothing matches"):
        set_trainable(frozen, ["*"])
    assert set(frozen.state_dict()) == {f"encoder.{name}" for name in plain.state_dict()}


def test_another_rate_is_refused():
    with pytest.raises(BadDataError, match="44100"):
        encoder(2).preprocess((np.zeros(100, np.float32), 44100))
