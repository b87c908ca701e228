"""measured.csv: append-only, safe for processes side by side, strict when read."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.results import measured
from bestiary.shared.results.measured import Measurement

VALUES = {
    "table": "t1", "row": "ours", "metric": "dice/CSF", "value": 0.1 + 0.2, "n_seeds": 1, "std": None, "seeds": "0",
    "commit": "abc", "dirty": True, "config_hash": "h", "overrides": "+project=x 'a=[1,2]'", "data_revision": "d",
    "torch": "2.14", "device": 'a "CPU", really', "wall_s": 1.5, "peak_gb": None, "date": "2026-01-01T00:00:00Z",
    "scope": "reduced: one\nline too many",
}  # fmt: skip


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "results" / "measured.csv"
    first, second = Measurement(**VALUES), Measurement(**{**VALUES, "std": 0.1, "n_seeds": 2, "scope": "full"})
    measured.append(path, [first])
    before = path.read_bytes()
    measured.append(path, [second])
    assert measured.read(path) == [first, second]
    assert path.read_bytes().startswith(before)
    assert path.read_text().splitlines()[0] == ",".join(measured.COLUMNS)


def test_no_file_means_no_measurements(tmp_path):
    assert measured.read(tmp_path / "none.csv") == []
    measured.append(tmp_path / "none.csv", [])
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize("changes", [{"value": float("nan")}, {"scope": "half"}, {"n_seeds": 0}])
def test_what_is_no_measurement_is_refused(changes):
    with pytest.raises(BadDataError):
        Measurement(**{**VALUES, **changes})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("n_seeds", "seeds_n"), "the columns are not those"),
        (lambda text: text + "t1,ours,dice\n", r"measured.csv:3: 3 cells instead of 18"),
        (lambda text: text.replace("0.30000000000000004", "much"), r"measured.csv:2: could not convert"),
        (lambda text: text.replace(",true,", ",maybe,"), "neither true nor false"),
    ],
)
def test_a_broken_file_is_named_and_left_alone(tmp_path, damage, message):
    path = tmp_path / "measured.csv"
    row = Measurement(**{**VALUES, "scope": "full"})
    measured.append(path, [row])
    path.write_text(damage(path.read_text()))
    before = path.read_bytes()
    with pytest.raises(BadDataError, match=message):
        measured.read(path)
    with pytest.raises(BadDataError, match=message):
        measured.append(path, [row])
    assert path.read_bytes() == before


def test_a_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "measured.csv"
    row = Measurement(**{**VALUES, "scope": "full"})
    measured.append(path, [row])
    path.write_text(path.read_text().rstrip("\n"))
    measured.append(path, [row])
    assert measured.read(path) == [row, row]


WRITER = """
import sys
from pathlib import Path
from bestiary.shared.results.measured import Measurement, append
values = eval(sys.argv[2])
for i in range(40):
    append(Path(sys.argv[1]), [Measurement(**{**values, "row": sys.argv[3], "seeds": str(i)})] * 2)
"""


def test_processes_side_by_side_lose_nothing(tmp_path, root, clean_env):
    path = tmp_path / "measured.csv"
    env = clean_env(PYTHONPATH=str(root / "src"))
    workers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), repr(VALUES), f"w{i}"], env=env) for i in range(3)
    ]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0, 0]
    lines = measured.read(path)
    assert len(lines) == 3 * 40 * 2
    for worker in ("w0", "w1", "w2"):
        assert [m.seeds for m in lines if m.row == worker] == [str(i) for i in range(40) for _ in range(2)]
    assert path.read_text().count("data_revision") == 1
