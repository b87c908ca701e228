"""The configs of the benchmarks: they build, ask what the readers ask, and say what to get."""

from __future__ import annotations

import pytest
import yaml

from bestiary.shared.core.build import build
from bestiary.shared.core.errors import MissingDataError
from bestiary.shared.data.music_benchmarks import gtzan, medley_solos_db, mmau, muchomusic, musdb18_lyrics

PROMPTS = {
    "mmau": mmau.PROMPT,
    "mmau_pro": mmau.PROMPT,
    "muchomusic": muchomusic.PROMPT,
    "rul_muchomusic": muchomusic.RUL_PROMPT,
    "musdb18_lyrics": musdb18_lyrics.PROMPT,
    "nsynth": None,
    "mmar": mmau.PROMPT,
    "gtzan": gtzan.PROMPT,
    "medley_solos_db": medley_solos_db.PROMPT,
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_config_builds_its_reader(name, root, tmp_path):
    node = yaml.safe_load((root / "conf" / "dataset" / f"{name}.yaml").read_text())
    assert node["root"] == "???"
    assert node.get("prompt") == PROMPTS[name]
    source = build({**node, "root": str(tmp_path)})
    assert source.name == name  # what the message on training tells to type
    assert source.spec().task == "chat"
    assert source.audio == "real"
    with pytest.raises(MissingDataError) as told:
        source.check()
    text = str(told.value)
    for part in (str(tmp_path), "cannot be fetched", f"dataset={name} dataset.root={tmp_path}"):
        assert part in text
    assert "{root}" not in text
