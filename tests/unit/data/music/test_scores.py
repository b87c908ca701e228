"""Scores to notes: hand-worked tunes, and what is refused."""

from pathlib import Path

import pytest

from bestiary.shared.data.music import scores
from bestiary.shared.data.music.clips import MAJOR, MINOR, split_tunes
from bestiary.shared.data.music.scores import (
    Tune,
    abc_fields,
    chunked,
    distinct,
    families,
    kind_of,
    plain_title,
    read_file,
    tune_of,
    whole_bars,
)
from bestiary.shared.data.splits import split_of

converter = pytest.importorskip("music21.converter")


def written(body: str, metre: str = "6/8", key: str = "D", title: str = "The Test -- Jig"):
    return f"X:1\nT:{title}\nM:{metre}\nL:1/8\nK:{key}\n{body}\n"


def parsed(body: str, *rest: str, **fields: str):
    """The tune, by way of music21 and of the fields of its text."""
    text = written(body, *rest, **fields)
    return tune_of("ryan", "x", converter.parse(text, format="abc"), abc_fields(text)["1"])


BAR = "DEF GAB|"


def test_a_tune_is_what_is_written():
    tune = parsed("A2|" + BAR * 8 + "d3 D3|")
    assert isinstance(tune, Tune)
    assert (tune.beats, tune.unit, tune.metre, tune.felt_beat, tune.bar) == (6, 8, "compound", 1.5, 3.0)
    assert (tune.sharps, tune.tonic, tune.mode, tune.kind) == (2, "D", "major", "jig")
    assert tune.tradition == "American fiddle tunes"
    # An upbeat of two eighths, then bars of three quarters; D E F# G A B.
    assert tune.bars == [1.0 + 3 * i for i in range(9)]
    assert [note[2] for note in tune.parts[0][1:7]] == [62, 64, 66, 67, 69, 71]
    assert tune.parts[0][0] == [0.0, 1.0, 69]
    assert tune.end == 28.0


@pytest.mark.parametrize(
    ("metre", "felt", "kind"),
    [("2/2", 2.0, "duple"), ("C|", 2.0, "duple"), ("3/4", 1.0, "triple"), ("9/8", 1.5, "compound")],
)
def test_the_felt_beat_is_what_one_taps(metre, felt, kind):
    eighths = {"2/2": 8, "C|": 8, "3/4": 6, "9/8": 9}[metre]
    tune = parsed(("D" * eighths + "|") * 9, metre)
    assert (tune.felt_beat, tune.metre) == (felt, kind)


@pytest.mark.parametrize(
    ("body", "metre", "why"),
    [
        (BAR * 3, "6/8", "too short"),
        (BAR * 5 + "DEF|" + BAR * 5, "6/8", "too short"),  # an odd bar: no run of eight
        (BAR * 8 + "\nM:2/4\nDEFG|", "6/8", "no metre, or several"),
        (BAR * 8 + "[M:2/4]DEFG|", "6/8", "no metre, or several"),
        (BAR * 8 + "\nK:G\n" + BAR, "6/8", "no key signature, or several"),
        (BAR * 8 + "[K:G]" + BAR, "6/8", "no key signature, or several"),
        ("DEF|" * 9, "3/8", "metre 3/8"),
        ("DEF GA|" * 9, "5/8", "metre 5/8"),
    ],
)
def test_what_is_not_usable_says_why(body, metre, why):
    assert parsed(body, metre) == why


def test_minor_keys_are_declared_and_modes_are_not_guessed():
    minor, dorian = parsed(BAR * 9, key="Em"), parsed(BAR * 9, key="Edor")
    assert (minor.sharps, minor.tonic, minor.mode) == (1, "E", "minor")
    assert (dorian.sharps, dorian.tonic, dorian.mode) == (2, "", "")


