#!/usr/bin/env python
"""Music Flamingo's front end and inference on the CPU, beside transformers' class on the same weights and clips.

    python tools/bench_audio.py                 # some minutes; writes docs/benchmarks/

Both have the encoder's shape of Whisper base (128 mel bins, width 512, 6 layers) and a Qwen2 of the size of
SmolLM2-135M, with weights at random, and draw 24 tokens greedily. Batches: eight clips of 30 s, eight of different
length (2 to 30 s), and eight short ones (2 to 8 s). Times are of the whole way, from samples to token ids, and of its
parts; nothing is timed whose result differs. transformers' encoder takes windows of 30 s whatever their content; ours
takes what is there, which is why short clips gain most.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import numpy as np
import torch

from bestiary.projects.music_flamingo.model import MusicFlamingo
from bestiary.shared.audio.mel import TAIL, LogMel
from bestiary.shared.audio.whisper_encoder import WhisperEncoder
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.core.runs import environment
from bestiary.shared.hub.music_flamingo import config_of, disk_name
from bestiary.shared.language.hf_causal_lm import HFCausalLM
from bestiary.shared.testing import bench

RATE, TOKENS = 16000, 24
BATCHES = {
    "8 clips of 30 s": [30.0] * 8,
    "8 clips of 2 to 30 s": [2.0, 5.0, 8.0, 11.0, 15.0, 19.0, 24.0, 30.0],
    "8 clips of 2 to 8 s": [2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}


def clips(seconds: list[float]) -> list[np.ndarray]:
    """Noise of these lengths, its colour and loudness different."""
    rng = np.random.default_rng(0)
    return [
        (np.convolve(rng.standard_normal(int(s * RATE)), np.ones(1 + i), "same") * 0.03 * (1 + i)).astype(np.float32)
        for i, s in enumerate(seconds)
    ]


def models() -> tuple[MusicFlamingo, Any]:
    """Ours, and transformers' with the same weights."""
    import transformers

    torch.manual_seed(0)
    encoder = WhisperEncoder(LogMel(), width=512, layers=6, heads=8, ffn=2048)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    sizes |= {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": False}
    ours = MusicFlamingo(HFCausalLM("qwen2", sizes, "byte"), encoder, {}).eval()
    config = transformers.MusicFlamingoConfig(**config_of(ours))
    theirs = transformers.MusicFlamingoForConditionalGeneration(config).eval()
    state = {disk_name(name): tensor for name, tensor in ours.state_dict().items()}
    renamed = {
        name.replace("language_model.lm_head", "lm_head")
        .replace("language_model.model", "model.language_model")
        .replace("audio_tower", "model.audio_tower")
        .replace("multi_modal_projector", "model.multi_modal_projector"): tensor
        for name, tensor in state.items()
    }
    theirs.load_state_dict(renamed)
    return ours, theirs


class Sides:
    """One batch, the way of each side from samples to token ids."""

    def __init__(self, ours: MusicFlamingo, theirs: Any, samples: list[np.ndarray]):
        import transformers

        self.ours, self.theirs, self.samples = ours, theirs, samples
        self.extractor = transformers.WhisperFeatureExtractor(feature_size=128)
        self.examples: list[Any] = [
            {
                "id": str(i),
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "audio", "value": clip, "rate": RATE},
                            {"type": "text", "value": "Which instrument plays, and in which key?"},
                        ],
                    }
                ],
            }
            for i, clip in enumerate(samples)
        ]
        self.batch: Any = ours.processor()(self.examples, "prompt")
        self.made = self.extract()

    def extract(self) -> Any:
        """Transformers' features."""
        return self.extractor(self.samples, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)

    def our_features(self) -> list[torch.Tensor]:
        """Ours, a clip each, as far as the clip goes."""
        return [self.ours.encoder.front_end(clip).features[0] for clip in self.samples]

    def their_features(self) -> list[torch.Tensor]:
        """Theirs, of which only what ours has is compared: the rest of the 30 s is silence."""
        made, widths = self.extract()["input_features"], self.batch["media"]["audio"]["lengths"]
        return [row[:, : min(int(width) + TAIL, row.shape[1])] for row, width in zip(made, widths, strict=True)]

    def our_tokens(self) -> torch.Tensor:
        """Token ids of our model."""
        batch = self.ours.processor()(self.examples, "prompt")
        return self.ours.generate(batch, 1, Sampling(TOKENS)).completion_ids

    @torch.no_grad()
    def their_tokens(self) -> torch.Tensor:
        """Token ids of transformers' model; its prompts are tokenised by ours, which is not in the race."""
        made = self.extract()
        out = self.theirs.generate(
            input_ids=self.batch["input_ids"],
            attention_mask=self.batch["attention_mask"],
            input_features=made["input_features"],
            input_features_mask=made["attention_mask"],
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=self.ours.backbone.tokenizer.pad_id,
        )
        return out[:, self.batch["input_ids"].shape[1] :]

    @torch.no_grad()
    def their_encoder(self) -> torch.Tensor:
        """Transformers' projected audio tokens."""
        values = {"input_features": self.made["input_features"], "input_features_mask": self.made["attention_mask"]}
        return self.theirs.get_audio_features(**values, input_ids=self.batch["input_ids"]).pooler_output

    @torch.no_grad()
    def our_encoder(self) -> torch.Tensor:
        """Our projected audio tokens."""
        return self.ours.encode_audio(self.batch["media"]["audio"])


def main() -> int:
    """Measure, print, and write docs/benchmarks/audio_DATE.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ours, theirs = models()
    rows: list[dict[str, Any]] = []
    for name, seconds in BATCHES.items():
        sides = Sides(ours, theirs, clips(seconds))
        features = {"bestiary": sides.our_features, "transformers": sides.their_features}
        rows += bench.race(f"features, {name}", features, sides.their_features(), args.rounds)
        truth = [sides.their_encoder()]
        encoders = {"bestiary": lambda s=sides: [s.our_encoder()], "transformers": lambda s=sides: [s.their_encoder()]}
        rows += bench.race(f"encoder and projector, {name}", encoders, truth, args.rounds)
        tokens = [sides.their_tokens().double()]
        whole = {
            "bestiary": lambda s=sides: [s.our_tokens().double()],
            "transformers": lambda s=sides: [s.their_tokens().double()],
        }
        rows += bench.race(f"samples to {TOKENS} tokens, {name}", whole, tokens, args.rounds)
    result = {**environment(), "processor": bench.processor(), "rows": rows}
    bench.save(result, args.out, "audio")
    return 0


if __name__ == "__main__":
    sys.exit(main())
