"""Lyrics of MUSDB18 in the three layouts that are read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.data.music_benchmarks.musdb18_lyrics import MUSDB18Lyrics

SONG = "AM Contra - Heart Peripheral"


@pytest.fixture
def mix(tmp_path):
    """A stereo mix of 4 s at 22,050 Hz whose level is its second: 0.1 in the first, 0.2 in the next …"""

    def write(name=f"test/{SONG}/mixture.wav"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        level = np.repeat([0.1, 0.2, 0.3, 0.4], 22050)
        soundfile.write(path, np.stack([level, level], 1).astype(np.float32), 22050, subtype="FLOAT")

    return write


def test_the_lyrics_extension(mix, put, tmp_path, pieces):
    mix()
    lines = "00:01 00:02 a hello from the dark\n*00:02 00:03 b rejected\n\n00:02 00:04 b oh\n00:03 00:04 d \n"
    put(f"lyrics-transcripts/test/{SONG}.txt", lines)
    source = MUSDB18Lyrics(tmp_path)
    source.check()
    first, second = source.held_out("test")
    (audio,), text = pieces(first)
    assert audio["value"].shape == (16000,)
    assert audio["value"][4000:12000].mean() == pytest.approx(0.2, abs=0.005)  # the second second
    assert text == "Write down the words that are sung in this music, and nothing else."
    assert first["answer"] == "hello from the dark"
    assert first["meta"] == {"song": SONG, "category": "a"}
    assert (second["answer"], second["meta"]["category"]) == ("oh", "b")
    assert pieces(second)[0][0]["value"].shape == (32000,)
    assert pieces(first)[0][0]["key"] != pieces(second)[0][0]["key"]
    assert [e["answer"] for e in MUSDB18Lyrics(tmp_path, categories=["a"]).held_out("test")] == ["hello from the dark"]
    (song,) = MUSDB18Lyrics(tmp_path, unit="song").held_out("test")
    assert song["answer"] == "hello from the dark\noh"
    assert pieces(song)[0][0]["value"].shape == (64000,)


def test_the_revision_is_of_all_songs(mix, put, tmp_path):
    for name in ("A", "B"):
        mix(f"{name}.wav")
        put(f"lyrics-transcripts/test/{name}.txt", "00:00 00:01 a la")
    before = MUSDB18Lyrics(tmp_path).revision
    put("lyrics-transcripts/test/B.txt", "00:00 00:02 a la")
    assert MUSDB18Lyrics(tmp_path).revision != before


def test_musdb_alt_and_plain_tables(mix, put, tmp_path):
    mix(f"{SONG}.wav")
    alt = {"name": SONG, "text": "One\nTwo", "lines": [{"start": 0.5, "end": 1.5, "text": "One"}]}
    put("test.jsonl", json.dumps(alt))
    assert [e["answer"] for e in MUSDB18Lyrics(tmp_path).held_out("test")] == ["One"]
    put("lyrics.csv", f'name,start,end,text\n{SONG},0,2,"Three, four"\n')
    (example,) = MUSDB18Lyrics(tmp_path).held_out("test")
    assert example["answer"] == "Three, four"
    assert "verifier" not in example


def test_faults(mix, put, tmp_path):
    with pytest.raises(MissingDataError):
        MUSDB18Lyrics(tmp_path).check()
    mix(f"{SONG}.wav")
    put("lyrics.csv", f"name,start,end,text\n{SONG},2,1,back\n{SONG},0,1,\nGone,0,1,la\n{SONG},x,1,la\n")
    with pytest.raises(BadDataError) as told:
        MUSDB18Lyrics(tmp_path).check()
    for part in ("no stretch of time (2 to 1)", f"{SONG}-1: it has no words", "Gone: there is no mix", "(x to 1)"):
        assert part in str(told.value)
    (tmp_path / "lyrics.csv").unlink()
    put(f"lyrics-transcripts/test/{SONG}.txt", "1 2 a words")
    with pytest.raises(BadDataError, match=r"line 1: it is not 'MM:SS MM:SS a words': '1 2 a words'"):
        MUSDB18Lyrics(tmp_path).check()
    with pytest.raises(ConfigError, match="unit is segment or song"):
        MUSDB18Lyrics(tmp_path, unit="line")