@pytest.mark.parametrize(
    ("lengths", "bars"),
    [
        ([1, 4, 4, 4], [1, 5, 9]),  # an upbeat
        ([1, 4, 3, 1, 4, 3], [1, 5, 9]),  # a repeat sign before the last beat of a bar, and a last bar without it
        ([4, 4, 3, 4, 4, 4], [11, 15, 19]),  # an odd bar: the longer run
        ([4, 2, 2, 4, 3, 2, 4], [0, 4, 8]),
        ([1, 1], []),
    ],
)
def test_whole_bars(lengths, bars):
    onsets = [sum(lengths[:i]) for i in range(len(lengths))]
    assert whole_bars(list(zip(onsets, lengths, strict=True)), 4.0) == bars


def test_fields_of_abc():
    text = "X: 1\nT:a\nR: Double Jig % as printed\nM:6/8\nK:G\nab[M:9/8]c|\nK:D\nabc|\n\nX:22\nR:slipjig\nK:Am\n"
    assert abc_fields(text) == {
        "1": {"R": ["Double Jig"], "M": ["6/8", "9/8"], "K": ["G", "D"]},
        "22": {"R": ["slipjig"], "K": ["Am"]},
    }
    assert [kind_of(t) for t in ("Double Jig", "slipjig", "HIGHLAND FLING", "The Reel -- Polka", "Kitty")] == [
        "jig",
        "jig",
        "fling",
        "reel",
        "",
    ]


def test_grace_notes_are_left_out_and_ties_are_one_note():
    tune = parsed("{c}D3 E3-|E3 F3|" + BAR * 8)
    assert tune.parts[0][:3] == [[0.0, 1.5, 62], [1.5, 3.0, 64], [4.5, 1.5, 66]]


def made(name: str, *rest: str, **fields: str) -> Tune:
    tune = parsed(*rest, **fields)
    tune.id = name
    return tune


def test_a_tune_is_kept_once():
    tunes = [
        made("a", BAR * 9),
        made("b", "d3 c3|" * 9, title="Test, The"),  # the same title
        made("c", "GAB cde|" * 9, key="G", title="Another"),  # the same melody, a fourth up
        made("d", "A2|" + BAR * 9, title="With an upbeat"),
        made("e", "d3 B2A|" * 9, title="Other"),
    ]
    assert [tune.id for tune in distinct(tunes)] == ["a", "e"]
    assert plain_title("The Devil's Dream -- Reel") == "devils dream"


def test_melodies_that_share_a_stretch_are_of_one_family_and_one_split():
    long = "DEF GAB|dcB AGF|EFG ABc|dfa gec|"  # 24 notes: 23 steps, 24 with what comes after
    elsewhere = next(f"b{i}" for i in range(99) if split_of(f"b{i}") != split_of("a"))
    tunes = [
        made("a", "d3 d3|" * 6 + long + "d6|"),
        made(elsewhere, "G3 B3|" * 7 + "GAB cde|gfe dcB|ABc def|gbd' c'af|g6|", key="G"),
        made("c", "e2d efg|" * 9),
        made("d", "e2d efg|" * 4 + "d3 d3|" * 5),
    ]
    assert families(tunes) == {"a": "a", elsewhere: "a", "c": "c", "d": "d"}
    for tune in tunes:
        tune.family = families(tunes)[tune.id]
    where = {tune.id: split for split, of in split_tunes(tunes).items() for tune in of}
    assert where == {"a": split_of("a"), elsewhere: split_of("a"), "c": split_of("c"), "d": split_of("d")}


def test_an_unreadable_file_is_a_reason(tmp_path):
    file = tmp_path / "x.mxl"
    file.write_bytes(b"not a score")
    assert list(read_file("bach", str(file))) == [("bach/x", "unreadable", {})]


