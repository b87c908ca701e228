#!/usr/bin/env python
"""What Whisper tiny.en itself understands of sentences over music: a ceiling of models that hear through its encoder.

    python tools/bench_lyrics.py                # half a minute; writes docs/benchmarks/

The sentences, the music under them and the levels are those on which +experiment=music_flamingo/pretrained_pair is
scored. Whisper's own decoder (CTranslate2, greedy) writes them down.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import numpy as np

from bestiary.shared.core.errors import require
from bestiary.shared.core.runs import environment
from bestiary.shared.data.assets import asset_path
from bestiary.shared.data.music.score_qa import ScoreQA
from bestiary.shared.data.recordings import LibriVox
from bestiary.shared.metrics.wer import error_rate
from bestiary.shared.testing import bench

LEVELS = (20.0, 10.0, 0.0, -10.0)


class Whisper:
    """tiny.en as CTranslate2 runs it."""

    def __init__(self) -> None:
        import tokenizers
        import transformers

        folder = asset_path("whisper_tiny")
        library: Any = require("ctranslate2", "dev")
        self.model = library.models.Whisper(str(folder), device="cpu", compute_type="float32", intra_threads=1)
        self.view = library.StorageView.from_array
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.extractor = transformers.WhisperFeatureExtractor(feature_size=80)

    def transcribe(self, samples: np.ndarray) -> str:
        """The words of at most 30 s at 16 kHz."""
        mel = self.extractor(samples, sampling_rate=16000, return_tensors="np")["input_features"]
        prompt = ["<|startoftranscript|>", "<|notimestamps|>"]
        (result,) = self.model.generate(self.view(mel), [prompt], beam_size=1)
        return self.tokenizer.decode(result.sequences_ids[0], skip_special_tokens=True).strip()


def main() -> int:
    """Transcribe, print the error rates, and write docs/benchmarks/lyrics_DATE.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    args = parser.parse_args()
    whisper = Whisper()
    music = ScoreQA(held_out_clips=60, kinds={"questions": 1.0, "choice": 1.0})
    rows: list[dict[str, Any]] = []
    for level in (None, *LEVELS):
        source = LibriVox() if level is None else LibriVox(accompaniment=music, snr_db=level)
        examples = list(source.held_out("test"))
        said = [whisper.transcribe(example["messages"][0]["content"][0]["value"]) for example in examples]
        words = [example["answer"] or "" for example in examples]
        rows.append({"snr_db": level, "data": source.revision, **error_rate(words, said), "answers": said})
        print(f"{'no music' if level is None else f'{level:g} dB':>10s}  WER {rows[-1]['rate']:.3f}")
    bench.save(
        {**environment(), "processor": bench.processor(), "model": "whisper_tiny (tiny.en)", "rows": rows},
        args.out,
        "lyrics",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
