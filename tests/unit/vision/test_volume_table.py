"""volumes.csv, with several at work on it."""

import subprocess
import sys

from bestiary.shared.vision.prediction_folder import VolumeTable


def test_a_table_keeps_what_is_there(tmp_path):
    table = VolumeTable(tmp_path / "v.csv")
    table.add("a, with comma", [(1, "x", 3, 0.003), (2, "y", 0, 0.0)])
    table.add("b", [(1, "x", 5, 0.005), (2, "y", 1, 0.001)])
    other = VolumeTable(tmp_path / "v.csv")
    assert not other.add("a, with comma", [(1, "x", 3, 0.003), (2, "y", 0, 0.0)])
    assert not other.changed
    assert other.add("b", [(1, "x", 6, 0.006), (2, "y", 1, 0.001)])
    assert other.changed
    assert (tmp_path / "v.csv").read_text().splitlines() == [
        "case,class_id,class_name,voxels,volume_ml",
        '"a, with comma",1,x,3,0.003',
        '"a, with comma",2,y,0,0',
        "b,1,x,6,0.006",
        "b,2,y,1,0.001",
    ]


ADD = """
import sys
from pathlib import Path
from bestiary.shared.vision.prediction_folder import VolumeTable

table = VolumeTable(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    table.add(f"{sys.argv[2]}{number}", [(1, "x", number, 0.5)])
"""


def test_two_processes_add_to_one_table(tmp_path, clean_env, root):
    path = tmp_path / "v.csv"
    env = clean_env(PYTHONPATH=str(root / "src"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    jobs = [subprocess.Popen([sys.executable, "-c", ADD, str(path), name], **pipes) for name in "ab"]
    for job in jobs:
        assert job.stdout.readline() == "ready\n"
    for job in jobs:
        job.stdin.write("go\n")
        job.stdin.flush()
    assert [job.communicate()[0] for job in jobs] == ["", ""]
    assert [job.returncode for job in jobs] == [0, 0]
    lines = path.read_text().splitlines()
    assert sorted(lines[1:]) == sorted(f"{name}{number},1,x,{number},0.5" for name in "ab" for number in range(40))
    assert [p.name for p in tmp_path.iterdir()] == ["v.csv"]
