"""From a folder to questions: music that changed or is of no use, other settings, and careless use."""

import fcntl
import os

import numpy as np
import pytest

from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.data.audio_qa import AudioQAJsonl
from bestiary.shared.music import pipeline as module

soundfile = pytest.importorskip("soundfile")
RATE = 8000
NAMES = {"a.wav", "b.wav", "below/e.wav", "c d.wav", "é.wav"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch, lab):
    monkeypatch.setattr(module, "extract", lab.quick)


def refuse(*args):
    raise AssertionError(f"this was done already: {args}")


@pytest.mark.parametrize("change", ["audio", "touched", "json", "txt"])
def test_music_that_changed_is_not_mixed_with_rows_of_what_it_was(lab, music, tmp_path, change):
    lab.run(music, tmp_path / "out")
    before = (tmp_path / "out" / "audio_qa.jsonl").read_bytes()
    if change == "audio":
        lab.tone(music / "b.wav", 2.0)
    elif change == "touched":
        os.utime(music / "b.wav", (1, 1))
    else:
        (music / f"b.{change}").write_text("{}")
    with pytest.raises(BadDataError, match=r"1 of the files .* changed since .*metadata.jsonl .*, for example b.wav"):
        lab.run(music, tmp_path / "out")
    assert (tmp_path / "out" / "audio_qa.jsonl").read_bytes() == before


def test_music_that_changed_behind_its_captions(lab, music, tmp_path, monkeypatch):
    """Killed between the stages: there are captions, and no metadata yet."""
    monkeypatch.setattr(module, "_measured", refuse)
    with pytest.raises(AssertionError):
        lab.run(music, tmp_path / "out", listener=lambda samples, rate: "soft")
    (music / "a.json").write_text("{}")  # a caption does not depend on it
    with pytest.raises(AssertionError):
        lab.run(music, tmp_path / "out", listener=refuse)
    lab.tone(music / "a.wav", 2.0)
    with pytest.raises(BadDataError, match=r"changed since .*captions.jsonl .*, for example a.wav"):
        lab.run(music, tmp_path / "out", listener=refuse)


def test_other_settings_are_refused(lab, music, tmp_path):
    lab.run(music, tmp_path / "out", settings={"writer": "template", "tools": ["librosa"], "think": False})
    with pytest.raises(ConfigError, match=r"begun with think False \(now True\), writer 'template' \(now 'local'\)"):
        lab.run(music, tmp_path / "out", settings={"writer": "local", "tools": ["librosa"], "think": True})
    (tmp_path / "other").mkdir()
    lab.tone(tmp_path / "other" / "a.wav")
    with pytest.raises(ConfigError, match=r"begun with folder '.*music' \(now '.*other'\)"):
        lab.run(
            tmp_path / "other", tmp_path / "out", settings={"writer": "template", "tools": ["librosa"], "think": False}
        )
    (tmp_path / "out" / "settings.json").write_text("[1]")
    with pytest.raises(BadDataError, match="holds no settings"):
        lab.run(music, tmp_path / "out")


def test_a_second_run_beside_the_first_is_refused(lab, music, tmp_path):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another run is filling"):
            lab.run(music, tmp_path / "out")
    assert not (tmp_path / "out" / "settings.json").exists()
    lab.run(music, tmp_path / "out")


