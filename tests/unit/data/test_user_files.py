"""Files that a user names: which are refused, what audio headers say, and how faults are listed."""

from __future__ import annotations

import numpy as np
import pytest

from bestiary.shared.core.errors import BadDataError, MissingDataError
from bestiary.shared.data.user_files import Header, audio_headers, first_faults, regular_file


def test_a_file_with_something_in_it(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "full").write_text("x")
    assert regular_file(tmp_path / "full", "dataset.path", "a text") == tmp_path / "full"
    with pytest.raises(MissingDataError, match=r"none: there is no such file\. Set dataset\.path to a text\.$"):
        regular_file(tmp_path / "none", "dataset.path", "a text")
    with pytest.raises(BadDataError, match=r"is a folder: set dataset\.path to a text$"):
        regular_file(tmp_path, "dataset.path", "a text")
    with pytest.raises(BadDataError, match=r"empty is empty: it should be a text$"):
        regular_file(tmp_path / "empty", "dataset.path", "a text")


@pytest.mark.parametrize(
    ("given", "count", "listed", "last"),
    [
        (0, None, 0, None),
        (1, None, 1, None),
        (20, None, 20, None),
        (21, None, 20, 1),
        (20, 31, 20, 11),
        (3, 3, 3, None),
    ],
)
def test_faults_are_listed_to_the_twentieth(given, count, listed, last):
    lines = first_faults([f"line {n}: wrong" for n in range(given)], count).splitlines()
    assert lines[:listed] == [f"  line {n}: wrong" for n in range(listed)]
    assert lines[listed:] == ([] if last is None else [f"  and {last} more"])


def test_headers_of_audio(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    names = ("a.wav", "b.flac", "c.mp3", "text.wav", "none.wav", "nothing.wav", "x" * 300, "")
    paths = [tmp_path / name for name in names]
    for at, rate in ((0, 8000), (1, 44100), (2, 16000)):
        soundfile.write(paths[at], np.zeros(rate * (at + 1)), rate)
    soundfile.write(paths[5], np.zeros(0), 16000)
    paths[3].write_text("not audio")
    found = audio_headers([*paths, paths[0]])
    assert list(found) == paths
    assert [found[path] for path in paths[:2]] == [Header(8000, 8000), Header(88200, 44100)]
    assert found[paths[2]].rate == 16000
    assert found[paths[2]].frames == pytest.approx(48000, abs=3000)  # mp3 pads
    assert found[paths[5]] == Header(0, 16000)
    told = [(found[path].kind, found[path].text) for path in (paths[3], paths[4], paths[6], paths[7])]
    assert [kind for kind, _ in told] == ["unreadable audio", "missing audio", "unreadable audio", "missing audio"]
    assert told[0][1].startswith(f"{paths[3]} cannot be read as audio: ")
    assert told[1][1] == f"{paths[4]}: there is no such file"
    assert told[2][1].endswith("File name too long")
