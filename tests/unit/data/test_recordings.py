"""Real recordings: what their files say, and speech over music at the level that is asked for."""

import numpy as np
import pytest

from bestiary.shared.audio.files import read_audio
from bestiary.shared.core.build import build
from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.core.protocols import DataSource
from bestiary.shared.core.streams import Stream
from bestiary.shared.data import recordings
from bestiary.shared.data.recordings import SOUNDS, LibriVox, SonicPi, mixed
from bestiary.shared.rl.rewards.registry import make_verifier


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def audio_of(example):
    return example["messages"][0]["content"][0]


class Music:
    """A data set whose test clips are tones: clip n has n + 1 periods in its 400 samples, at 8 kHz."""

    revision = "tones"

    def __init__(self, clips=10):
        self.clips, self.asked = clips, 0

    def check(self):
        self.asked += 1

    def held_out(self, split, part=None):
        assert split == "test"
        t = np.arange(400) / 400
        return [
            {
                "id": str(n),
                "messages": [
                    {"role": "system", "content": [{"type": "text", "value": "listen"}]},
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "value": "what is it"},
                            {
                                "type": "audio",
                                "value": np.sin(2 * np.pi * (n + 1) * t).astype(np.float32),
                                "rate": 8000,
                            },
                        ],
                    },
                ],
            }
            for n in range(self.clips)
        ]


def test_sounds_are_named_by_their_files(need_asset):
    """Counted from the file names by a plain rule of the shell's kind, not by the class."""
    folder = need_asset("sonic_pi_samples")
    source = SonicPi(choices=0)
    source.check()
    assert isinstance(source, DataSource)
    examples = source.held_out("test")
    assert len(examples) == sum(len(list(folder.glob(f"{prefix}_*.flac"))) for prefix in SOUNDS) > 100
    by_id = {path.stem: i for i, path in enumerate(source.files)}
    guitar = examples[by_id["guit_harmonics"]]
    assert guitar["answer"] == "guitar"
    assert guitar["verifier"] == "exact_text"
    assert guitar["messages"][0]["content"][1]["value"] == "What kind of sound is this?"
    assert np.array_equal(audio_of(guitar)["value"], read_audio(folder / "guit_harmonics.flac", 16000))
    assert examples[by_id["bd_808"]]["answer"] == "bass drum"
    assert not [path for path in source.files if path.stem.startswith("misc")]


def test_choices_hold_the_right_one_once_and_letters_are_spread(need_asset):
    need_asset("sonic_pi_samples")
    examples = SonicPi(choices=4).held_out("test")[:80]
    verifier = make_verifier("multiple_choice")
    letters = []
    for example in examples:
        options = example["meta"]["options"]
        assert len(set(options.values())) == 4
        assert options[example["answer"]] == example["meta"]["class"]
        assert all(f"({k}) {v}" in example["messages"][0]["content"][1]["value"] for k, v in options.items())
        assert verifier.verify(example["answer"], f"({example['answer']})", example).score == 1
        letters.append(example["answer"])
    assert min(letters.count(letter) for letter in "ABCD") > 8
    again = SonicPi(choices=4).held_out("test")
    assert again[5]["meta"] == examples[5]["meta"]
    with pytest.raises(ConfigError, match="choices is 0, or 2 to 12"):
        SonicPi(choices=1)


@pytest.mark.parametrize("make", [SonicPi, LibriVox])
def test_nothing_is_trained_on_a_test_set(make):
    source = make()
    with pytest.raises(ConfigError, match="is a test set"):
        source.train_example(0, Stream(0, "sft", 4))
    assert list(source.held_out("val")) == []
    with pytest.raises(ConfigError, match="holds out val and test"):
        source.held_out("train")
    assert source.spec().task == "chat"


