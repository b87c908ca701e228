"""The store: clips on disk are those that were rendered, a killed rendering goes on, and other settings are apart."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from bestiary.shared.data.music import store
from bestiary.shared.data.music.pool import each
from bestiary.shared.data.music.render import Renderer
from bestiary.shared.data.music.store import ClipStore, maker

OPTIONS = {"seconds": 1.0, "seed": 0}


def test_what_is_read_is_what_was_rendered(small_music):
    clips = ClipStore("clip", "train", 10, 16000, OPTIONS, workers=0)
    assert not clips.folder.exists()  # nothing is made before it is asked for
    made = maker("train", OPTIONS)
    for number in (9, 0, 4):
        clip = made.clip(number)
        found = clips[number]
        assert (found.shape, found.dtype) == ((16000,), np.float32)
        # 16 bits hold each sample to half a step.
        assert np.abs(found - Renderer()(clip.notes, clip.seconds)).max() <= 0.5 / 32767 + 1e-7
    assert sorted(file.name for file in clips.folder.iterdir()) == ["00000.npy", "00001.npy", "00002.npy"]


KILLED = """
import os, signal, sys
from bestiary.shared.data.music import scores, store
scores.corpus_files = lambda: FEW
store.BLOCK = 4
render, done = store.render_block, []
def then_die(job):
    if len(done) == 2:
        (job[0].parent / ".00002.npy.1").write_bytes(b"half a block")
        os.kill(os.getpid(), signal.SIGKILL)
    render(job)
    done.append(job)
store.render_block = then_die
store.ClipStore("clip", "train", 14, 16000, {"seconds": 1.0, "seed": 0}, workers=0).render()
"""


def test_a_killed_rendering_goes_on(small_music, root, monkeypatch):
    from bestiary.shared.data.music import scores

    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED.replace("FEW", repr(scores.corpus_files()))],
        env=environment,
        timeout=120,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    clips = ClipStore("clip", "train", 14, 16000, OPTIONS, workers=0)
    before = {file.name: file.stat().st_mtime_ns for file in clips.folder.iterdir()}
    assert sorted(before) == [".00002.npy.1", "00000.npy", "00001.npy"]
    rendered = []
    render = store.render_block
    monkeypatch.setattr(store, "render_block", lambda job: (rendered.append(job[0].name), render(job))[1])
    clips.render()
    assert rendered == ["00002.npy", "00003.npy"]
    after = {file.name: file.stat().st_mtime_ns for file in clips.folder.iterdir()}
    assert sorted(after) == ["00000.npy", "00001.npy", "00002.npy", "00003.npy"]
    assert all(after[name] == before[name] for name in ("00000.npy", "00001.npy"))
    clips.render()
    assert len(rendered) == 2


def test_more_clips_are_rendered_beside_those_that_are_there(small_music):
    few = ClipStore("clip", "train", 3, 16000, OPTIONS, workers=0)
    first = few[2]
    many = ClipStore("clip", "train", 9, 16000, OPTIONS, workers=0)
    assert np.array_equal(many[2], first)
    assert many[8].any()
    assert many.folder == few.folder


def test_settings_that_change_the_sound_have_caches_of_their_own(small_music, tmp_path, monkeypatch):
    font = tmp_path / "other.sf2"
    font.write_bytes(b"other samples")
    plain = ("clip", "train", 10, 16000, OPTIONS)
    keys = {ClipStore(*plain).key}
    for at, value in (
        (0, "time_clip"),
        (1, "val"),
        (3, 22050),
        (4, {**OPTIONS, "seed": 1}),
        (4, {**OPTIONS, "seconds": 2}),
    ):
        other = list(plain)
        other[at] = value
        keys.add(ClipStore(*other).key)
    keys.add(ClipStore(*plain, font=str(font)).key)
    assert len(keys) == 7
    assert ClipStore(*plain, workers=3).key in keys
    for name, value in (("CLIPS", 0), ("scores_revision", lambda: "x")):
        monkeypatch.setattr(store, name, value)
        keys.add(ClipStore(*plain).key)
    assert len(keys) == 9


@pytest.mark.parametrize("workers", [0, 2, None])
def test_work_is_done_in_processes_or_here(tmp_path, workers):
    folders = [tmp_path / str(n) for n in range(3)]
    each(os.mkdir, folders, workers, "making")
    assert all(folder.is_dir() for folder in folders)
    with pytest.raises(FileExistsError):
        each(os.mkdir, folders, workers, "making")


def test_long_work_says_how_far_it_is(monkeypatch, capsys):
    from bestiary.shared.data.music import pool

    monkeypatch.setattr(pool, "QUIET_S", 0)
    each(lambda job: None, [1, 2], 0, "rendering 2 clips (train)")
    assert capsys.readouterr().err == "rendering 2 clips (train): 2 of 2 parts, 0 s\n"


@pytest.mark.slow
def test_processes_render_the_same(need_asset, tmp_path, monkeypatch):
    """On the whole corpus, whose scores other processes can find."""
    from bestiary.shared.data.assets import data_root

    need_asset("timgm6mb")
    need_asset("tinysoundfont")
    pytest.importorskip("music21")
    from bestiary.shared.data.music.scores import parse_scores

    scores = parse_scores()[0].parent
    for folder in ("assets", "site"):
        (tmp_path / folder).symlink_to(data_root() / folder)
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / scores.name).symlink_to(scores)
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path))
    here = ClipStore("time_clip", "val", 200, 16000, {"time_seconds": 4.0, "seed": 0}, workers=0)
    here.render()
    blocks = {file.name: file.read_bytes() for file in here.folder.iterdir()}
    for file in here.folder.iterdir():
        file.unlink()
    ClipStore("time_clip", "val", 200, 16000, {"time_seconds": 4.0, "seed": 0}, workers=2).render()
    assert {file.name: file.read_bytes() for file in here.folder.iterdir()} == blocks
    assert len(blocks) == 2
