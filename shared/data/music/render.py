"""Notes to samples, with a soundfont and tinysoundfont."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bestiary.shared.core.errors import BadDataError, MissingDataError
from bestiary.shared.data.assets import add_site, asset_path, get_asset

RENDERER = 2
"""Raised whenever a clip would sound otherwise."""

LOUDNESS, PEAK = 0.05, 0.99
"""Root mean square of a clip, and the largest sample: nothing can be told from how loud a clip is."""


class Note(NamedTuple):
    """A note to play.

    Attributes:
        start, duration: seconds. pitch, velocity: MIDI. program: General MIDI, from 0.
    """

    start: float
    duration: float
    pitch: int
    velocity: int
    program: int


def soundfont(own: str | None = None) -> Path:
    """The soundfont's file.

    Args:
        own: a file of the user's; None is the asset ``timgm6mb``.

    Raises:
        MissingDataError: if it is not there.
    """
    if own is None:
        return asset_path("timgm6mb") / "TimGM6mb.sf2"
    file = Path(own).expanduser()
    if not file.is_file():
        raise MissingDataError(f"there is no soundfont {file}. Give dataset.soundfont an .sf2 file, or null")
    return file


def check_renderer(own: str | None = None) -> None:
    """Raise MissingDataError if the soundfont or the synthesiser is not there."""
    soundfont(own)
    asset_path("tinysoundfont")


def renderer_revision(own: str | None = None) -> str:
    """What a clip's sound depends on besides its notes; the asset need not be there, an own soundfont must."""
    synth = get_asset("tinysoundfont")
    font = get_asset("timgm6mb").sha256[0] if own is None else hashlib.sha256(soundfont(own).read_bytes()).hexdigest()
    return f"{RENDERER}-{synth.version}-{font[:12]}-{LOUDNESS}-{PEAK}"


class Renderer:
    """Plays notes into arrays. Load it once in a process: that takes some 40 ms.

    Args:
        rate: samples a second.
        font: an own soundfont's file; None is that of the asset ``timgm6mb``.

    Raises:
        BadDataError: if the file is no soundfont.
    """

    def __init__(self, rate: int = 16000, font: str | None = None):
        add_site("tinysoundfont")
        import tinysoundfont

        self.rate = rate
        self._synth: Any = tinysoundfont.Synth(samplerate=rate)
        self._file = file = soundfont(font)
        try:
            self._font = self._synth.sfload(str(file))
        except RuntimeError as error:
            raise BadDataError(f"{file} cannot be read as a soundfont: {error}") from error

    def __call__(self, notes: Sequence[Note], seconds: float) -> np.ndarray:
        """(N,) float32, mono, as loud as every other clip.

        A note that is still held at the end is cut. Notes of one program share a channel.

        Args:
            notes: in any order.
            seconds: length of the clip.
        """
        synth, count = self._synth, round(seconds * self.rate)
        self._silence()
        programs = {program: channel for channel, program in enumerate(sorted({note.program for note in notes}))}
        if len(programs) > 9:
            raise BadDataError(f"a clip of {len(programs)} instruments; channels are there for nine")
        for program, channel in programs.items():
            try:
                synth.program_select(channel, self._font, 0, program)
            except RuntimeError as error:
                raise BadDataError(f"{self._file} has no program {program} of General MIDI: {error}") from error
        # Releases come before strikes of the same moment, so that a repeated note sounds twice.
        events = [(round(note.start * self.rate), 1, note) for note in notes]
        events += [(round((note.start + note.duration) * self.rate), 0, note) for note in notes]
        out, at = np.zeros(count, np.float32), 0
        for when, struck, note in sorted(events, key=lambda event: event[:2]):
            at = self._play(out, at, min(max(when, 0), count))
            if when < count:
                channel = programs[note.program]
                if struck:
                    synth.noteon(channel, note.pitch, note.velocity)
                else:
                    synth.noteoff(channel, note.pitch)
        self._play(out, at, count)
        return level(out)

    def _silence(self) -> None:
        """Let the clip before die away: what is switched off fades, and would be heard in the next clip."""
        self._synth.sounds_off()
        while np.frombuffer(bytes(self._synth.generate(self.rate // 10)), np.float32).any():
            pass

    def _play(self, out: np.ndarray, at: int, until: int) -> int:
        if until > at:
            both = np.frombuffer(bytes(self._synth.generate(until - at)), np.float32).reshape(-1, 2)
            out[at:until] = both.mean(1)
        return until


def level(samples: np.ndarray) -> np.ndarray:
    """The same sound at the common loudness; silence stays."""
    power = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
    if power < 1e-6:
        return samples
    scale = LOUDNESS / power
    return (samples * min(scale, PEAK / float(np.abs(samples).max()))).astype(np.float32)
