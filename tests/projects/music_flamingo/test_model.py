"""Music Flamingo against transformers' classes on the same weights, and where others fail."""

import numpy as np
import pytest
import torch

from bestiary.projects.music_flamingo.model import MusicFlamingo
from bestiary.shared.audio.frozen import freeze_encoder
from bestiary.shared.audio.mel import LogMel
from bestiary.shared.audio.whisper_encoder import WhisperEncoder
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.hub.music_flamingo import our_name, save_pretrained
from bestiary.shared.language.hf_causal_lm import HFCausalLM
from bestiary.shared.language.hybrid.config import HybridConfig
from bestiary.shared.language.hybrid.model import HybridLM
from bestiary.shared.losses.attributes import add_attribute_heads
from bestiary.shared.losses.causal_lm import CausalLM as Objective

pytest.importorskip("torchaudio")
transformers = pytest.importorskip("transformers")
RATE = 16000
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "num_key_value_heads": 2, "vocab_size": 300}
AUDIO = {"num_mel_bins": 16, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def flamingo(
    music: bool = True, backbone=None, seconds: float = 1.0, path=None, hop: int = 160, **options
) -> MusicFlamingo:
    """A tiny model; windows of one second."""
    torch.manual_seed(0)
    front_end = LogMel(n_mels=16, hop=hop, window_seconds=seconds, max_seconds=40 * seconds)
    encoder = WhisperEncoder(front_end, width=40, layers=2, heads=4, ffn=64)
    backbone = backbone or HFCausalLM("qwen2", {**TEXT, "tie_word_embeddings": False}, "byte")
    return MusicFlamingo(backbone, encoder, {} if music else None, boundaries=music, path=path, **options).eval()


def peer(model: MusicFlamingo, music: bool):
    """transformers' class with weights at random, large enough for a mistake to show."""
    audio = {**AUDIO, "model_type": "audioflamingo3_encoder", "intermediate_size": 64, "max_source_positions": 50}
    values = {"audio_config": audio, "text_config": {**TEXT, "model_type": "qwen2"}, "audio_token_id": model.sound_id}
    if music:
        values |= dict(zip(("audio_bos_token_id", "audio_eos_token_id"), model.boundary_ids, strict=True))
        net = transformers.MusicFlamingoForConditionalGeneration(transformers.MusicFlamingoConfig(**values))
    else:
        net = transformers.AudioFlamingo3ForConditionalGeneration(transformers.AudioFlamingo3Config(**values))
    torch.manual_seed(1)
    for parameter in net.parameters():
        parameter.data.uniform_(-0.3, 0.3)
    return net.eval()


def clip(seconds: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(max(1, int(seconds * RATE))) * 0.1).astype(np.float32)


def sound(samples: np.ndarray) -> dict:
    return {"type": "audio", "value": samples, "rate": RATE}


def ask(*content, name="a", **more) -> dict:
    parts = [{"type": "text", "value": c} if isinstance(c, str) else sound(c) for c in content]
    return {"id": name, "messages": [{"role": "user", "content": parts}], **more}


CLIPS = [
    ask(clip(2.3), "what?", name="long"),
    ask(clip(1.0, 1), "which instrument?", name="one"),
    ask(clip(0.3, 2), "key?", name="short"),
    ask(clip(2.3), "and", clip(0.3, 2), name="two"),
]


def theirs(net, batch, examples):
    """Logits of transformers' class, whose windows are cut as its processor cuts them."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    clips = [c["value"] for e in examples for m in e["messages"] for c in m["content"] if c["type"] == "audio"]
    windows = [samples[i : i + RATE] for samples in clips for i in range(0, len(samples), RATE)]
    made = extractor(windows, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
    return net(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        input_features=made["input_features"],
        input_features_mask=made["attention_mask"],
    ).logits


@torch.no_grad()
@pytest.mark.parametrize("music", [True, False])
def test_logits_are_transformers_both_ways(music, tmp_path):
    model = flamingo(music)
    net = peer(model, music)
    net.save_pretrained(tmp_path / "theirs")
    model = flamingo(music, path=str(tmp_path / "theirs"))
    batch = model.processor()(CLIPS, "prompt")
    seen = batch["attention_mask"].bool()
    wanted = theirs(net, batch, CLIPS)
    assert model(batch).logits[seen].sub(wanted[seen]).abs().max() < 1e-5
    save_pretrained(model, tmp_path / "ours")
    back = type(net).from_pretrained(tmp_path / "ours").eval()
    assert theirs(back, batch, CLIPS)[seen].sub(wanted[seen]).abs().max() < 1e-5


@torch.no_grad()
def test_a_trained_model_with_a_frozen_encoder_and_heads_is_written_as_a_plain_one(tmp_path):
    model, trained = flamingo(), flamingo()
    trained = freeze_encoder(add_attribute_heads(trained, {"instrument": 3}))
    trained.load_state_dict(
        {
            n.replace("encoder.", "encoder.encoder.", 1) if n.startswith("encoder.") else n: v
            for n, v in model.state_dict().items()
        },
        strict=False,
    )
    save_pretrained(trained, tmp_path)
    batch = model.processor()(CLIPS, "prompt")
    back = transformers.MusicFlamingoForConditionalGeneration.from_pretrained(tmp_path).eval()
    seen = batch["attention_mask"].bool()
    assert theirs(back, batch, CLIPS)[seen].sub(model(batch).logits[seen]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("model.audio_tower.conv1.weight", "encoder.conv1.weight"),
        ("audio_tower.layers.3.fc1.bias", "encoder.layers.3.fc1.bias"),
        ("audio_tower.sound_tower.pos_emb.freqs", None),
        ("multi_modal_projector.linear_1.bias", "projector.linear_1.bias"),
        ("multi_modal_projector.layers.2.weight", "projector.linear_2.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "backbone.lm.model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "backbone.lm.model.norm.weight"),
        ("language_model.lm_head.weight", "backbone.lm.lm_head.weight"),
        ("lm_head.weight", "backbone.lm.lm_head.weight"),
    ],
)
def test_old_and_new_names(key, ours):
    assert our_name(key) == ours


@torch.no_grad()
def test_the_released_files_names_and_nvidias_folders_load(tmp_path):
    """Three layouts of one checkpoint, a stray pos_emb.freqs in each, give one model."""
    from safetensors.torch import save_file

    model = flamingo()
    net = peer(model, True)
    net.save_pretrained(tmp_path / "new")
    state = {key: value.contiguous() for key, value in net.state_dict().items()}
    old = {
        key.replace("model.language_model.", "language_model.model.")
        .replace("lm_head.", "language_model.lm_head.")
        .removeprefix("model."): value
        for key, value in state.items()
    }
    stray = {"audio_tower.pos_emb.freqs": torch.zeros(3)}
    (tmp_path / "old").mkdir()
    save_file({**old, **stray}, tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    places = {"language_model.": "llm", "audio_tower.": "sound_tower", "multi_modal_projector.": "sound_mm_projector"}
    for prefix, folder in places.items():
        part = {k.removeprefix(prefix): v for k, v in {**old, **stray}.items() if k.startswith(prefix)}
        part = {k.replace("linear_1", "layers.0").replace("linear_2", "layers.2"): v for k, v in part.items()}
        (tmp_path / "parts" / folder).mkdir(parents=True)
        save_file(part, tmp_path / "parts" / folder / "model.safetensors")
    states = [flamingo(path=str(tmp_path / name)).state_dict() for name in ("new", "old", "parts")]
    for other in states[1:]:
        assert all(torch.equal(states[0][key], other[key]) for key in states[0])


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path):
    net = peer(flamingo(), True)
    net.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.boundaries is True there, False here"):
        flamingo(music=False, path=str(tmp_path))
    with pytest.raises(ConfigError, match="positions is 50 there, 100 here"):
        flamingo(seconds=2.0, path=str(tmp_path))
    wide = HFCausalLM("qwen2", {**TEXT, "hidden_size": 64, "tie_word_embeddings": False}, "byte")
    with pytest.raises(BadDataError, match=r"is \(300, 32\), and the model wants \(300, 64\)"):
        flamingo(backbone=wide, path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"model\.standardise is False there, True here"):
        flamingo(path=str(tmp_path), standardise=True)
    between = [flamingo(), flamingo(standardise=True)]
    between[0].rotary_time = None
    for model in between:
        with pytest.raises(ConfigError, match="between them"):
            save_pretrained(model, tmp_path / "x")


@torch.no_grad()
def test_a_clip_does_not_depend_on_its_batch():
    model = flamingo()
    model.load_state_dict({k: v.uniform_(-0.3, 0.3) for k, v in model.state_dict().items()})
    batch = model.processor()(CLIPS, "prompt")
    logits = model(batch).logits
    for row, example in enumerate(CLIPS):
        alone = model(model.processor()([example], "prompt")).logits[0]
        together = logits[row, batch["attention_mask"][row].bool()]
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    sampling = Sampling(8, temperature=1.0, seed=3)
    texts = model.generate(batch, 2, sampling).texts
    for row, example in enumerate(CLIPS):
        one = model.generate(model.processor()([example], "prompt"), 2, sampling).texts
        assert one == texts[2 * row : 2 * row + 2]


class Clips:
    """Training clips without end."""

    def train_example(self, k, stream, part=None):
        return CLIPS[k % len(CLIPS)]


def test_standardised_channels_are_the_same_in_training_and_for_a_clip_alone():
    model = flamingo(standardise=True)
    batch = model.processor()(CLIPS, "prompt")
    with torch.no_grad():
        plain = model(batch).logits
        model.adapt_to(Clips())
        trained = model.train()(batch).logits
        heard = model.eval()(batch).logits
        torch.testing.assert_close(heard, trained)
        assert not torch.allclose(heard, plain, atol=1e-3)
        alone = model(model.processor()(CLIPS[:1], "prompt")).logits[0]
    torch.testing.assert_close(alone, heard[0, batch["attention_mask"][0].bool()], atol=1e-5, rtol=0)
    other = flamingo(standardise=True)
    other.load_state_dict(model.state_dict())
    other.adapt_to(None)  # a run that goes on from another keeps what its projector knows
    with torch.no_grad():
        torch.testing.assert_close(other(batch).logits, heard)


def test_standardised_channels_have_mean_0_and_deviation_1_on_the_clips():
    model = flamingo(standardise=True)
    model.adapt_to(Clips())
    media = model.processor()(CLIPS, "prompt")["media"]["audio"]
    with torch.no_grad():
        tokens = model.channel_norm(model.encoder(media["features"], media["lengths"])[0])
    # 128 clips go round the list: the first ones stand in once more, and weigh next to nothing.
    assert tokens.mean(0).abs().max() < 0.05
    assert (tokens.std(0) - 1).abs().max() < 0.05
    flamingo().adapt_to(None)  # nothing to find where nothing is standardised


def test_rollouts_encode_a_clip_once_for_its_group(monkeypatch):
    model = flamingo()
    seen = []
    original = model.encode_audio
    monkeypatch.setattr(model, "encode_audio", lambda media: seen.append(len(media["owner"])) or original(media))
    model.generate(model.processor()(CLIPS, "prompt"), 5, Sampling(4, temperature=1.0))
    assert seen == [3 + 1 + 1 + 3 + 1]  # windows of the prompts, not of their 20 completions


def test_features_are_cast_inside_the_model():
    model = flamingo().bfloat16()
    batch = model.processor()(CLIPS, "prompt")
    assert batch["media"]["audio"]["features"].dtype is torch.float32
    assert model(batch).logits.dtype is torch.bfloat16
    assert len(model.generate(batch, 1, Sampling(2)).texts) == 4


def test_the_loss_covers_the_assistants_words_alone():
    model = flamingo()
    batch = model.processor()([ask(clip(1.2), "which?", answer="flute")], "train")
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    kept = labels != -100
    assert model.backbone.tokenizer.decode(ids[kept].tolist()) == "flute"
    assert int(kept.sum()) == 6  # five letters and the end
    loss = Objective().loss(model, batch, None)
    loss.loss_sum.backward()
    for part in (model.encoder.conv1.weight, model.projector.linear_1.weight):
        assert part.grad.abs().sum() > 0


@torch.no_grad()
def test_twenty_minutes_silence_and_one_sample():
    model = flamingo(seconds=30.0, hop=1600)
    twenty = ask(np.zeros(1200 * RATE, np.float32), "?", name="silence")
    one = ask(np.full(1, 0.5, np.float32), "?", name="sample")
    batch = model.processor()([twenty, one], "prompt")
    assert batch["media"]["audio"]["counts"].tolist() == [75] * 40 + [0]
    logits = model(batch).logits
    assert logits[batch["attention_mask"].bool()].isfinite().all()


@torch.no_grad()
def test_the_hybrid_stack_reads_audio_too():
    shape = {"hidden_size": 32, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
    hybrid = HybridLM(HybridConfig(pattern="M*-", **shape, **attention), tokenizer="byte")
    model = flamingo(backbone=hybrid)
    batch = model.processor()(CLIPS, "prompt")
    logits = model(batch).logits
    alone = model(model.processor()(CLIPS[:1], "prompt")).logits[0]
    torch.testing.assert_close(alone, logits[0, batch["attention_mask"][0].bool()], atol=1e-4, rtol=0)
    assert len(model.generate(batch, 1, Sampling(3)).texts) == 4


@torch.no_grad()
def test_time_is_heard_only_with_rotary_time():
    """A window that comes second is another thing than the same window first, though its content is the same."""
    batches = [ask(clip(1.0), "?"), ask(np.concatenate([clip(1.0, 5), clip(1.0)]), "?")]
    for music in (True, False):
        model = flamingo(music)
        media = [model.processor()([e], "prompt")["media"]["audio"] for e in batches]
        first, second = model.encode_audio(media[0]), model.encode_audio(media[1])[25:]
        assert torch.allclose(first, second, atol=1e-5) is not music
