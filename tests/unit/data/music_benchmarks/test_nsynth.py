"""NSynth's notes in their public layout."""

from __future__ import annotations

import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.data.music_benchmarks.nsynth import FAMILIES, NSynth
from bestiary.shared.rl.rewards.registry import make_verifier, self_test


def note(name="synth_lead_synthetic_001-060-050", **changes):
    family, _, rest = name.rpartition("_synthetic_")
    return {
        "note_str": name,
        "instrument_str": name.rpartition("-")[0].rpartition("-")[0],
        "instrument_source_str": "synthetic",
        "instrument_source": 2,
        "instrument_family_str": family,
        "instrument_family": 9,
        "pitch": int(rest.split("-")[1]),
        "velocity": 50,
        "qualities_str": ["dark"],
        "sample_rate": 16000,
        **changes,
    }


NOTES = [note(), note("bass_synthetic_033-022-075")]


@pytest.mark.parametrize("below", ["", "nsynth-test/"])
def test_three_tasks(below, tone, put, tmp_path, pieces):
    for one in NOTES:
        tone(f"{below}audio/{one['note_str']}.wav")
    put(f"{below}examples.json", {one["note_str"]: one for one in NOTES})
    source = NSynth(tmp_path)
    source.check()
    examples = source.held_out("test")
    assert [e["id"].rpartition("-")[2] for e in examples] == ["source", "instrument", "pitch"] * 2
    answers = {e["meta"]["task"]: (e["answer"], e["verifier"]) for e in examples[:3]}
    assert answers == {
        "source": ("synthetic", "exact_text"),
        "instrument": ("synth lead", "exact_text"),
        "pitch": ("60", "numeric"),
    }
    assert examples[1]["meta"]["labels"] == list(FAMILIES)
    assert len(FAMILIES) == 11
    for family in FAMILIES:
        assert family.replace("_", " ") in pieces(examples[1])[1]
    assert [e["answer"] for e in source.held_out("test", "pitch")] == ["60", "22"]
    verifiers = {name: make_verifier(name) for name in ("exact_text", "numeric")}
    self_test(verifiers, list(examples))
    only = NSynth(tmp_path, tasks=["pitch"], prompts={"pitch": "MIDI?"}).held_out("test")
    assert [pieces(e)[1] for e in only] == ["MIDI?"] * 2


def test_faults(tone, put, tmp_path):
    tone(f"audio/{NOTES[0]['note_str']}.wav")
    rows = {
        NOTES[0]["note_str"]: note(pitch=128, instrument_source_str="sampled"),
        NOTES[1]["note_str"]: NOTES[1],
    }
    put("examples.json", rows)
    with pytest.raises(BadDataError) as told:
        NSynth(tmp_path).check()
    for part in ("its source 'sampled' is not one of acoustic", "its pitch 128 is not a MIDI number", "no audio file"):
        assert part in str(told.value)
    put("examples.json", {"x": {"instrument": 3}})
    with pytest.raises(BadDataError, match=r"no field for source \(looked for instrument_source_str\)"):
        NSynth(tmp_path).check()
    with pytest.raises(ConfigError, match="nsynth has no task 'pich'; did you mean 'pitch'"):
        NSynth(tmp_path, tasks=["pich"])
    with pytest.raises(ConfigError, match="part='family'"):
        NSynth(tmp_path).held_out("test", "family")
