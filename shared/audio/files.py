"""Audio files to mono samples at one rate. Files are read with soundfile: wav, flac, mp3, ogg and more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.core.errors import BadDataError, require

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif")
"""Endings of files that are taken for audio when a folder is searched."""


def read_audio(path: Path | str, rate: int = 16000, start: float = 0.0, end: float | None = None) -> np.ndarray:
    """Read a file, or a part of it, as mono at one rate.

    Args:
        path: the file.
        rate: samples a second of what is returned.
        start: where to begin, in seconds.
        end: where to stop, in seconds; None is the file's end.

    Returns:
        (N,) float32; channels are averaged.

    Raises:
        BadDataError: if the file is not there, is no audio, holds no samples in that part, or values that are not
            finite.
    """
    soundfile: Any = require("soundfile", "audio")
    path = Path(path)
    if not path.is_file():
        raise BadDataError(f"{path}: there is no such file")
    if start < 0 or (end is not None and end <= start):
        raise BadDataError(f"{path}: start {start:g} s and end {end} s leave nothing to read")
    try:
        with soundfile.SoundFile(path) as handle:
            own = handle.samplerate
            first = min(round(start * own), handle.frames)
            handle.seek(first)
            count = -1 if end is None else max(0, round(end * own) - first)
            samples = handle.read(count, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise BadDataError(f"{path} cannot be read as audio: {' '.join(str(error).split())}") from error
    if not len(samples):
        raise BadDataError(
            f"{path} has no samples between {start:g} s and {'its end' if end is None else f'{end:g} s'}"
        )
    mono = samples.mean(1)
    if not np.isfinite(mono).all():
        raise BadDataError(f"{path} holds samples that are not finite")
    return resample(mono, own, rate)


def duration(path: Path | str) -> float:
    """Length of an audio file in seconds, from its header.

    Raises:
        BadDataError: if it is not there or no audio.
    """
    soundfile: Any = require("soundfile", "audio")
    if not Path(path).is_file():
        raise BadDataError(f"{path}: there is no such file")
    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise BadDataError(f"{path} cannot be read as audio: {' '.join(str(error).split())}") from error
    return info.frames / info.samplerate


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """(N,) at one rate to (M,) float32 at another, by torchaudio's windowed sinc."""
    if rate == wanted:
        return np.ascontiguousarray(samples, np.float32)
    torch: Any = require("torch", "zoo")
    functional: Any = require("torchaudio.functional", "audio")
    # The default filter of torchaudio is short; this is its documented imitation of a good one.
    options = {"lowpass_filter_width": 64, "rolloff": 0.9475937167399596, "resampling_method": "sinc_interp_kaiser"}
    signal = torch.from_numpy(np.ascontiguousarray(samples, np.float32))
    return functional.resample(signal, rate, wanted, beta=14.769656459379492, **options).numpy()
