"""The trace of measured.csv: what was changed, removed, added or moved afterwards is seen; the rest is adopted."""

from __future__ import annotations

import errno
import hashlib

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.results import measured, trace
from bestiary.shared.results.measured import Measurement

VALUES = {
    "table": "t1", "row": "ours", "metric": "dice", "value": 0.5, "n_seeds": 1, "std": None, "seeds": "0",
    "commit": "abc", "dirty": False, "config_hash": "h", "overrides": "+project=x", "data_revision": "d",
    "torch": "2.14", "device": "cpu", "wall_s": 1.5, "peak_gb": None, "date": "2026-01-01T00:00:00Z", "scope": "full",
}  # fmt: skip


@pytest.fixture
def csv(tmp_path):
    """Four lines: two of one name, one of two lines of text."""
    path = tmp_path / "measured.csv"
    measured.append(path, [Measurement(**{**VALUES, "value": 0.25}), Measurement(**{**VALUES, "row": "other"})])
    measured.append(path, [Measurement(**VALUES), Measurement(**{**VALUES, "row": "x", "scope": "reduced: a\nb"})])
    return path


def edit(path, change):
    path.write_text(change(path.read_text()))


def test_what_was_written_agrees(csv):
    assert trace.problems(csv) == []
    lines = (csv.parent / "measured.sha256").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["t1/ours dice", "t1/other dice", "t1/ours dice", "t1/x dice"]
    cells = csv.read_text().splitlines()[1].split(",")
    assert lines[0].split()[0] == hashlib.sha256("\x1f".join(cells).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda t: t.replace(",0.25,", ",0.26,"), [":2: t1/ours dice was changed"]),
        (lambda t: t.replace("abc", "abd", 1), [":2: t1/ours dice was changed"]),
        (lambda t: t.replace("a\nb", "a\nc"), ["t1/x dice was changed"]),
        (lambda t: t.replace(",0.25,", ",0.250,"), [":2: t1/ours dice was changed"]),
        (lambda t: t.replace("t1,other", "t1,better"), [":3: t1/better dice has no trace", "t1/other dice is gone"]),
        (lambda t: "".join(t.splitlines(True)[:2] + t.splitlines(True)[3:]), ["t1/other dice is gone"]),
        (lambda t: t + t.splitlines(True)[2], [":7: t1/other dice has no trace"]),
        (
            lambda t: "".join(
                [*t.splitlines(True)[:1], *t.splitlines(True)[2:4], t.splitlines(True)[1], *t.splitlines(True)[4:]]
            ),
            [":2: t1/other dice stands elsewhere"],
        ),
    ],
)
def test_what_was_changed_is_named(csv, change, messages):
    edit(csv, change)
    assert measured.read(csv)  # it still looks like measurements
    found = trace.problems(csv)
    assert len(found) == len(messages)
    for line, message in zip(found, messages, strict=True):
        assert message in line
        assert str(csv) in line


def test_an_appended_line_blesses_no_changed_one(csv):
    edit(csv, lambda text: text.replace(",0.25,", ",0.26,"))
    measured.append(csv, [Measurement(**{**VALUES, "row": "new"})])
    (message,) = trace.problems(csv)
    assert ":2: t1/ours dice was changed" in message


def test_lines_without_a_trace_are_adopted_and_nothing_else_moves(csv):
    (csv.parent / "measured.sha256").unlink()
    before = csv.read_bytes()
    assert len(trace.problems(csv)) == 4
    assert trace.adopt(csv) == ["t1/ours dice", "t1/other dice", "t1/ours dice", "t1/x dice"]
    assert trace.problems(csv) == []
    assert trace.adopt(csv) == []
    assert csv.read_bytes() == before


def test_two_branches_that_were_merged(csv):
    lines = csv.read_text().splitlines(True)
    edit(csv, lambda text: "".join([*lines[:2], lines[3], lines[2], lines[3].replace("ours", "theirs"), *lines[4:]]))
    assert trace.adopt(csv) == ["t1/theirs dice"]
    assert trace.problems(csv) == []


@pytest.mark.parametrize("change", [lambda t: t.replace(",0.25,", ",0.26,"), lambda t: t.splitlines(True)[0]])
def test_a_changed_or_removed_line_is_not_adopted(csv, change):
    edit(csv, change)
    before = trace.trace_path(csv).read_text()
    with pytest.raises(BadDataError, match="nothing is adopted"):
        trace.adopt(csv)
    assert trace.trace_path(csv).read_text() == before


def test_a_broken_trace_is_named(csv):
    edit(trace.trace_path(csv), lambda text: text + "<<<<<<< HEAD\n")
    with pytest.raises(BadDataError, match=r"measured.sha256:5: not a line of a trace"):
        trace.problems(csv)


def test_a_disk_that_fills_up_leaves_neither_line_nor_trace(csv, monkeypatch):
    before = csv.read_bytes(), trace.trace_path(csv).read_bytes()
    calls = []

    def full(number):
        calls.append(number)
        if len(calls) == 2:  # the line is written, its trace is not
            raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        measured.append(csv, [Measurement(**VALUES)])
    assert (csv.read_bytes(), trace.trace_path(csv).read_bytes()) == before


def test_no_file_has_no_problems(tmp_path):
    assert trace.problems(tmp_path / "measured.csv") == []
