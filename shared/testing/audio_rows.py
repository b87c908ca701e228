"""A small folder of audio and rows of questions about it, for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import Example
from bestiary.shared.data.audio_qa import AudioQAJsonl


def audio_folder(root: Path) -> Path:
    """``audio/a.wav`` … ``f.wav`` in a folder: 2 s at 8 kHz, whose samples stand at 0.1, 0.2, …"""
    import soundfile

    (root / "audio").mkdir()
    for n, name in enumerate("abcdef", 1):
        soundfile.write(root / "audio" / f"{name}.wav", np.full(16000, n / 10, np.float32), 8000)
    return root


def write(folder: Path, *rows: Mapping[str, Any] | str, name: str = "data.jsonl") -> Path:
    """Rows, or lines as they are, as a file."""
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(name: str = "a", **more: Any) -> dict[str, Any]:
    """A whole row about one of the clips."""
    return {"audio": f"audio/{name}.wav", "question": "Which key?", "answer": "G major", "split": "test", **more}


def source(path: Path, **options: Any) -> AudioQAJsonl:
    """The file as a data source, at the clips' rate."""
    return AudioQAJsonl(str(path), rate=8000, **options)


def report(path: Path, **options: Any) -> str:
    """What is said of a file that is refused."""
    try:
        source(path, **options).check()
    except BadDataError as error:
        return str(error)
    raise AssertionError(f"{path} was not refused")


def pieces(example: Example) -> list[Any]:
    """Each piece of the last turn: its text, or the level (times ten) and length of its audio."""
    out: list[Any] = []
    for content in example["messages"][-1]["content"]:
        value = content["value"]
        if content["type"] == "text":
            out.append(value)
        else:
            out.append((round(float(value.mean()) * 10), len(value)))
    return out
