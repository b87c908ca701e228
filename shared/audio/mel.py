"""The front end: a waveform as windows of log-mel frames, compatible with Whisper's.

Shapes: N samples, W windows of a clip, M mel bins, T frames of a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from bestiary.shared.core.errors import BadDataError, ConfigError, require

TAIL = 2
"""Frames behind the last real one that an encoder's two convolutions look at."""


class Windows(NamedTuple):
    """The windows of one clip.

    Attributes:
        features: (W, M, T) float32; T is the longest window's, at most ``LogMel.frames``.
        lengths: (W,) int64, real frames of each window.
    """

    features: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class LogMel:
    """Cuts a clip into windows and computes the log-mel spectrogram of each.

    A window ends where its clip ends, plus :data:`TAIL` frames, unless it is filled up with silence. What is there
    equals what Whisper's extractor gives for the window filled with zeros. A frame is real if its hop begins inside the
    clip: ceil(N / hop). Beyond ``max_seconds`` a clip is cut, and whoever asks is told (:meth:`is_cut`).

    Paper: arXiv:2212.04356 (Whisper) Sec. 2.2; windows as in arXiv:2511.10289 (Music Flamingo).

    Args:
        rate: samples a second.
        n_fft: samples of a Fourier transform.
        hop: samples between frames.
        window: samples of the Hann window, at most ``n_fft``; None is ``n_fft``.
        n_mels: mel bins, 0 Hz to half the rate.
        window_seconds: length of a window; its frames must be divisible by 4.
        max_seconds: longest clip, a whole number of windows.
        fill: every window is filled up with silence, and the encoder attends to it, as Whisper was trained.

    Raises:
        ConfigError: for numbers that cannot be.
    """

    rate: int = 16000
    n_fft: int = 400
    hop: int = 160
    window: int | None = None
    n_mels: int = 128
    window_seconds: float = 30.0
    max_seconds: float = 1200.0
    fill: bool = False

    def __post_init__(self) -> None:
        for name in ("rate", "n_fft", "hop", "n_mels", "window_seconds", "max_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"front_end.{name} must be positive, not {getattr(self, name)}")
        if self.window is not None and not 0 < self.window <= self.n_fft:
            raise ConfigError(f"front_end.window must be between 1 and n_fft={self.n_fft}, not {self.window}")
        if abs(self.samples / self.hop - round(self.samples / self.hop)) > 1e-9 or self.frames % 4:
            raise ConfigError(
                f"a window of {self.window_seconds:g} s has {self.samples / self.hop:g} frames of {self.hop} samples: "
                "that must be a whole number, divisible by 4 (two steps of stride 2 follow)"
            )
        if self.n_fft // 2 >= self.samples:
            raise ConfigError(f"front_end.n_fft {self.n_fft} is longer than two windows of {self.samples} samples")
        if self.max_seconds < self.window_seconds:
            raise ConfigError(f"front_end.max_seconds {self.max_seconds:g} is less than one window")

    @property
    def samples(self) -> int:
        """Samples of a whole window."""
        return round(self.window_seconds * self.rate)

    @property
    def frames(self) -> int:
        """Frames of a whole window."""
        return self.samples // self.hop

    @property
    def max_windows(self) -> int:
        """Most windows of a clip."""
        return int(self.max_seconds / self.window_seconds + 1e-9)

    def is_cut(self, count: int) -> bool:
        """Whether a clip of that many samples is longer than ``max_seconds``."""
        return count > self.max_windows * self.samples

    def __call__(self, waveform: np.ndarray | torch.Tensor) -> Windows:
        """The windows of one clip.

        Args:
            waveform: (N,) float, mono, at ``rate``, between -1 and 1.

        Raises:
            BadDataError: if it is not of that shape, has no samples, or holds values that are not finite.
        """
        clip = torch.as_tensor(waveform, dtype=torch.float32)
        if clip.dim() != 1:
            raise BadDataError(f"audio must be mono, one row of samples, not of shape {tuple(clip.shape)}")
        if not len(clip):
            raise BadDataError("an audio clip has no samples")
        if not torch.isfinite(clip.sum()):  # one pass; a sample that is not finite makes the sum so
            raise BadDataError("an audio clip holds samples that are not finite")
        clip = clip[: self.max_windows * self.samples]
        parts = clip.split(self.samples)
        mels = [self._log_mel(part) for part in parts]
        width = max(mel.shape[1] for mel in mels)
        lengths = torch.tensor([math.ceil(len(part) / self.hop) for part in parts])
        return Windows(torch.stack([F.pad(mel, (0, width - mel.shape[1])) for mel in mels]), lengths)

    def _log_mel(self, part: torch.Tensor) -> torch.Tensor:
        """(n,) samples of one window to (M, T)."""
        frames = self.frames if self.fill else min(self.frames, math.ceil(len(part) / self.hop) + TAIL)
        half = self.n_fft // 2
        # The window is centred on its frame, so the ends are mirrored. Behind the clip's end there are zeros up to the
        # window's, so only a clip that comes near the window's end is mirrored there.
        longest = min(self.samples, max((frames - 1) * self.hop + half, half) + 1)
        filled = F.pad(part, (0, max(0, longest - len(part))))
        left = filled[1 : half + 1].flip(0)
        right = filled.new_zeros(half)
        if len(filled) == self.samples:
            right = filled[-half - 1 : -1].flip(0)
        signal = torch.cat([left, filled, right])
        taper, filters = self._tables
        pieces = signal.unfold(0, self.n_fft, self.hop)[:frames] * taper
        real, imaginary = torch.view_as_real(torch.fft.rfft(pieces)).unbind(-1)
        power = real.square().addcmul_(imaginary, imaginary)
        mel = torch.cat([power[:, bins] @ weights for bins, weights in filters], 1).clamp_(min=1e-10).log10_()
        return torch.maximum(mel, mel.max() - 8.0).add_(4.0).div_(4.0).T

    @cached_property
    def _tables(self) -> tuple[torch.Tensor, list[tuple[slice, torch.Tensor]]]:
        """The taper (n_fft,), and the mel filters in eight groups: the bins that a group has weights for, and those.

        Neighbouring filters share their few bins, so that the groups together are a fraction of the whole matrix.
        """
        functional: Any = require("torchaudio.functional", "audio")
        width = self.window or self.n_fft
        before = (self.n_fft - width) // 2
        taper = F.pad(torch.hann_window(width), (before, self.n_fft - width - before))
        bins = self.n_fft // 2 + 1
        top = self.rate / 2
        filters = functional.melscale_fbanks(bins, 0.0, top, self.n_mels, self.rate, norm="slaney", mel_scale="slaney")
        groups = []
        for part in filters.split(math.ceil(self.n_mels / 8), dim=1):
            # A filter narrower than a bin may have none at all.
            used = part.any(1).nonzero()[:, 0].tolist() or [0]
            bins_used = slice(used[0], used[-1] + 1)
            groups.append((bins_used, part[bins_used].contiguous()))
        return taper, groups
