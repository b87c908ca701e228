"""GTZAN in its public layout: every clip is there, or said to be missing, and the broken one is passed over."""

from __future__ import annotations

import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError, MissingDataError
from bestiary.shared.data.music_benchmarks.gtzan import CORRUPT, GENRES, GTZAN, PROMPT
from bestiary.shared.metrics.audio_matchers import MATCHERS
from bestiary.shared.rl.rewards.registry import make_verifier, self_test


@pytest.fixture
def clips(tone):
    """Two clips of each genre below a folder."""

    def make(below="genres", ending="wav"):
        for at, genre in enumerate(GENRES):
            for number in range(2):
                tone(f"{below}/{genre}/{genre}.{number:05d}.{ending}", (at + 1) / 20, seconds=0.1 + 0.01 * number)

    return make


@pytest.mark.parametrize("below", ["genres", "genres_original", "Data/genres_original", "."])
def test_all_clips(below, clips, tmp_path, pieces, put):
    clips(below)
    put(f"{below}/blues/._blues.00000.wav", "left by another system's archiver")
    source = GTZAN(tmp_path, clips=2)
    source.check()
    examples = source.held_out("test")
    assert [e["id"] for e in examples] == [f"{genre}.{number:05d}" for genre in sorted(GENRES) for number in range(2)]
    for at, example in enumerate(examples):
        audio, text = pieces(example)
        assert text == PROMPT
        assert audio[0]["value"][0] == pytest.approx((at // 2 + 1) / 20, abs=1e-3)
    assert [e["answer"] for e in examples[::2]] == [
        "blues", "classical", "country", "disco", "hip hop", "jazz", "metal", "pop", "reggae", "rock",
    ]  # fmt: skip
    assert all(answer in PROMPT for answer in examples[0]["meta"]["labels"])
    self_test({"exact_text": make_verifier("exact_text")}, list(examples))
    assert MATCHERS["label"]("Hip-hop.", examples[8]).right
    assert not MATCHERS["label"]("jazz", examples[8]).right


def test_the_broken_clip_is_passed_over_and_said(clips, tmp_path, tone, put, capsys):
    clips()
    put("only.txt", f"jazz/{CORRUPT}.wav\njazz.00000\nrock/rock.00001.au\n\n")
    source = GTZAN(tmp_path, only=str(tmp_path / "only.txt"))
    # Absent, as many delete it.
    assert [e["id"] for e in source.held_out("test")] == ["jazz.00000", "rock.00001"]
    assert f"gtzan: {CORRUPT} is passed over, as it is known to be broken (it is not there)" in capsys.readouterr().out
    one = source.revision
    # There, and no audio.
    put(f"genres/jazz/{CORRUPT}.wav", "not audio")
    source = GTZAN(tmp_path, only=str(tmp_path / "only.txt"))
    assert len(source.held_out("test")) == 2
    assert "(unreadable audio)" in capsys.readouterr().out
    assert source.revision == one
    # A sound copy is asked about as any other, and that is another set.
    tone(f"genres/jazz/{CORRUPT}.wav")
    source = GTZAN(tmp_path, only=str(tmp_path / "only.txt"))
    assert [e["id"] for e in source.held_out("test")] == [CORRUPT, "jazz.00000", "rock.00001"]
    assert capsys.readouterr().out == ""
    assert source.revision != one


def test_what_was_half_copied(clips, tmp_path, put):
    clips()
    (tmp_path / "genres/pop/pop.00001.wav").unlink()
    put("genres/rock/rock.00000.wav", "not audio")
    with pytest.raises(BadDataError) as told:
        GTZAN(tmp_path, clips=2).check()
    text = str(told.value)
    assert f"pop.00001: there is no pop/pop.00001.wav below {tmp_path / 'genres'}" in text
    assert "rock.00000.wav cannot be read as audio" in text
    assert "2 faults in 20 rows" in text
    left = GTZAN(tmp_path, clips=2, leave_out=True)
    assert len(left.held_out("test")) == 18
    assert left.revision.endswith("-without2")
    # A whole set has a hundred of each: two of each are not taken for it.
    with pytest.raises(BadDataError, match="and 961 more"):
        GTZAN(tmp_path).check()


def test_lists_and_settings_that_cannot_be(clips, tmp_path, put):
    clips()
    put("only.txt", "blues.00000\nBLUES/three\nblues.00000\n")
    with pytest.raises(BadDataError) as told:
        GTZAN(tmp_path, only=str(tmp_path / "only.txt")).check()
    assert "only.txt, line 2: it is no clip's name, like blues.00012: 'BLUES/three'" in str(told.value)
    assert "blues.00000: this id stands there twice" in str(told.value)
    with pytest.raises(MissingDataError, match=r"none\.txt: there is no such file\. Set dataset\.only to a text file"):
        GTZAN(tmp_path, only=str(tmp_path / "none.txt")).check()
    for count in (0, "all"):
        with pytest.raises(ConfigError, match="clips of each genre are 1 or more"):
            GTZAN(tmp_path, clips=count)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(MissingDataError, match="gtzan is not there"):
        GTZAN(tmp_path / "elsewhere").check()
