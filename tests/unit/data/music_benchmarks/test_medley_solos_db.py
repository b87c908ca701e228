"""Medley-solos-DB in its public layout."""

from __future__ import annotations

import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.data.music_benchmarks.medley_solos_db import INSTRUMENTS, PROMPT, MedleySolosDB
from bestiary.shared.metrics.audio_matchers import MATCHERS
from bestiary.shared.rl.rewards.registry import make_verifier, self_test

HEAD = "subset,instrument,instrument_id,song_id,uuid4\n"
IDS = {
    "clarinet": 0,
    "distorted electric guitar": 1,
    "female singer": 2,
    "flute": 3,
    "piano": 4,
    "tenor saxophone": 5,
    "trumpet": 6,
    "violin": 7,
}


def rows() -> list[str]:
    """A test clip of each instrument, and two more of other subsets."""
    lines = [f"test,{name},{at},{200 + at},uuid-{at}" for name, at in IDS.items()]
    return [*lines, "training,piano,4,7,uuid-t", "validation,flute,3,8,uuid-v"]


@pytest.mark.parametrize("ending", [".wav", ".wav.wav"])
@pytest.mark.parametrize(("metadata", "below"), [("", ""), ("annotation/", "audio/"), ("", "Medley-solos-DB/")])
def test_the_test_subset(ending, metadata, below, put, tone, tmp_path, pieces):
    put(f"{metadata}Medley-solos-DB_metadata.csv", HEAD + "\n".join(rows()) + "\n")
    for name, at in IDS.items():
        tone(f"{below}Medley-solos-DB_test-{IDS[name]}_uuid-{at}{ending}", (at + 1) / 10)
    source = MedleySolosDB(tmp_path)
    source.check()
    examples = source.held_out("test")
    assert [(e["id"], e["answer"]) for e in examples] == [(f"uuid-{at}", name) for name, at in IDS.items()]
    for at, example in enumerate(examples):
        audio, text = pieces(example)
        assert audio[0]["value"][0] == pytest.approx((at + 1) / 10)
        assert text == PROMPT
        assert example["meta"] == {"task": "instrument", "labels": list(IDS), "song": str(200 + at)}
        assert example["answer"] in PROMPT
    assert list(INSTRUMENTS) == list(IDS)
    self_test({"exact_text": make_verifier("exact_text")}, list(examples))
    assert MATCHERS["label"]("Female Singer.", examples[2]).right
    assert MATCHERS["label"]("a singer", examples[2]).choice is None


def test_other_subsets_and_faults(put, tone, tmp_path):
    put("Medley-solos-DB_metadata.csv", HEAD + "\n".join(rows()))
    tone("Medley-solos-DB_training-4_uuid-t.wav")
    assert [e["id"] for e in MedleySolosDB(tmp_path, subset="training").held_out("test")] == ["uuid-t"]
    with pytest.raises(ConfigError, match="no row whose subset is 'train'; did you mean 'training'"):
        MedleySolosDB(tmp_path, subset="train").check()
    with pytest.raises(BadDataError, match=r"no audio file 'Medley-solos-DB_test-0_uuid-0\.wav' below"):
        MedleySolosDB(tmp_path).check()
    wrong = ["training,oboe,4,7,uuid-t", "training,piano,3,7,uuid-t", "training,piano,4,7,uuid-t", rows()[-2]]
    put("Medley-solos-DB_metadata.csv", HEAD + "\n".join(wrong))
    with pytest.raises(BadDataError) as told:
        MedleySolosDB(tmp_path, subset=None).check()
    for part in (
        "'oboe' with the id '4' is none of the eight",
        "'piano' with the id '3'",
        "this id stands there twice",
    ):
        assert part in str(told.value)


def test_files_that_are_none(put, tmp_path):
    with pytest.raises(MissingDataError, match="medley_solos_db is not there"):
        MedleySolosDB(tmp_path).check()
    for text, words in (
        ("", "holds no list of records"),
        (HEAD, "holds no list of records"),
        ("a,b\n1,2,3\n", "has no field for subset .* Its fields are: a, b, None"),
        (HEAD.replace("uuid4", "uuid"), "holds no list of records"),
        (HEAD.replace("uuid4", "uuid") + "test,piano,4,7,x\n", r"has no field for id \(looked for uuid4\)"),
    ):
        put("Medley-solos-DB_metadata.csv", text)
        with pytest.raises(BadDataError, match=words) as told:
            MedleySolosDB(tmp_path).check()
        assert "What to get: conf/dataset/medley_solos_db.yaml" in str(told.value)
