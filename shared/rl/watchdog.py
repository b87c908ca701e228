"""Says where a run hangs: the stacks of all threads, when nothing has moved for a while."""

from __future__ import annotations

import faulthandler
import sys


class Watchdog:
    """Writes all stacks to stderr when it has not been told for ``minutes`` that something moved; the run goes on.

    It is the interpreter's own (``faulthandler``), so that it speaks too while a C function holds everything up.

    Args:
        minutes: how long nothing may move; None switches it off.
    """

    def __init__(self, minutes: float | None):
        self.seconds = None if minutes is None else minutes * 60

    def beat(self) -> None:
        """Something moved: count from here."""
        if self.seconds is not None and hasattr(sys.stderr, "fileno"):
            try:
                faulthandler.dump_traceback_later(self.seconds, repeat=True, file=sys.stderr)
            except (OSError, ValueError, AttributeError):  # a stderr that is no file has nowhere to write to
                self.seconds = None

    def rest(self) -> None:
        """Nothing is expected to move."""
        if self.seconds is not None:
            faulthandler.cancel_dump_traceback_later()
