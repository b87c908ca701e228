"""Music Flamingo: audio tokens, turned by their time, in the prompt of a language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bestiary.shared.audio.channel_norm import ChannelNorm
from bestiary.shared.audio.rotary_time import RotaryTime
from bestiary.shared.audio.whisper_encoder import WhisperEncoder
from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Batch, LMBatch, Media
from bestiary.shared.core.protocols import LanguageBackbone, Sampling
from bestiary.shared.core.streams import Stream
from bestiary.shared.language.causal_lm import CausalLM
from bestiary.shared.language.generate import Generation
from bestiary.shared.language.media_processor import FeatureCache, MediaProcessor, Modality, scatter_media

NORM_CLIPS, NORM_SECONDS = 128, 600.0
"""What channels are standardised by: this many clips of the training data, or as many as are this long together."""

SOUND, BEGIN, END = "<sound>", "<|sound_bos|>", "<|sound_eos|>"


class MusicFlamingo(CausalLM):
    """An audio encoder, rotary time, a projector, and any language backbone, which reads its tokens among the words.

    Several clips in a prompt, of any length up to the front end's, stand where their content stands in the messages.

    Paper: arXiv:2511.10289 (Music Flamingo); without rotary time and boundaries arXiv:2507.08128 (Audio Flamingo 3).

    Args:
        backbone: the language model.
        encoder: of audio: windows to tokens.
        rotary_time: arguments of :class:`~bestiary.shared.audio.rotary_time.RotaryTime` (theta, share, positions), or
            None for no rotary time.
        boundaries: put a token before and after each clip.
        projector_bias: of both layers of the projector.
        standardise: take from the encoder's channels their mean over training clips, and divide by their deviation;
            for a frozen encoder that the backbone has never met. The papers do not.
        path: a folder with a released checkpoint of transformers' class MusicFlamingo or AudioFlamingo3: its weights
            are read into all parts. Give the backbone its tokenizer with ``backbone.tokenizer=FOLDER``.
        cache_mb: megabytes of features kept by the keys of clips, so that clips seen again are not analysed again.
        max_new_tokens: the default length of an answer.

    Raises:
        ConfigError: for an encoder without tokens, or a checkpoint of another shape.
    """

    def __init__(
        self,
        backbone: LanguageBackbone,
        encoder: WhisperEncoder,
        rotary_time: dict[str, Any] | None = None,
        boundaries: bool = True,
        projector_bias: bool = True,
        standardise: bool = False,
        path: str | None = None,
        cache_mb: float = 0.0,
        max_new_tokens: int = 64,
    ):
        super().__init__(backbone, max_new_tokens)
        if not hasattr(encoder, "token_counts"):
            raise ConfigError("Music Flamingo needs an encoder of audio: encoder=af_whisper_tiny, for example")
        self.encoder: Any = encoder
        self.rotary_time = None
        if rotary_time is not None:
            steps = {"step_seconds": encoder.step_seconds, "tokens_per_window": encoder.tokens_per_window}
            self.rotary_time = RotaryTime(encoder.out_dim, **{**rotary_time, **steps})
        self.channel_norm = ChannelNorm(encoder.out_dim) if standardise else None
        self.projector = Projector(encoder.out_dim, backbone.hidden_size, projector_bias)
        self.boundaries = boundaries
        names = [BEGIN, END] if boundaries else []
        self.sound_id = backbone.tokenizer.name_media("audio", SOUND)
        self.sound_id, *self.boundary_ids = backbone.add_tokens([SOUND, *names])
        self._features = FeatureCache(int(cache_mb * 1e6))
        if path is not None and not torch.empty(0).is_meta:
            from bestiary.shared.hub.music_flamingo import load_weights

            load_weights(self, path)

    @torch.no_grad()
    def adapt_to(self, source: Any) -> None:
        """Where channels are standardised: find their mean and deviation on some training clips.

        A model that has them from a run before keeps them, for its projector knows them.
        """
        if self.channel_norm is not None:
            self.channel_norm.fit(self._some_clips(source))

    def _some_clips(self, source: Any) -> Iterator[torch.Tensor]:
        """Tokens (n, D) of the first training clips, as many as the cost of it allows."""
        process, seconds = self.processor(), 0.0
        for k in range(NORM_CLIPS):
            batch: Any = process([source.train_example(k, Stream(0, "channels"))], "prompt")
            if media := batch["media"].get("audio"):
                tokens, counts = self.encoder(media["features"], media["lengths"])
                seconds += float(counts.sum()) * self.encoder.step_seconds
                yield tokens
            if seconds > NORM_SECONDS:
                return

    def processor(self, max_len: int | None = None) -> MediaProcessor:
        """Examples to batches, with this backbone's tokenizer and this encoder's front end."""
        before, after = self.boundary_ids if self.boundaries else (None, None)
        audio = Modality(self.encoder.preprocess, self.sound_id, before, after, self._features)
        return MediaProcessor(self.backbone.tokenizer, max_len, {"audio": audio})

    def encode_audio(self, media: Media) -> torch.Tensor:
        """Windows of clips to projected tokens.

        Args:
            media: ``features`` (W, M, T), ``lengths`` and ``window`` (W,).

        Returns:
            (N, hidden_size of the backbone), window by window.
        """
        values: Any = media
        tokens, counts = self.encoder(values["features"], values["lengths"])
        if self.channel_norm is not None:
            tokens = self.channel_norm(tokens)
        if self.rotary_time is not None:
            window = values["window"].repeat_interleave(counts)
            place = torch.arange(len(tokens), device=tokens.device)
            place = place - (counts.cumsum(0) - counts).repeat_interleave(counts)
            tokens = self.rotary_time(tokens, window, place)
        return self.projector(tokens)

    def embed(self, batch: Batch) -> torch.Tensor:
        """The embedded batch (B, T, D), with the tokens of its clips in their places."""
        lm: LMBatch = batch  # type: ignore[assignment]
        embeds = self.backbone.embed(lm["input_ids"])
        if "audio" not in lm["media"]:
            return embeds
        return scatter_media(embeds, lm["input_ids"], self.sound_id, self.encode_audio(lm["media"]["audio"]))

    def generation(self, batch: Batch, n: int = 1, sampling: Sampling | None = None, **options: Any) -> Generation:
        """Generation whose prompts are encoded once, however many completions they get."""
        with torch.no_grad():
            embeds = self.embed(batch)
        return super().generation(batch, n, sampling, inputs_embeds=embeds, **options)

    def wrap_policy(self) -> set[type[nn.Module]]:
        """The backbone's layers and the encoder's."""
        return super().wrap_policy() | {type(layer) for layer in self.encoder.layers}

    def predict(
        self,
        inputs: Sequence[Path | str],
        out_dir: Path,
        question: str | None = None,
        facts: bool = False,
        max_new_tokens: int | None = None,
    ) -> list[Path]:
        """Answer questions about audio files; see :func:`bestiary.projects.music_flamingo.predict.predict`."""
        from bestiary.projects.music_flamingo.predict import predict

        return predict(self, inputs, out_dir, question, facts, max_new_tokens)


class Projector(nn.Module):
    """Two linear layers with a GELU between: the encoder's width to the backbone's."""

    def __init__(self, width: int, hidden: int, bias: bool = True):
        super().__init__()
        self.linear_1 = nn.Linear(width, hidden, bias)
        self.linear_2 = nn.Linear(hidden, hidden, bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, width) to (N, hidden)."""
        return self.linear_2(F.gelu(self.linear_1(tokens.to(self.linear_1.weight.dtype))))
