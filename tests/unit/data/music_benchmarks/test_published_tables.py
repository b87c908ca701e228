"""The published tables of music benchmarks: they print what the readers ask, and their sums are right."""

from __future__ import annotations

import pytest

from bestiary.shared.data.music_benchmarks import gtzan, medley_solos_db, mmau, muchomusic, musdb18_lyrics, nsynth
from bestiary.shared.results.tables import read_table

PROMPTS = {
    "mmau": mmau.PROMPT,
    "mmau_pro": mmau.PROMPT,
    "mmar": mmau.PROMPT,
    "gtzan": gtzan.PROMPT,
    "medley_solos_db": medley_solos_db.PROMPT,
    "muchomusic": muchomusic.PROMPT,
    "rul_muchomusic": muchomusic.RUL_PROMPT,
    "musdb18_lyrics": musdb18_lyrics.PROMPT,
    **{f"nsynth/{task}": prompt for task, prompt in nsynth.PROMPTS.items()},
}
TABLES = ("published_music_flamingo", "published_openmoss", "published_related")


@pytest.fixture
def table(root):
    return lambda name: read_table(root / "projects" / "music_flamingo" / "tables" / f"{name}.yaml")


@pytest.mark.parametrize("name", TABLES)
def test_every_benchmark_says_how_it_is_scored_and_what_it_needs(table, name):
    found = table(name)
    assert list(found.protocol["note"]) == [metric.key for metric in found.metrics]
    for asked, prompt in (found.protocol.get("prompt") or {}).items():
        assert prompt == PROMPTS[asked], asked
    for row in found.rows:
        assert row.overrides is None
        assert row.tier == "full"
        assert not row.runnable
        assert row.source or row.id == "released"
    for metric in found.metrics:
        assert any(row.published[metric.key] is not None for row in found.rows), metric.key


@pytest.mark.parametrize("name", TABLES[:2])
def test_what_nobody_has_run_has_no_value(table, name):
    row = table(name).row("released")
    assert row.ours
    assert set(row.published.values()) == {None}
    assert {"data", "weights"} <= set(row.needs)
    assert row.blocked


def test_openmoss_averages_are_those_of_its_columns(table):
    accuracies = (
        "mmau_music/test", "mmau_music/test_mini", "mmau_pro_music", "mmar_music", "muchomusic", "music_avqa", "gtzan",
        "medley_solos_db",
    )  # fmt: skip
    rates = ("musdb18/wer", "mir_1k/cer", "opencpop/cer")
    for row in table("published_openmoss").rows:
        if row.id != "released":
            for names, mean in ((accuracies, "average_8"), (rates, "lyrics_average")):
                values = [row.published[name] for name in names]
                assert sum(values) / len(values) == pytest.approx(row.published[mean], abs=0.0051), row.id


def test_the_two_columns_of_muchomusic_have_different_names(table):
    nvidia, openmoss = ({m.key for m in table(name).metrics} for name in TABLES[:2])
    assert "rul_muchomusic" in nvidia
    assert "muchomusic" not in nvidia
    assert "muchomusic" in openmoss
    assert "rul_muchomusic" not in openmoss
