"""Small music: a data folder of its own, with the assets of the real one and the scores of a few files."""

from __future__ import annotations

import shutil
from itertools import chain
from pathlib import Path

import pytest

from bestiary.shared.data.assets import data_root


def few_files():
    """Two chorales of each split, and 60 fiddle tunes of the corpus."""
    from bestiary.shared.data.music.scores import corpus_files
    from bestiary.shared.data.splits import SPLITS, split_of

    files = corpus_files()
    bach = [f for f in files if f[0] == "bach"]
    chorales = [[f for f in bach if split_of(f"bach/{Path(f[1]).stem}") == split][:2] for split in SPLITS]
    return [*chain(*chorales), *[f for f in files if f[0] == "ryan"][:60]]


@pytest.fixture(scope="session")
def few_scores(tmp_path_factory):
    """A data folder with those scores parsed, once for all tests."""
    pytest.importorskip("music21")
    from bestiary.shared.data.music import scores

    folder, few = tmp_path_factory.mktemp("music"), few_files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BESTIARY_DATA", str(folder))
        patch.setattr(scores, "corpus_files", lambda: few)
        scores.parse_scores(workers=0)
    return folder


@pytest.fixture
def small_music(few_scores, tmp_path, monkeypatch, need_asset):
    """The test's own data folder with these scores in place of the whole corpus, and blocks of 4 clips."""
    need_asset("timgm6mb")
    need_asset("tinysoundfont")
    from bestiary.shared.data.music import scores, store

    few = few_files()
    for folder in ("assets", "site"):
        (tmp_path / folder).symlink_to(data_root() / folder)
    shutil.copytree(few_scores / "music", tmp_path / "music")
    monkeypatch.setenv("BESTIARY_DATA", str(tmp_path))
    monkeypatch.setattr(scores, "corpus_files", lambda: few)
    monkeypatch.setattr(store, "BLOCK", 4)
    store._tunes.cache_clear()
    yield tmp_path
    store._tunes.cache_clear()
