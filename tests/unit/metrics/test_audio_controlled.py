"""A protocol under control hears what the controls give, and says so in its names."""

import numpy as np
import pytest

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.metrics.audio_controlled import AudioControlled


class Loudness:
    """The first sample of the clip that each example asks about."""

    name, version = "loudness", "3"

    def __call__(self, model, examples):
        return {e["id"]: float(e["messages"][0]["content"][0]["value"][0]) for e in examples}


EXAMPLES = [
    {
        "id": name,
        "meta": {},
        "messages": [
            {
                "role": "user",
                "content": [{"type": "audio", "value": np.full(8, level, np.float32), "rate": 16000, "key": name}],
            }
        ],
    }
    for name, level in (("a", 0.1), ("b", 0.2), ("c", 0.3))
]


def heard(audio, seed=0):
    return AudioControlled(Loudness(), audio, seed)(None, EXAMPLES)


def test_silence_is_heard_and_named():
    assert heard("silent") == {"silent/a": 0.0, "silent/b": 0.0, "silent/c": 0.0}


def test_everyone_hears_another_clip():
    found = heard("swapped")
    own = {"swapped/a": 0.1, "swapped/b": 0.2, "swapped/c": 0.3}
    assert found.keys() == own.keys()
    assert all(found[name] != pytest.approx(own[name]) for name in own)
    assert sorted(found.values()) == pytest.approx([0.1, 0.2, 0.3])


def test_a_single_clip_has_no_other():
    assert AudioControlled(Loudness(), "swapped")(None, EXAMPLES[:1]) == {}
    assert AudioControlled(Loudness(), "silent")(None, EXAMPLES[:1]) == {"silent/a": 0.0}


def test_real_audio_changes_nothing():
    assert heard("real") == pytest.approx({"a": 0.1, "b": 0.2, "c": 0.3})


def test_it_is_the_protocol_that_it_controls():
    made = AudioControlled(Loudness(), "silent")
    assert (made.name, made.version) == ("loudness", "3")
    with pytest.raises(ConfigError, match="real, silent, swapped, not 'mute'"):
        AudioControlled(Loudness(), "mute")
