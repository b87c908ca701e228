"""Silence and swaps in place of audio, on small sequences whose clips are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.data.audio_controls import controlled


def example(name, *clips, key=True):
    content = [
        {
            "type": "audio",
            "value": np.full(10 + n, n, np.float32),
            "rate": 16000,
            **({"key": f"clip{n}"} if key else {}),
        }
        for n in clips
    ]
    content.append({"type": "text", "value": f"question {name}"})
    return {"id": name, "messages": [{"role": "user", "content": content}], "answer": name, "meta": {"of": name}}


def heard(example):
    """The numbers of an example's clips, read from their samples."""
    return [int(c["value"][0]) for m in example["messages"] for c in m["content"] if c["type"] == "audio"]


def test_real_is_the_same_object():
    examples = [example("a", 1)]
    assert controlled(examples) is examples
    with pytest.raises(ConfigError, match="audio is real, silent, swapped, not 'quiet'"):
        controlled(examples, "quiet")


def test_silence_has_the_length_of_the_clip_and_nothing_else_changes():
    examples = [example("a", 1), example("b", 2, 3)]
    silent = controlled(examples, "silent")
    assert len(silent) == 2
    first, second = (c["messages"][0]["content"] for c in silent[:2])
    assert first[0]["value"].shape == (11,)
    assert not first[0]["value"].any()
    assert first[0]["rate"] == 16000
    assert first[1] == examples[0]["messages"][0]["content"][1]
    assert [len(c["value"]) for c in second[:2]] == [12, 13]
    assert silent[0]["answer"] == "a"
    assert silent[0]["meta"] == {"of": "a", "audio": "silent"}
    assert heard(examples[0]) == [1]  # the example itself is as it was
    # Features may be kept by key: silence must not be taken for the clip, nor for longer silence.
    assert len({"clip1", first[0]["key"], second[0]["key"]}) == 3


@pytest.mark.parametrize("size", [2, 3, 50])
def test_every_clip_goes_to_exactly_one_other(size):
    examples = [example(str(n), n) for n in range(size)]
    swapped = controlled(examples, "swapped", seed=3)
    got = [heard(e)[0] for e in swapped]
    assert sorted(got) == list(range(size))
    assert all(n != at for at, n in enumerate(got))
    assert [heard(e)[0] for e in controlled(examples, "swapped", seed=3)] == got  # fixed
    assert [e["messages"][0]["content"][1]["value"] for e in swapped] == [f"question {n}" for n in range(size)]
    assert swapped[0]["meta"]["audio"] == "swapped"
    assert swapped[-1]["id"] == str(size - 1)
    assert swapped[0]["messages"][0]["content"][0]["key"] == f"clip{got[0]}"


def test_another_seed_swaps_otherwise():
    examples = [example(str(n), n) for n in range(50)]
    assert [heard(e) for e in controlled(examples, "swapped", 0)] != [
        heard(e) for e in controlled(examples, "swapped", 1)
    ]


def test_the_exchange_depends_on_the_clips_and_not_on_their_order():
    examples = [example(str(n), n) for n in range(20)]
    there = [heard(e)[0] for e in controlled(examples, "swapped", 5)]
    back = [heard(e)[0] for e in controlled(examples[::-1], "swapped", 5)][::-1]
    assert back == there
    # A slice is exchanged as the whole is, and the examples themselves stay as they were.
    assert [heard(e)[0] for e in controlled(examples, "swapped", 5)[3:6]] == there[3:6]
    assert [heard(e)[0] for e in examples] == list(range(20))


def test_questions_about_one_clip_share_another():
    examples = [example("a", 1), example("b", 1), example("c", 2)]
    assert [heard(e) for e in controlled(examples, "swapped")] == [[2], [2], [1]]


def test_a_clip_does_not_move_within_its_item():
    examples = [example("a", 1, 2), example("b", 3), example("c", 4)]
    for seed in range(20):
        swapped = controlled(examples, "swapped", seed)
        assert not {1, 2} & set(heard(swapped[0]))
        assert len(heard(swapped[0])) == 2


def test_what_cannot_be_swapped():
    for examples in ([example("a", 1)], [example("a", 1), example("b", 1)], [example("a", 1, 2)]):
        with pytest.raises(ConfigError, match="audio=swapped needs clips of different items"):
            controlled(examples, "swapped")[0]
    assert heard(controlled([example("a"), example("b", 1), example("c", 2)], "swapped")[0]) == []


def test_clips_without_keys_are_clips_of_their_own():
    examples = [example("a", 1, key=False), example("b", 1, key=False)]
    assert [heard(e) for e in controlled(examples, "swapped")] == [[1], [1]]


def test_a_sequence_that_knows_its_keys_is_read_when_asked_alone():
    class Lazy(Sequence):
        audio_keys = [("clip0",), ("clip1",), ("clip2",)]

        def __init__(self):
            self.read = []

        def __len__(self):
            return 3

        def __getitem__(self, at):
            self.read.append(at)
            return example(str(at), at)

    lazy = Lazy()
    swapped = controlled(lazy, "swapped")
    assert len(swapped) == 3
    got = heard(swapped[1])[0]
    assert lazy.read == [1, got]