def test_audio_of_no_use_is_reported_and_passed_over(lab, music, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_S", 30.0)
    (music / "text.wav").write_text("no audio")
    (music / "empty.mp3").touch()
    soundfile.write(music / "nothing.wav", np.zeros(0), RATE)
    soundfile.write(music / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    soundfile.write(music / "slow.wav", np.zeros(900), 900)
    soundfile.write(music / "long.wav", np.zeros(RATE * 31), RATE)
    whole = tmp_path / "whole.flac"
    soundfile.write(whole, np.random.default_rng(0).uniform(-0.5, 0.5, RATE * 3), RATE)
    (music / "torn.flac").write_bytes(whole.read_bytes()[:9000])
    (music / "notes.txt").write_text("not looked at")
    (music / "folder.wav").mkdir()
    report = lab.run(music, tmp_path / "out")
    reasons = {name: reason.removeprefix(str(music)) for name, reason in report.unusable.items()}
    assert reasons.keys() == {*("text.wav", "empty.mp3", "nothing.wav", "nan.wav", "slow.wav", "long.wav", "torn.flac")}
    assert all(str(music / name) in reason for name, reason in report.unusable.items())
    assert "long.wav is 31 s long, more than 30" in reasons["long.wav"]
    assert "not finite" in reasons["nan.wav"]
    assert "no samples" in reasons["nothing.wav"]
    assert "claims 900 samples" in reasons["slow.wav"]
    assert "12 audio files, 7 of them unusable" in str(report)
    assert {row["id"] for row in lab.rows(tmp_path / "out" / "kept.jsonl")} == NAMES
    AudioQAJsonl(str(tmp_path / "out" / "audio_qa.jsonl"), max_seconds=30.0).check()
    lab.tone(music / "text.wav")  # the next run looks at it again
    assert len(lab.run(music, tmp_path / "out").unusable) == 6


def test_a_name_that_no_file_of_text_can_hold(lab, music, tmp_path):
    os.rename(music / "b.wav", os.fsencode(music) + b"/b\xff.wav")
    report = lab.run(music, tmp_path / "out")
    (reason,) = report.unusable.values()
    assert reason.endswith("b\\udcff.wav': its name is not UTF-8")
    str(report).encode()
    assert len(lab.rows(tmp_path / "out" / "kept.jsonl")) == 4


def test_many_bad_files_are_not_all_listed(lab, music, tmp_path):
    for number in range(50):
        (music / f"bad{number}.wav").touch()
    text = str(lab.run(music, tmp_path / "out"))
    assert "55 audio files, 50 of them unusable" in text
    assert "and 30 more" in text


@pytest.mark.parametrize("bad", [0, 2])
def test_no_audio_at_all(lab, tmp_path, bad):
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "a.txt").touch()
    for number in range(bad):
        (tmp_path / "music" / f"{number}.wav").write_text("x")
    with pytest.raises(BadDataError, match=r"music holds no usable audio \(.wav, ") as caught:
        lab.run(tmp_path / "music", tmp_path / "out")
    assert str(caught.value).count("cannot be read as audio") == bad
    assert not (tmp_path / "out").exists()


def test_audio_that_breaks_off_everywhere(lab, tmp_path):
    (tmp_path / "music").mkdir()
    soundfile.write(tmp_path / "music" / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    with pytest.raises(BadDataError, match=r"no usable audio(.|\n)*not finite"):
        lab.run(tmp_path / "music", tmp_path / "out")


def test_a_record_that_was_damaged_is_that_pieces_fault(lab, music, tmp_path):
    lab.run(music, tmp_path / "out")
    for stage in ("written", "kept"):
        (tmp_path / "out" / f"{stage}.jsonl").unlink()
    file = tmp_path / "out" / "metadata.jsonl"
    file.write_text(file.read_text().replace('"C major"', '"C minus"', 1))
    report = lab.run(music, tmp_path / "out")
    assert list(report.unusable) == ["a.wav"]
    assert "Key is a tonic with its mode" in report.unusable["a.wav"]


@pytest.mark.parametrize("place", ["music", "music/below", "music/new/folder", "link"])
def test_results_inside_the_music_are_refused(lab, music, tmp_path, place):
    (tmp_path / "link").symlink_to(music / "below")
    with pytest.raises(ConfigError, match=r"is inside .*music: give an --out that is not"):
        lab.run(music, tmp_path / place)
    assert not (music / "new").exists()
    assert not (music / "settings.json").exists()


def test_careless_arguments(lab, music, tmp_path):
    with pytest.raises(BadDataError, match="none is no folder"):
        lab.run(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ConfigError, match="workers is 1 or more, not 0"):
        lab.run(music, tmp_path / "out", workers=0)
    with pytest.raises(ConfigError, match="there is no tool 'aubio'"):
        lab.run(music, tmp_path / "out", tools=["librosa", "aubio"])
    assert not (tmp_path / "out").exists()


def test_progress_is_told(lab, music, tmp_path):
    told = []
    lab.run(music, tmp_path / "out", say=told.append)
    assert told == ["metadata: 5 of 5", "written: 5 of 5", "kept: 5 of 5"]
