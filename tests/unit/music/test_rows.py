"""The file of rows: whole after any interruption."""

import json
import os
import resource

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.music.rows import Rows


def test_rows_are_there_again(tmp_path):
    rows = Rows(tmp_path / "r.jsonl")
    assert dict(rows) == {}
    assert not (tmp_path / "r.jsonl").exists()
    rows.add({"id": "a", "x": "ä\n"})
    rows.add({"id": "b"})
    again = Rows(tmp_path / "r.jsonl")
    assert dict(again) == dict(rows) == {"a": {"id": "a", "x": "ä\n"}, "b": {"id": "b"}}
    assert "c" not in again
    with pytest.raises(ValueError, match="'a' is there already"):
        again.add({"id": "a"})


@pytest.mark.parametrize("torn", ['{"id": "b", "x": "hal', '{"id": "b"}', "\xc3", "\0\0\0"])
def test_half_a_line_at_the_end_is_cut_off(tmp_path, torn):
    """Without its end of line even a row that reads well may be half of one."""
    file = tmp_path / "r.jsonl"
    file.write_bytes(b'{"id": "a"}\n' + torn.encode("latin-1"))
    rows = Rows(file)
    assert list(rows) == ["a"]
    rows.add({"id": "c"})
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["a", "c"]


@pytest.mark.parametrize(
    ("line", "words"),
    [("x", "line 2 is no row"), ("[1]", "line 2 is no row"), ("{}", "line 2 is no row"), ('{"id": []}', "line 2 is no")]
    + [("", "line 2 is no row"), ('{"id": "a"}', "line 2 has the id 'a' of a line before")],
)
def test_a_line_that_is_no_row(tmp_path, line, words):
    (tmp_path / "r.jsonl").write_text(f'{{"id": "a"}}\n{line}\n')
    with pytest.raises(BadDataError, match=words):
        Rows(tmp_path / "r.jsonl")


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    """A limit on the size of files stands for it: part of a line is written, and then no more.

    Once that part is cut off there is room again, and nothing may write the rest of the line.
    """
    file = tmp_path / "r.jsonl"
    rows = Rows(file)
    rows.add({"id": "a"})
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    truncate = os.truncate

    def cut(path, size):
        truncate(path, size)
        resource.setrlimit(resource.RLIMIT_FSIZE, was)

    monkeypatch.setattr(os, "truncate", cut)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, was[1]))
    try:
        with pytest.raises(OSError):
            rows.add({"id": "b", "x": "y" * 3_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert file.read_text() == '{"id": "a"}\n'
    assert "b" not in rows
    rows.add({"id": "c"})
    assert list(Rows(file)) == ["a", "c"]
