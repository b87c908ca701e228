"""Real recordings to test on: sounds of instruments and drums, and sentences read aloud, alone or over music."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.audio.files import read_audio, resample
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import Example
from bestiary.shared.core.specs import DataSpec
from bestiary.shared.core.streams import Stream
from bestiary.shared.data.assets import asset_path, get_asset
from bestiary.shared.data.lazy import LazyExamples

SOUNDS = {
    "ambi": "ambience",
    "bass": "bass",
    "bd": "bass drum",
    "drum": "drum",
    "elec": "electronic sound",
    "glitch": "glitch",
    "guit": "guitar",
    "loop": "drum loop",
    "perc": "percussion",
    "sn": "snare drum",
    "tabla": "tabla",
    "vinyl": "vinyl noise",
}
"""Beginnings of the file names of sonic-pi's samples, and what they stand for; files of other names are left out."""


class TestOnly:
    """A data set that nothing is trained on.

    Args:
        name: of the data set, in messages. asset: where its files are. rate: samples a second.
    """

    __test__ = False  # not a class of tests

    def __init__(self, name: str, asset: str, rate: int):
        self.name, self.asset, self.rate = name, asset, rate
        self.revision = f"{name}-{get_asset(asset).sha256[0][:12]}"

    def spec(self) -> DataSpec:
        """Chat with audio."""
        return DataSpec(task="chat", modalities=("audio",))

    def check(self) -> None:
        """Raise MissingDataError where the recordings were not fetched."""
        asset_path(self.asset)

    def train_example(self, k: int, stream: Stream, part: str | None = None) -> Example:
        """There is none.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.name} is a test set: it is never trained on. Train on dataset=score_qa, for example")

    def held_out(self, split: str, part: str | None = None) -> Sequence[Example]:
        """All recordings as ``test``; ``val`` is empty."""
        if split not in ("val", "test"):
            raise ConfigError(f"{self.name} holds out val and test, not {split!r}")
        return Recordings(self) if split == "test" else []

    def __len__(self) -> int:
        raise NotImplementedError

    def example(self, number: int) -> Example:
        """Recording ``number`` with its question."""
        raise NotImplementedError


class Recordings(LazyExamples):
    """The examples of a TestOnly data set, read when they are asked for."""

    def __init__(self, source: TestOnly):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def example(self, at: int) -> Example:
        return self._source.example(at)


class SonicPi(TestOnly):
    """What kind of sound is this: one-shots and loops of real instruments, CC0, the class by the file's name.

    Args:
        rate: samples a second.
        choices: options that are listed with a question; 0 lists none.
    """

    def __init__(self, rate: int = 16000, choices: int = 4):
        super().__init__("sonic_pi", "sonic_pi_samples", rate)
        if not 0 <= choices <= len(SOUNDS) or choices == 1:
            raise ConfigError(f"sonic_pi: choices is 0, or 2 to {len(SOUNDS)}, not {choices}")
        self.choices = choices

    @cached_property
    def files(self) -> list[Path]:
        """Files with a known class, in order."""
        return [p for p in sorted(asset_path(self.asset).glob("*.flac")) if p.stem.split("_")[0] in SOUNDS]

    def __len__(self) -> int:
        return len(self.files)

    def example(self, number: int) -> Example:
        """A recording and ``What kind of sound is this?``; the options are the right one and others by its number."""
        path = self.files[number]
        answer = SOUNDS[path.stem.split("_")[0]]
        text, meta = "What kind of sound is this?", {"task": "sound", "class": answer}
        options: dict[str, str] = {}
        if self.choices:
            rng = np.random.default_rng(number)
            others = [sound for sound in SOUNDS.values() if sound != answer]
            picked = [answer, *(others[int(i)] for i in rng.permutation(len(others))[: self.choices - 1])]
            options = {chr(65 + i): picked[int(j)] for i, j in enumerate(rng.permutation(len(picked)))}
            text += " " + " ".join(f"({letter}) {option}" for letter, option in options.items())
            answer = next(letter for letter, option in options.items() if option == answer)
        example: Example = {
            "id": path.stem,
            "messages": _asked(read_audio(path, self.rate), self.rate, text, f"{path}:{self.rate}"),
            "answer": answer,
            "verifier": "multiple_choice" if options else "exact_text",
            "meta": {**meta, "options": options},
        }
        return example


class LibriVox(TestOnly):
    """Five sentences read aloud, and their words; alone, or over music at a given level.

    Args:
        rate: samples a second.
        accompaniment: a data set whose held-out audio is played under the speech (a node of conf/dataset), or None.
        snr_db: level of the speech over the music, in decibels; a list makes an example of every sentence at each.

    Raises:
        ConfigError: for levels without music or music without levels, and levels that are no numbers or come twice.
    """

    def __init__(self, rate: int = 16000, accompaniment: Any = None, snr_db: Sequence[float] | float | None = None):
        super().__init__("librivox", "pocketsphinx_testdata", rate)
        given = [] if snr_db is None else snr_db
        levels = [given] if isinstance(given, int | float | str) else list(given)
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in levels)
        if not numbers or len(set(levels)) < len(levels):
            raise ConfigError(f"librivox: snr_db is a number of decibels or a list of different ones, not {snr_db!r}")
        if bool(levels) != (accompaniment is not None):
            raise ConfigError("librivox: accompaniment and snr_db go together")
        self.accompaniment, self.levels = accompaniment, levels or [None]
        if accompaniment is not None:
            self.revision += f"+{accompaniment.revision}"

    def check(self) -> None:
        """Raise MissingDataError where the speech or the music was not fetched."""
        super().check()
        if self.accompaniment is not None:
            self.accompaniment.check()

    @cached_property
    def sentences(self) -> list[tuple[Path, str]]:
        """(file, words) of each."""
        folder = asset_path(self.asset) / "librivox"
        found = []
        for line in (folder / "transcription").read_text().splitlines():
            match = re.fullmatch(r"<s> (.*) </s> \((.*)\)", line.strip())
            if match is None:
                raise BadDataError(f"{folder / 'transcription'}: {line[:60]!r} is no line of words and a name")
            found.append((folder / f"{match[2]}.wav", match[1]))
        return found

    def __len__(self) -> int:
        return len(self.sentences) * len(self.levels)

    def example(self, number: int) -> Example:
        """A sentence, the question for its words, and the words."""
        at, which = divmod(number, len(self.levels))
        path, words = self.sentences[at]
        level = self.levels[which]
        speech = read_audio(path, self.rate)
        if level is not None:
            speech = mixed(speech, self._music(at, len(speech)), float(level))
        name = path.stem if level is None else f"{path.stem}-{level:g}db"
        return {
            "id": name,
            "messages": _asked(speech, self.rate, "Transcribe the speech.", f"{self.revision}/{name}:{self.rate}"),
            "answer": words,
            "verifier": "exact_text",
            "meta": {"task": "transcription", "snr_db": level},
        }

    def _music(self, sentence: int, length: int) -> np.ndarray:
        """So many samples of held-out music: another piece for every sentence, repeated where it is short."""
        held_out = self.accompaniment.held_out("test")
        if not len(held_out):
            raise BadDataError("librivox: the accompaniment has no test examples")
        example = held_out[sentence * len(held_out) // len(self.sentences)]
        audio = next((c for m in example["messages"] for c in m["content"] if c["type"] == "audio"), None)
        if audio is None:
            raise BadDataError(f"librivox: example {example['id']!r} of the accompaniment has no audio")
        return np.resize(resample(audio["value"], audio["rate"], self.rate), length)


def mixed(speech: np.ndarray, music: np.ndarray, snr_db: float) -> np.ndarray:
    """Speech over music, (N,) float32: the speech as loud as it was, the music ``snr_db`` decibels below it.

    Both levels are root mean squares over the whole. The sum is scaled down where it would clip.

    Raises:
        BadDataError: if the music is silent: it has no level.
    """
    loud, soft = (float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) for x in (speech, music))
    if soft == 0:
        raise BadDataError("speech cannot be mixed with silence at a level")
    gain = loud / soft * 10 ** (-snr_db / 20)
    both = speech + gain * music
    return (both / max(1.0, float(np.abs(both).max()))).astype(np.float32)


def _asked(samples: np.ndarray, rate: int, text: str, key: str) -> Any:
    audio = {"type": "audio", "value": samples, "rate": rate, "key": key}
    return [{"role": "user", "content": [audio, {"type": "text", "value": text}]}]
