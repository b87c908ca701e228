"""Music whose truth is known because it is made here, of sines and clicks."""

import numpy as np
import pytest

RATE = 22050
TRIADS = {"major": (0, 4, 7), "minor": (0, 3, 7)}
NAMES = ["C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B"]


class Synth:
    """Sines with harmonics, and clicks."""

    rate = RATE

    def clicks(self, bpm, seconds=12.0, first=0.25):
        """(N,) a short burst of 1 kHz on every beat, louder every fourth."""
        out = np.zeros(int(seconds * RATE), np.float32)
        burst = np.sin(2 * np.pi * 1000 * np.arange(600) / RATE) * np.exp(-np.arange(600) / 120)
        for n, at in enumerate(np.arange(first, seconds - 0.05, 60 / bpm)):
            place = round(at * RATE)
            piece = out[place : place + 600]
            piece += (1.0 if n % 4 == 0 else 0.6) * burst[: len(piece)]
        return out

    def notes(self, midi, seconds):
        """(N,) these notes at once, each with four harmonics that fall off, and an attack."""
        t = np.arange(round(seconds * RATE)) / RATE
        out = np.zeros(len(t))
        for note in midi:
            f = 440 * 2 ** ((note - 69) / 12)
            out += sum(np.sin(2 * np.pi * f * k * t) / k**2 for k in range(1, 5))
        return (0.2 * out * np.minimum(1, t / 0.01) * np.exp(-1.5 * t)).astype(np.float32)

    def chords(self, chords, bpm=120):
        """(samples, [(start, end, name)]): two beats of each (root, mode), struck on each beat."""
        beat = 60 / bpm
        out, truth = [], []
        for n, (root, mode) in enumerate(chords):
            pitches = [48 + root, *(60 + (root + step) % 12 for step in TRIADS[mode])]
            out += [self.notes(pitches, beat), self.notes(pitches, beat)]
            truth.append((2 * n * beat, 2 * (n + 1) * beat, f"{NAMES[root]} {mode}"))
        return np.concatenate(out), truth

    def cadences(self, tonic, mode, times=3):
        """(samples, truth) of I IV V I, or i iv V i, in a key."""
        four = (5, "major" if mode == "major" else "minor")
        steps = [(0, mode), four, (7, "major"), (0, mode)]
        return self.chords([((tonic + step) % 12, kind) for step, kind in steps * times])


@pytest.fixture(scope="session")
def synth():
    return Synth()
