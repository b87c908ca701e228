"""Rendered clips on disk: made once, a block at a time, read by memory mapping."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.data.assets import data_root, locked
from bestiary.shared.data.music.clips import CLIPS, Clip, ClipMaker, split_tunes
from bestiary.shared.data.music.pool import each
from bestiary.shared.data.music.render import Renderer, renderer_revision
from bestiary.shared.data.music.scores import Tune, load_scores, parse_scores, scores_revision

BLOCK = 128
"""Clips of a file."""


class ClipStore:
    """The sound of all clips of one kind and split.

    The folder's name covers all that the sound depends on: scores, renderer, soundfont, and the maker and its
    arguments. A block is written aside and renamed, so a rendering that was stopped goes on where it was.

    Args:
        kind: ``clip`` or ``time_clip``, a method of :class:`~bestiary.shared.data.music.clips.ClipMaker`.
        split: ``train``, ``val`` or ``test``.
        count: clips.
        rate: samples a second.
        options: arguments of the maker.
        workers: processes that render; None is one a core, 0 renders here.
        font: an own soundfont's file.
    """

    def __init__(
        self,
        kind: str,
        split: str,
        count: int,
        rate: int,
        options: dict[str, Any],
        workers: int | None = None,
        font: str | None = None,
    ):
        self.kind, self.split, self.count, self.rate = kind, split, count, rate
        self.options, self.workers, self.font = options, workers, font
        # How many clips there are does not change the clips.
        parts = [scores_revision(), CLIPS, renderer_revision(font), kind, split, rate, options]
        self.key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = data_root() / "music" / f"{kind}s-{split}-{self.key}"
        self._blocks: dict[int, np.ndarray] = {}

    def render(self) -> None:
        """Render what is not there yet."""
        missing = [n for n in range(-(-self.count // BLOCK)) if not self._file(n).is_file()]
        if not missing:
            return
        parse_scores(self.workers)  # once, before processes that read them
        with locked(self.folder.name):
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".*"):  # of a rendering that was killed
                left.unlink(missing_ok=True)
            jobs = [
                (self._file(n), self.kind, self.split, n * BLOCK, self.rate, self.options, self.font)
                for n in missing
                if not self._file(n).is_file()
            ]
            each(render_block, jobs, self.workers, f"rendering {self.count:,} clips ({self.split})")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> np.ndarray:
        """(N,) float32 samples of a clip; the first one that is asked for renders all."""
        block, at = divmod(number, BLOCK)
        if block not in self._blocks:
            if not self._file(block).is_file():
                self.render()
            self._blocks[block] = np.load(self._file(block), mmap_mode="r")
        return self._blocks[block][at].astype(np.float32) / 32767

    def _file(self, block: int) -> Path:
        return self.folder / f"{block:05d}.npy"


def render_block(job: tuple[Path, str, str, int, int, dict[str, Any], str | None]) -> None:
    """Render the clips of one file."""
    file, kind, split, first, rate, options, font = job
    renderer = _renderer(rate, font)
    make: Callable[[int], Clip] = getattr(maker(split, options), kind)
    clips = [make(number) for number in range(first, first + BLOCK)]
    sound = np.stack([np.round(renderer(clip.notes, clip.seconds) * 32767).astype(np.int16) for clip in clips])
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    with open(aside, "wb") as handle:
        np.save(handle, sound)
    os.replace(aside, file)


@cache
def _renderer(rate: int, font: str | None) -> Renderer:
    return Renderer(rate, font)


def maker(split: str, options: dict[str, Any]) -> ClipMaker:
    """The maker of a split's clips, on the parsed scores."""
    return ClipMaker(_tunes()[split], split, **options)


@cache
def _tunes() -> dict[str, list[Tune]]:
    return split_tunes(load_scores().tunes)
