"""rl_jsonl: a user's own prompts, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bestiary.shared.data.user_files import regular_file
from bestiary.shared.rl.tasks.rows import PromptRows

LONGEST_LINE = 16 * 2**20
"""Bytes of a line; a longer one is a fault and is not parsed."""


class RLJsonl(PromptRows):
    """Prompts from a file of JSON lines.

    A line is ``{"prompt": text or "messages": [{"role", "content"}, …], "answer": …, "verifier": name, "meta": {…},
    "id": …, "split": "train" | "val" | "test"}``. ``id`` and ``split`` may be left out: a row is then named by its
    line, and a tenth each goes to val and test by the hash of what is asked. An answer that is no text is written as
    JSON. Empty lines are passed over.

    Args:
        path: the file.
        verifier: for lines that name none.
        max_mb: largest file; all rows are kept in memory.

    Raises:
        ConfigError: for an unknown verifier.
    """

    def __init__(self, path: str | Path, verifier: str | None = None, max_mb: float = 1000):
        super().__init__("rl_jsonl", path, verifier, max_mb)

    def files(self) -> list[Path]:
        """The one file."""
        return [regular_file(self.path, "dataset.path", "a file with one JSON object a line")]

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Each line that is not empty, as ``line N``."""
        with self.files()[0].open("rb") as handle:
            number = 0
            while line := handle.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    while line and not line.endswith(b"\n"):
                        line = handle.readline(LONGEST_LINE)
                    yield f"line {number}", ValueError(f"longer than {LONGEST_LINE // 2**20} MiB")
                elif line.strip():
                    yield f"line {number}", _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def _parse(line: bytes) -> Any:
    """The value, or a ValueError that says why there is none."""

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(line.decode(), parse_constant=no_constant)
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}")
    except RecursionError:
        return ValueError("not JSON: nested too deeply")
    except ValueError as error:
        return ValueError(f"not JSON: {error}"[:200])