def test_sentences_and_their_words(need_asset):
    folder = need_asset("pocketsphinx_testdata") / "librivox"
    source = LibriVox()
    source.check()
    examples = source.held_out("test")
    assert len(examples) == len(list(folder.glob("*.wav"))) == 5
    words = (folder / "transcription").read_text()
    for example in examples:
        assert f"<s> {example['answer']} </s> ({example['id']})" in words
        assert np.array_equal(audio_of(example)["value"], read_audio(folder / f"{example['id']}.wav"))
        assert example["meta"]["task"] == "transcription"
    assert examples[-1]["id"] == examples[4]["id"]
    with pytest.raises(IndexError):
        examples[5]


def test_speech_over_music_at_each_level(need_asset):
    need_asset("pocketsphinx_testdata")
    music = Music()
    source = LibriVox(accompaniment=music, snr_db=[20, 0])
    source.check()
    assert music.asked == 1
    clean, examples = LibriVox().held_out("test"), source.held_out("test")
    assert len(examples) == 10
    assert len({audio_of(e)["key"] for e in [*examples, *clean]}) == 15
    for n, level in ((0, 20), (1, 0), (6, 20)):
        speech, both = audio_of(clean[n // 2])["value"], audio_of(examples[n])["value"]
        assert examples[n]["answer"] == clean[n // 2]["answer"]
        # Least squares finds how loud the speech still is; the rest is the music.
        share = float(speech.astype(np.float64) @ both / (speech.astype(np.float64) @ speech))
        rest = both - share * speech
        assert 20 * np.log10(rms(share * speech) / rms(rest)) == pytest.approx(level, abs=0.2)
        assert examples[n]["meta"]["snr_db"] == level
    assert source.revision != LibriVox().revision
    # Both levels of a sentence have one piece of music.
    a, b = (audio_of(examples[n])["value"] - audio_of(clean[0])["value"] for n in (0, 1))
    assert abs(np.corrcoef(a, b)[0, 1]) > 0.99


def test_the_level_is_exact_and_nothing_clips():
    rng = np.random.default_rng(0)
    speech, music = rng.normal(0, 0.01, 4000), rng.normal(0, 0.3, 4000)
    both = mixed(speech, music, 6.0)
    assert 20 * np.log10(rms(speech) / rms(both - speech)) == pytest.approx(6.0, abs=1e-3)
    loud = mixed(speech * 80, music, 0.0)
    assert np.abs(loud).max() <= 1
    with pytest.raises(BadDataError, match="silence"):
        mixed(speech, np.zeros(4000), 6.0)


def test_music_and_level_go_together_and_a_node_builds_both(need_asset):
    with pytest.raises(ConfigError, match="go together"):
        LibriVox(snr_db=3)
    with pytest.raises(ConfigError, match="go together"):
        LibriVox(accompaniment=Music())
    need_asset("pocketsphinx_testdata")
    need_asset("sonic_pi_samples")
    here = "bestiary.shared.data.recordings"
    node = {"_target_": f"{here}.LibriVox", "accompaniment": {"_target_": f"{here}.SonicPi"}, "snr_db": 10}
    source = build(node)
    assert isinstance(source.accompaniment, SonicPi)
    assert len(source.held_out("test")) == 5
    assert not np.array_equal(*(audio_of(s.held_out("test")[1])["value"] for s in (source, LibriVox())))


def test_an_accompaniment_without_clips_is_named(need_asset):
    need_asset("pocketsphinx_testdata")
    with pytest.raises(BadDataError, match="no test examples"):
        LibriVox(accompaniment=Music(0), snr_db=3).held_out("test")[0]


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A folder in the place of the assets', with two sentences of one tone each and three sounds."""
    soundfile = pytest.importorskip("soundfile")
    monkeypatch.setattr(recordings, "asset_path", lambda name: tmp_path)
    (tmp_path / "librivox").mkdir()
    t = np.arange(8000) / 8000
    for n, name in enumerate(("one", "two")):
        tone = 0.2 * np.sin(2 * np.pi * (1000 + 500 * n) * t)
        soundfile.write(tmp_path / "librivox" / f"{name}.wav", tone, 8000, subtype="FLOAT")
    (tmp_path / "librivox" / "transcription").write_text("<s> he said </s> (one)\n<s> so it's </s> (two)\n")
    for name in ("bd_808", "guit_e_slide", "misc_crow"):
        soundfile.write(tmp_path / f"{name}.flac", 0.1 * np.sin(t), 8000)
    return tmp_path


def power_at(samples, rate: int, hertz: float) -> float:
    """Of a sine of that many whole periods in the clip, by its Fourier coefficient."""
    turns = np.exp(-2j * np.pi * hertz * np.arange(len(samples)) / rate)
    return 2 * abs(np.mean(samples * turns)) ** 2


@pytest.mark.parametrize("level", [-10, 0, 2.5, 30])
def test_the_level_is_measured_from_the_two_parts_of_the_sum(assets, level):
    """Speech and music are tones of different pitches, so a Fourier coefficient is the power of each in the sum."""
    examples = LibriVox(rate=8000, accompaniment=Music(), snr_db=level).held_out("test")
    assert [e["id"] for e in examples] == [f"one-{level:g}db", f"two-{level:g}db"]
    for n, example in enumerate(examples):
        both = audio_of(example)["value"].astype(np.float64)
        assert len(both) == 8000
        # Sentence 0 gets clip 0 of ten and sentence 1 clip 5: one and six periods in 400 samples, again and again.
        speech, music = power_at(both, 8000, 1000 + 500 * n), power_at(both, 8000, (1, 6)[n] * 20)
        assert speech + music == pytest.approx(rms(both) ** 2, rel=1e-5)
        assert 10 * np.log10(speech / music) == pytest.approx(level, abs=1e-3)
        assert np.abs(both).max() <= 1
        if level >= 0:
            assert speech == pytest.approx(0.2**2 / 2, rel=1e-3)  # nothing clipped: as loud as it was


def test_levels_that_are_none():
    for level in ("loud", [3, 3], [float("nan")], True, [0, "3"]):
        with pytest.raises(ConfigError, match="snr_db is a number of decibels"):
            LibriVox(accompaniment=Music(), snr_db=level)
    assert len(LibriVox(snr_db=None).levels) == 1


def test_sentences_of_a_folder(assets):
    examples = LibriVox(rate=8000).held_out("test")
    assert [(e["id"], e["answer"]) for e in examples] == [("one", "he said"), ("two", "so it's")]
    assert power_at(audio_of(examples[1])["value"], 8000, 1500) == pytest.approx(0.02, rel=1e-3)
    # At another rate it is the same tone, with twice the samples.
    twice = audio_of(LibriVox(rate=16000).held_out("test")[0])
    assert (twice["rate"], len(twice["value"])) == (16000, 16000)
    assert power_at(twice["value"], 16000, 1000) == pytest.approx(0.02, rel=1e-2)
    (assets / "librivox" / "transcription").write_text("he said (one)\n")
    with pytest.raises(BadDataError, match=r"transcription: 'he said \(one\)' is no line of words and a name"):
        len(LibriVox().held_out("test"))


def test_sounds_of_a_folder(assets):
    examples = SonicPi(rate=8000, choices=12).held_out("test")
    assert [(e["id"], e["meta"]["class"]) for e in examples] == [("bd_808", "bass drum"), ("guit_e_slide", "guitar")]
    for example in examples:
        assert sorted(example["meta"]["options"].values()) == sorted(SOUNDS.values())
        assert list(example["meta"]["options"]) == list("ABCDEFGHIJKL")


@pytest.mark.parametrize(("make", "name"), [(SonicPi, "sonic_pi_samples"), (LibriVox, "pocketsphinx_testdata")])
def test_what_is_not_there_says_how_to_get_it(make, name, tmp_path, monkeypatch):
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path))
    with pytest.raises(MissingDataError, match=rf"python tools/fetch\.py {name}$"):
        make().check()
