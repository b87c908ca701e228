"""Rendered notes: their pitch, their time, their loudness; and the same samples whatever was played before."""

import numpy as np
import pytest

from bestiary.shared.core.errors import BadDataError, MissingDataError
from bestiary.shared.data.music.clips import ACCENT, INSTRUMENTS, PLAIN
from bestiary.shared.data.music.render import LOUDNESS, Note, Renderer, level, renderer_revision

RATE = 16000


@pytest.fixture(scope="module")
def renderer(need_asset):
    need_asset("timgm6mb")
    need_asset("tinysoundfont")
    return Renderer(RATE)


def scale(program, velocity=PLAIN, gap=0.5):
    return [Note(i * gap, gap * 0.9, 60 + step, velocity, program) for i, step in enumerate((0, 2, 4, 5, 7, 9))]


def energy(samples, start, seconds):
    piece = samples[round(start * RATE) : round((start + seconds) * RATE)]
    return float(np.sqrt(np.mean(np.square(piece, dtype=np.float64))))


@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.23456, 3.0])
def test_a_clip_has_its_length_to_the_sample(renderer, seconds):
    samples = renderer(scale(0), seconds)
    assert samples.shape == (round(seconds * RATE),)
    assert samples.dtype == np.float32


def test_a_clip_does_not_depend_on_what_was_played_before(renderer):
    for program in INSTRUMENTS.values():
        alone = Renderer(RATE)(scale(program), 2.0)
        for before in (48, 0, 19):  # that ring on
            renderer([*scale(before), Note(0.0, 9.0, 72, 120, before)], 2.0)
            assert np.array_equal(renderer(scale(program), 2.0), alone)


@pytest.mark.parametrize("program", INSTRUMENTS.values(), ids=list(INSTRUMENTS))
def test_pitch(renderer, program):
    """The strongest frequencies near A4 = 440 Hz, and a semitone above it where that is played."""
    for pitch in (69, 70):
        samples = renderer([Note(0.0, 2.0, pitch, 90, program)], 2.0)[RATE // 2 :]
        spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 4 * RATE))
        hertz = np.arange(len(spectrum)) / 4
        near = (hertz > 420) & (hertz < 490)
        found = hertz[near][spectrum[near].argmax()]
        assert abs(12 * np.log2(found / (440 * 2 ** ((pitch - 69) / 12)))) < 0.35


def test_all_instruments_are_equally_loud(renderer):
    for program in INSTRUMENTS.values():
        for velocity in (30, 70, 120):
            samples = renderer(scale(program, velocity), 3.0)
            assert energy(samples, 0, 3) == pytest.approx(LOUDNESS, rel=1e-3)
            assert np.abs(samples).max() < 1.0


def test_notes_are_heard_when_they_are_played(renderer):
    """Before the first note there is silence, and after a rest; each strike raises the energy."""
    starts = [0.5, 1.25, 2.0]
    samples = renderer([Note(start, 0.3, 60, 90, 6) for start in starts], 3.0)
    assert energy(samples, 0.0, 0.499) == 0.0
    for start in starts:
        assert energy(samples, start, 0.1) > 4 * energy(samples, start - 0.1, 0.1)
    # The same, later by what is no whole number of blocks, is the same sound.
    shifted = renderer([Note(start + 0.12345, 0.3, 60, 90, 6) for start in starts[:1]], 1.5)
    alone = renderer([Note(start, 0.3, 60, 90, 6) for start in starts[:1]], 1.5)
    late = round((0.5 + 0.12345) * RATE) - round(0.5 * RATE)
    a, b = alone[: 14000 - late], shifted[late:14000]
    assert np.corrcoef(a, b)[0, 1] > 0.99


def test_a_repeated_note_is_struck_again(renderer):
    """Notes that touch: the release comes before the strike of the same moment."""
    touching = renderer([Note(i * 0.5, 0.5, 64, 90, 0) for i in range(4)], 2.0)
    for start in (0.5, 1.0, 1.5):
        assert energy(touching, start + 0.01, 0.05) > 1.2 * energy(touching, start - 0.06, 0.05)


@pytest.mark.parametrize("program", INSTRUMENTS.values(), ids=list(INSTRUMENTS))
def test_accents_are_louder(renderer, program):
    samples = renderer([Note(i * 0.5, 0.45, 65, ACCENT if i % 3 == 0 else PLAIN, program) for i in range(6)], 3.0)
    beats = [energy(samples, i * 0.5, 0.45) for i in range(6)]
    assert min(beats[0], beats[3]) > 1.2 * max(beats[1], beats[2], beats[4], beats[5])


def test_two_instruments_at_once_are_both_heard(renderer):
    both = renderer([Note(0.0, 1.0, 60, 90, 19), Note(0.0, 1.0, 67, 90, 40)], 1.0)
    one = renderer([Note(0.0, 1.0, 60, 90, 19)], 1.0)
    spectra = [np.abs(np.fft.rfft(s * np.hanning(len(s)))) for s in (both, one)]
    g4 = slice(388, 397)  # 392 Hz
    assert spectra[0][g4].max() > 5 * spectra[1][g4].max()
    crowd = [Note(0.0, 1.0, 60, 90, program) for program in range(10)]
    with pytest.raises(BadDataError, match="10 instruments"):
        renderer(crowd, 1.0)


def test_silence_stays_and_peaks_are_held():
    assert not level(np.zeros(100, np.float32)).any()
    click = np.zeros(16000, np.float32)
    click[5] = 0.5  # as loud as the others it would be far beyond 1
    assert np.abs(level(click)).max() == pytest.approx(0.99)


def test_soundfonts(need_asset, tmp_path):
    need_asset("tinysoundfont")
    bad, other = tmp_path / "bad.sf2", tmp_path / "other.sf2"
    bad.write_bytes(b"no soundfont")
    other.write_bytes(b"another")
    with pytest.raises(BadDataError, match=r"bad\.sf2 cannot be read as a soundfont"):
        Renderer(RATE, str(bad))
    with pytest.raises(MissingDataError, match=r"no soundfont .*none\.sf2"):
        Renderer(RATE, str(tmp_path / "none.sf2"))
    assert len({renderer_revision(), renderer_revision(str(bad)), renderer_revision(str(other))}) == 3


def test_an_own_soundfont_sounds_like_its_samples(need_asset, tmp_path, renderer):
    copy = tmp_path / "copy.sf2"
    copy.write_bytes((need_asset("timgm6mb") / "TimGM6mb.sf2").read_bytes())
    assert np.array_equal(Renderer(RATE, str(copy))(scale(40), 1.0), renderer(scale(40), 1.0))
