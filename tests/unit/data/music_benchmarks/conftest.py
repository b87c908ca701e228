"""Small trees in the layouts of the benchmarks, with generated audio."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile


@pytest.fixture
def tone(tmp_path):
    """Write a file below ``tmp_path``: a constant of ``value``, ``seconds`` long; returns its path."""

    def write(name: str, value: float = 0.5, seconds: float = 0.1, rate: int = 16000) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.full(int(seconds * rate), value, np.float32), rate, subtype="FLOAT")
        return path

    return write


@pytest.fixture
def put(tmp_path):
    """Write JSON (or a text as it is) below ``tmp_path``."""

    def write(name: str, data) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return path

    return write


@pytest.fixture
def pieces():
    """(audio contents, text) of an example's one message."""

    def split(example) -> tuple[list, str]:
        (message,) = example["messages"]
        assert message["role"] == "user"
        *audio, text = message["content"]
        assert [c["type"] for c in (*audio, text)] == ["audio"] * len(audio) + ["text"]
        return audio, text["value"]

    return split
