"""Whisper tiny.en's audio encoder, out of the CTranslate2 file of a Python package."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from bestiary.shared.audio.frozen import FrozenEncoder
from bestiary.shared.audio.mel import LogMel
from bestiary.shared.audio.whisper_encoder import WhisperEncoder
from bestiary.shared.core.errors import BadDataError
from bestiary.shared.data.assets import asset_path

DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
"""Numbers of CTranslate2's number formats; bfloat16 (5) is not read."""

PARTS = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
SUFFIXES = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def whisper_tiny(
    pool: int = 1, fill: bool = True, max_seconds: float = 1200.0, frozen: bool = True
) -> WhisperEncoder | FrozenEncoder:
    """The encoder of Whisper tiny.en, pretrained: 80 mel bins, width 384, 4 layers, 8.2 M parameters.

    Args:
        pool: how many tokens in a row are averaged into one before the last norm; Whisper averages none (1).
        fill: fill windows up to 30 s with silence, as Whisper was trained; without, short clips are cheaper and their
            features somewhat different.
        max_seconds: longest clip.
        frozen: never train it, and keep what it says of a clip with the clip's features.

    Raises:
        MissingDataError: if the asset was not fetched; the message says how.
    """
    front_end = LogMel(n_mels=80, max_seconds=max_seconds, fill=fill)
    encoder = WhisperEncoder(front_end, width=384, layers=4, heads=6, ffn=1536, pool=pool)
    if not torch.empty(0).is_meta:
        encoder.load_state_dict(read_encoder(asset_path("whisper_tiny") / "model.bin"))
    return FrozenEncoder(encoder) if frozen else encoder


def read_encoder(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a WhisperEncoder from a Whisper model in CTranslate2's format (version 6, float).

    Args:
        path: model.bin.

    Raises:
        BadDataError: if the file is of another kind, or quantised.
    """
    state: dict[str, torch.Tensor] = {}
    for name, values in variables(path):
        if not name.startswith("encoder/") or name == "encoder/num_heads":
            continue
        if values.dtype.kind != "f":
            raise BadDataError(f"{path}: {name} is stored as {values.dtype}; only float16 and float32 are read")
        tensor = torch.from_numpy(values.astype(np.float32))
        rest = name.removeprefix("encoder/")
        if rest == "position_encodings/encodings":
            state["embed_positions.weight"] = tensor
            continue
        layer, _, inner = rest.partition("/") if rest.startswith("layer_") and "/" in rest else ("", "", rest)
        part, _, suffix = inner.rpartition("/")
        if not layer.removeprefix("layer_").isdigit():  # conv1, conv2, and the last norm
            state[f"{rest.rpartition('/')[0]}.{SUFFIXES[suffix]}"] = tensor
            continue
        prefix = f"layers.{layer.removeprefix('layer_')}"
        if part == "self_attention/linear_0":  # queries, keys and values in one
            for projection, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                if (projection, suffix) != ("k_proj", "bias"):
                    state[f"{prefix}.self_attn.{projection}.{suffix}"] = piece.contiguous()
        else:
            state[f"{prefix}.{PARTS[part]}.{SUFFIXES[suffix]}"] = tensor
    return state


def variables(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of all variables of a CTranslate2 model.bin.

    Raises:
        BadDataError: if it is none, of another version, or cut short.
    """
    with open(path, "rb") as file:
        try:
            version, kind, _ = _number(file, "I"), _text(file), _number(file, "I")
            if version != 6 or kind != "WhisperSpec":
                raise BadDataError(f"{path} is CTranslate2 version {version}, {kind!r}; version 6 of Whisper is read")
            for _ in range(_number(file, "I")):
                name = _text(file)
                shape = [_number(file, "I") for _ in range(_number(file, "B"))]
                number, size = _number(file, "B"), _number(file, "I")
                data = file.read(size)
                if number not in DTYPES or len(data) != size:
                    raise BadDataError(
                        f"{path}: {name} cannot be read (number format {number}, {len(data)} of {size} B)"
                    )
                yield name, np.frombuffer(data, DTYPES[number]).reshape(shape)
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise BadDataError(f"{path} is no model of CTranslate2, or cut short: {error}") from error


def _number(file: BinaryIO, kind: str) -> Any:
    size = struct.calcsize(f"<{kind}")
    return struct.unpack(f"<{kind}", file.read(size))[0]


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "H"))[:-1].decode()  # without the closing zero
