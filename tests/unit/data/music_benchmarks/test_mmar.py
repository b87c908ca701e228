"""MMAR in its public layout."""

from __future__ import annotations

import pytest

from bestiary.shared.data.music_benchmarks.mmau import MMAR
from bestiary.shared.metrics.audio_matchers import MATCHERS
from bestiary.shared.rl.rewards.registry import make_verifier, self_test


def item(name, modality="music", **changes):
    return {
        "id": f"{name}_00-00-10_00-00-40",
        "audio_path": f"./audio/{name}_00-00-10_00-00-40.wav",
        "question": "In which order do the instruments enter?",
        "choices": ["Flute, violin", "Violin, flute", "Both together"],
        "answer": "Violin, flute",
        "modality": modality,
        "category": "Perception Layer",
        "sub-category": "Music Theory",
        "language": "en",
        "source": "youtube",
        "url": "https://host/watch",
        "timestamp": "00:10,00:40",
        **changes,
    }


@pytest.fixture
def folder(tmp_path, tone, put):
    rows = [
        item("m"),
        item("x", "mix-music-speech"),
        item("n", choices=["Yes", "No"], answer="No"),
        item("s", "speech"),
    ]
    for value, name in enumerate("mxns", 1):
        tone(f"audio/{name}_00-00-10_00-00-40.wav", value / 10)
    put("MMAR-meta.json", rows)
    return tmp_path


def test_the_music_part(folder, pieces):
    source = MMAR(folder)
    source.check()
    first, second = source.held_out("test")
    audio, text = pieces(first)
    assert text == (
        "In which order do the instruments enter?\nChoose the correct option from the following options:\n"
        "(A) Flute, violin\n(B) Violin, flute\n(C) Both together"
    )
    assert audio[0]["value"][0] == pytest.approx(0.1)
    assert (first["id"], first["answer"], first["verifier"]) == ("m_00-00-10_00-00-40", "B", "multiple_choice")
    assert first["meta"] == {
        "options": ["Flute, violin", "Violin, flute", "Both together"],
        "modality": "music",
        "category": "Perception Layer",
        "sub_category": "Music Theory",
        "language": "en",
        "answer_text": "Violin, flute",
    }
    assert second["answer"] == "B"
    self_test({"multiple_choice": make_verifier("multiple_choice")}, [first, second])
    # MMAU's rule, which the benchmark's own program takes: all words of the gold option, none of another alone.
    assert MATCHERS["mmau_words"]("It is violin, flute.", first).right
    assert not MATCHERS["mmau_words"]("Both together.", first).right


def test_other_modalities(folder):
    assert [e["id"][0] for e in MMAR(folder, modality="mix-music-speech").held_out("test")] == ["x"]
    assert [e["id"][0] for e in MMAR(folder, modality=None).held_out("test")] == ["m", "x", "n", "s"]
    assert MMAR(folder).revision == MMAR(folder, modality=None).revision  # of the file
    assert MMAR(folder).revision.startswith("mmar-")
    assert MMAR(folder, audio="silent").revision.endswith("-silent")