def test_tunes_of_one_file_keep_their_own_fields(tmp_path):
    file = tmp_path / "two.abc"
    first, second = written(BAR * 9), written("d3 c3|" * 9, key="G").replace("X:1", "X:7")
    file.write_text(f"{first}\n{second.replace('T:', 'R:reel' + chr(10) + 'T:')}")
    found = {name: fields for name, _, fields in read_file("oneill", str(file))}
    assert found == {
        "oneill/two#0": {"M": ["6/8"], "K": ["D"]},
        "oneill/two#1": {"R": ["reel"], "M": ["6/8"], "K": ["G"]},
    }


def test_a_chorale_is_what_is_printed():
    """BWV 66.6: three sharps, four voices, and the opening that the literature's examples show."""
    path = next(p for c, p in scores.corpus_files() if c == "bach" and p.endswith("bwv66.6.mxl"))
    (name, score, fields), *rest = read_file("bach", path)
    assert not rest
    tune = tune_of("bach", name, score, fields)
    assert (tune.id, tune.kind, tune.sharps, tune.mode, tune.metre, len(tune.parts)) == (
        "bach/bwv66.6",
        "chorale",
        3,
        "",
        "duple",
        4,
    )
    assert tune.bars[:3] == [1.0, 5.0, 9.0]
    # C#5 B4 | A4 B4 C#5 E5 |
    assert [n[2] for n in tune.parts[0][:6]] == [73, 71, 69, 71, 73, 76]
    assert [n[2] for n in tune.parts[3][:3]] == [57, 56, 54]  # A3 G#3 | F#3


def test_the_corpus_is_all_there_in_pieces_of_like_work():
    files = scores.corpus_files()
    assert {name: sum(c == name for c, _ in files) for name in scores.COLLECTIONS} == {
        "bach": 408,
        "ryan": 1059,
        "oneill": 39,
    }
    pieces = chunked(files)
    assert [f for piece in pieces for f in piece] == files
    assert all(len({c for c, _ in piece}) == 1 for piece in pieces)


@pytest.mark.slow
def test_every_usable_tune_of_the_corpus_fits_its_key():
    """Nine tenths of a tune's notes are in the scale of its signature, and declared keys are those of the signature."""
    found = scores.load_scores()
    tunes = found.tunes
    assert len(tunes) > 2500
    numbered = sum(Path(p).read_text("latin-1").count("\nX:") for c, p in scores.corpus_files() if c == "oneill")
    assert len(tunes) + found.rejected.total() == pytest.approx(408 + 1059 + numbered, abs=39)  # files, and tunes
    fits = 0
    for tune in tunes:
        scale = {(7 * tune.sharps + step) % 12 for step in (0, 2, 4, 5, 7, 9, 11)}
        pitches = [note[2] % 12 for part in tune.parts for note in part]
        fits += sum(pitch in scale for pitch in pitches) >= 0.9 * len(pitches)
        gaps = {round(b - a, 6) for a, b in zip(tune.bars, tune.bars[1:], strict=False)}
        assert gaps == {tune.bar}, tune.id
        if tune.mode:
            name = (MAJOR if tune.mode == "major" else MINOR)[tune.sharps % 12]
            assert semitone(tune.tonic) == semitone(name), tune.id
    assert fits > 0.95 * len(tunes)
    sides = split_tunes(tunes)
    assert sum(map(len, sides.values())) == len(tunes)
    assert all(220 < len(sides[name]) < 320 for name in ("val", "test"))
    stretches = {split: {s for tune in of for s in steps(tune)} for split, of in sides.items()}
    assert not stretches["train"] & (stretches["val"] | stretches["test"])
    assert not stretches["val"] & stretches["test"]


def semitone(name: str) -> int:
    sign = 1 if "sharp" in name or "#" in name else -1 if "flat" in name or "b" in name[1:] else 0
    return ({"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[name[0]] + sign) % 12


def steps(tune: Tune, count: int = 24) -> set[tuple[int, ...]]:
    pitches = [note[2] for note in tune.parts[0]]
    return {
        tuple(b - a for a, b in zip(pitches[i : i + count], pitches[i + 1 : i + count + 1], strict=True))
        for i in range(len(pitches) - count)
    }
