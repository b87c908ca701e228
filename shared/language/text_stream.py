"""Text of a growing row of tokens: piece by piece, never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no character yet."""


class TextStream:
    """Decodes one token at a time.

    Only the last few tokens are decoded at each step: enough for a character of several tokens, and for tokenizers
    whose first token of a text loses its space.

    Args:
        tokenizer: with ``decode``.
    """

    longest, kept = 32, 8

    def __init__(self, tokenizer: Any):
        self._decode = tokenizer.decode
        self._ids: list[int] = []
        self._sent = 0

    def push(self, token: int) -> str:
        """The new text that this token makes certain; bytes that may yet become a character wait."""
        self._ids.append(token)
        text = _certain(self._decode(self._ids))
        new, self._sent = text[self._sent :], max(self._sent, len(text))
        if len(self._ids) > self.longest:
            self._ids = self._ids[-self.kept :]
            self._sent = len(_certain(self._decode(self._ids)))
        return new

    def flush(self) -> str:
        """What still waits, when no more tokens come."""
        text = self._decode(self._ids)
        new, self._sent = text[self._sent :], max(self._sent, len(text))
        return new


def _certain(text: str) -> str:
    # A character has at most four bytes, so at most three broken ones at the end may still become one.
    end = len(text)
    while end and len(text) - end < 3 and text[end - 1] == BROKEN:
        end -= 1
    return text[:end]


class StopFilter:
    """Finds stop strings in text that comes in pieces, and holds back what may be the beginning of one.

    Args:
        stop: the strings; empty ones are never found.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self._stop = [s for s in stop if s]
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is surely before any stop string; ``found`` is set once there is one."""
        text = self._held + piece
        at = min((i for i in (text.find(s) for s in self._stop) if i >= 0), default=-1)
        if at >= 0:
            self.found, self._held = True, ""
            return text[:at]
        hold = max((overlap(text, s) for s in self._stop), default=0)
        cut = len(text) - hold
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
