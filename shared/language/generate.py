"""Generation on any language backbone: sampling, stop strings, streaming, a budget for thoughts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.examples import Batch, LMBatch
from bestiary.shared.core.protocols import Rollout, Sampling
from bestiary.shared.core.streams import uniform_keys, uniforms
from bestiary.shared.language.prefill import prefill, select_rows
from bestiary.shared.language.text_stream import StopFilter, TextStream, overlap


@dataclass(frozen=True)
class ThinkBudget:
    """How long a model may think.

    Once ``tokens`` tokens of thought are spent, the thought is cut after the next token with a newline, at the latest
    ``slack`` tokens on; then ``close`` is put in the model's mouth, and it goes on to answer. What was put there is not
    the policy's own: its mask is false and its log-probability 0.

    Paper: arXiv:2508.14444 (Nemotron Nano 2), budget control at inference.

    Attributes:
        open: the tag that begins a thought, in the prompt's last line or in the model's own words.
        close: what ends one.
        tokens: the budget, over all thoughts of a completion.
        slack: how many more there may be while waiting for a newline.
    """

    open: str = "<think>"
    close: str = "</think>"
    tokens: int = 1024
    slack: int = 500


def generate(backbone: Any, batch: Batch, n: int = 1, sampling: Sampling | None = None, **options: Any) -> Rollout:
    """Complete left-padded prompts, n times each; the arguments are those of :class:`Generation`."""
    return Generation(backbone, batch, n, sampling, **options).rollout()


def sampling_logprobs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities of the distribution that is sampled from, cut and renormalised as :class:`Sampling` says.

    Rollouts and trainers share it, so the log-probabilities of a completion can be computed again.

    Args:
        logits: (..., V).
        sampling: temperature 0 leaves the distribution as it is (greedy picks its mode), whatever the cuts say.

    Returns:
        (..., V) float32, minus infinity where a token cannot be drawn.
    """
    scores = logits.float() / (sampling.temperature or 1.0)
    if sampling.temperature == 0:
        return torch.log_softmax(scores, -1)
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, -1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = scores.sort(-1, descending=True)
        p = torch.softmax(ordered, -1)
        before = p.cumsum(-1) - p
        # The likeliest token has nothing before it, and stays even where top_p is tiny.
        cut = (before >= sampling.top_p).scatter(-1, index, before >= sampling.top_p)
        scores = scores.masked_fill(cut, -torch.inf)
    if sampling.min_p > 0:
        p = torch.softmax(scores, -1)
        scores = scores.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), -torch.inf)
    return torch.log_softmax(scores, -1)


def check_sampling(sampling: Sampling) -> Sampling:
    """The sampling itself, or what is wrong with it.

    Raises:
        ConfigError: for a value that no distribution follows from.
    """
    for name, fits, wanted in (
        ("max_new_tokens", sampling.max_new_tokens >= 1, "1 or more"),
        ("temperature", sampling.temperature == 0 or sampling.temperature >= 1e-4, "0 (greedy), or 0.0001 or more"),
        ("top_k", sampling.top_k >= 0, "0 (all) or more"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0, at most 1"),
        ("min_p", 0 <= sampling.min_p <= 1, "between 0 and 1"),
    ):
        if not fits:
            raise ConfigError(f"{name} must be {wanted}, not {getattr(sampling, name)!r}")
    return sampling


class Generation:
    """One run of generation: iterate over :meth:`stream` for the text as it comes, or ask for the :meth:`rollout`.

    The noise of a token is a function of (seed, prompt id, sample, token), so it does not matter with which other
    prompts, or in which process, a prompt is completed. A prompt is run once, however many samples it gets, and a row
    that has ended leaves the batch.

    Args:
        backbone: a LanguageBackbone. A cache without ``select`` must be nested lists of tensors whose first dimension
            is the row.
        batch: left-padded prompts (mode ``prompt``).
        n: completions per prompt; rows are prompt-major.
        sampling: greedy when None.
        inputs_embeds: (B, T, D) in place of the embedded ``input_ids``, for prompts with images or audio in them.
        think: the budget of thoughts, or None.
        prefill_chunk: run the prompts this many tokens at a time; less memory, same result.
        entropy: keep the entropy of each distribution that was drawn from.

    Attributes:
        first_token_at: ``time.perf_counter()`` when the prompts were read and the first token was drawn, or None.

    Raises:
        ConfigError: for sampling that makes no sense.
    """

    def __init__(
        self,
        backbone: Any,
        batch: Batch,
        n: int = 1,
        sampling: Sampling | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        think: ThinkBudget | None = None,
        prefill_chunk: int | None = None,
        entropy: bool = False,
    ):
        self.backbone, self.n = backbone, n
        self.batch: LMBatch = batch  # type: ignore[assignment]
        self.sampling = check_sampling(sampling or Sampling())
        if not self.batch["ids"]:
            raise ConfigError("there is no prompt to complete")
        if prefill_chunk is not None and prefill_chunk < 1:
            raise ConfigError(f"prefill_chunk must be 1 or more, not {prefill_chunk}")
        self._embeds, self._chunk, self._entropy = inputs_embeds, prefill_chunk, entropy
        tokenizer = backbone.tokenizer
        self._ends = {tokenizer.eos_id, *tokenizer.stop_ids}
        self._rows = []
        for at, name in enumerate(self.batch["ids"]):
            prompt = self.batch["input_ids"][at][self.batch["attention_mask"][at].bool()].tolist() if think else []
            for sample in range(n):
                thought = Thought(think, tokenizer, prompt) if think else None
                self._rows.append(_Row(len(self._rows), name, sample, thought))
        self._keys: np.ndarray | None = None
        self._stream: Iterator[tuple[int, str]] | None = None
        self.first_token_at: float | None = None

    def rollout(self) -> Rollout:
        """Run to the end what has not run yet; after a stream that was left early, what there is so far."""
        if self._stream is None:
            for _ in self._run(bool(self.sampling.stop)):
                pass
        tokenizer = self.backbone.tokenizer
        device, width = self.batch["input_ids"].device, max(len(row.ids) for row in self._rows)

        def padded(values: list[list[Any]], fill: Any) -> torch.Tensor:
            return torch.tensor([v + [fill] * (width - len(v)) for v in values], device=device)

        return Rollout(
            padded([row.ids for row in self._rows], tokenizer.pad_id).reshape(len(self._rows), width).long(),
            padded([row.own for row in self._rows], False).reshape(len(self._rows), width).bool(),
            padded([row.scores for row in self._rows], 0.0).reshape(len(self._rows), width).float(),
            [tokenizer.decode(row.ids) for row in self._rows],
            ["stop" if row.ended else "length" for row in self._rows],
            padded([row.entropies for row in self._rows], 0.0).reshape(len(self._rows), width).float()
            if self._entropy
            else None,
            torch.tensor([len(row.ids) for row in self._rows], device=device),
        )

    def stream(self) -> Iterator[tuple[int, str]]:
        """(row, new text) as it comes: whole characters, without stop strings. Once; :meth:`rollout` is free after."""
        if self._stream is None:
            self._stream = self._run(True)
        return self._stream

    @torch.no_grad()
    def _run(self, read: bool) -> Iterator[tuple[int, str]]:
        """Generate; ``read`` says whether the text is looked at while it comes."""
        alive = self._rows
        for row in alive:
            row.read(self.backbone.tokenizer, self.sampling.stop, read or row.thought is not None)
        logits, cache, mask, position = self._prefill()
        for step in range(self.sampling.max_new_tokens):
            logprobs = sampling_logprobs(logits[:, -1], self.sampling)
            chosen = self._draw(logprobs, alive, step)
            scores = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
            if self._entropy:
                for row, value in zip(alive, self._entropies(logits[:, -1], logprobs).tolist(), strict=True):
                    row.entropies.append(value)
            self.first_token_at = self.first_token_at or time.perf_counter()
            for row, token, score in zip(alive, chosen.tolist(), scores, strict=True):
                if piece := row.push(token, score, self._ends):
                    yield row.index, piece
            kept = [at for at, row in enumerate(alive) if not row.ended]
            if not kept or step + 1 == self.sampling.max_new_tokens:
                break
            if len(kept) < len(alive):
                alive = [alive[at] for at in kept]
                index = torch.tensor(kept, device=mask.device)
                cache, mask, position = select_rows(cache, index), mask[index], position[index]
            tokens = torch.tensor([[row.ids[-1]] for row in alive], device=mask.device)
            mask, position = torch.cat([mask, torch.ones_like(mask[:, :1])], 1), position + 1
            logits, _, cache = self.backbone(self.backbone.embed(tokens), mask, position, None, cache, 1)
        for row in alive:
            if not row.ended and (piece := row.flush()):
                yield row.index, piece

    def _entropies(self, logits: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        """Of the uncut distribution, (rows,)."""
        sampling = self.sampling
        if sampling.temperature and (sampling.top_k or sampling.top_p < 1 or sampling.min_p):
            logprobs = torch.log_softmax(logits.float() / sampling.temperature, -1)
        return -(logprobs.exp() * logprobs).sum(-1)

    def _prefill(self) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
        """Run the prompts, then repeat their rows: logits (B*n, 1, V), cache, mask (B*n, T), last position (B*n, 1)."""
        mask, position = self.batch["attention_mask"], self.batch["position_ids"]
        embeds = self.backbone.embed(self.batch["input_ids"]) if self._embeds is None else self._embeds
        logits, cache = prefill(self.backbone, embeds, mask, position, self._chunk)
        if self.n > 1:
            rows = torch.arange(len(mask), device=mask.device).repeat_interleave(self.n)
            logits, cache, mask, position = logits[rows], select_rows(cache, rows), mask[rows], position[rows]
        return logits, cache, mask, position[:, -1:]

    def _draw(self, logprobs: torch.Tensor, rows: Sequence[_Row], step: int) -> torch.Tensor:
        if self.sampling.temperature == 0:
            return logprobs.argmax(-1)
        if self._keys is None:
            names, samples = [row.name for row in self._rows], [row.sample for row in self._rows]
            self._keys = uniform_keys(self.sampling.seed, names, samples)
        drawn = uniforms(self._keys[[row.index for row in rows]], step)
        # The first token at which the cumulative probability exceeds the draw: one number a row, whatever V is.
        below = logprobs.double().exp().cumsum(-1)
        wanted = torch.from_numpy(drawn).to(below.device)[:, None] * below[:, -1:]
        return torch.searchsorted(below, wanted, right=True)[:, 0]


@dataclass
class _Row:
    """One completion as it grows."""

    index: int
    name: str
    sample: int
    thought: Thought | None
    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    ended: bool = False
    text: TextStream | None = None
    stop: StopFilter = field(default_factory=StopFilter)

    def read(self, tokenizer: Any, stop: Sequence[str], wanted: bool) -> None:
        """Prepare to look at the text."""
        self.text, self.stop = TextStream(tokenizer) if wanted else None, StopFilter(stop)

    def push(self, token: int, score: float, ends: set[int]) -> str:
        """Take the drawn token, or the one that the thought's budget puts in its place; returns text to show."""
        forced = self.thought.forced() if self.thought else None
        self.ids.append(token if forced is None else forced)
        self.own.append(forced is None)
        self.scores.append(score if forced is None else 0.0)
        if forced is None and token in ends:
            self.ended = True
            return self.flush()
        if self.text is None:
            return ""
        piece = self.text.push(self.ids[-1])
        if self.thought:
            self.thought.push(self.ids[-1], piece)
        shown = self.stop.push(piece)
        self.ended = self.stop.found
        return shown

    def flush(self) -> str:
        """The text that was held back, when no more tokens come."""
        if self.text is None:
            return ""
        return self.stop.push(self.text.flush()) + self.stop.flush()


class Thought:
    """Counts one row's tokens of thought, and says what to put in its mouth when they are spent.

    Args:
        budget: the budget.
        tokenizer: encodes the closing tag; one that knows a tag as a single token says so by ``token_id(tag)``.
        prompt: the row's prompt, whose end may be the opening tag.
    """

    def __init__(self, budget: ThinkBudget, tokenizer: Any, prompt: Sequence[int]):
        # A tag may be one token or be spelled in several, and the model may spell it in others than the tokenizer
        # would: it is looked for as a token and in the text.
        if budget.tokens < 0 or budget.slack < 0 or not budget.open.strip() or not budget.close.strip():
            raise ConfigError(f"a budget of thoughts needs tags, tokens and slack of 0 or more, not {budget}")
        self._budget = budget
        known = getattr(tokenizer, "token_id", lambda name: None)
        self._open, self._close = budget.open.strip(), budget.close.strip()
        self._open_id, self._close_id = known(self._open), known(self._close)
        close = known(budget.close)
        self._closing = tokenizer.encode(budget.close) if close is None else [close]
        self._inside = self._opened(tokenizer, list(prompt))
        self._spent, self._tail = 0, ""
        self._newline = True  # a budget of 0 may be cut before anything was thought
        self._queue: list[int] = []

    def _opened(self, tokenizer: Any, prompt: list[int]) -> bool:
        last = prompt[-8:]
        if self._open_id is not None and self._open_id in last:
            after = last[len(last) - last[::-1].index(self._open_id) :]
            return self._close_id not in after and not tokenizer.decode(after).strip()
        return tokenizer.decode(prompt[-64:]).rstrip().endswith(self._open)

    def forced(self) -> int | None:
        """The token to put in place of the one that was drawn, or None."""
        over = self._spent - self._budget.tokens
        # A thought that is ending of itself is let do so.
        patience = self._budget.slack + (len(self._close) if overlap(self._tail, self._close) else 0)
        if self._inside and over >= 0 and (self._newline or over >= patience):
            self._inside, self._queue, self._tail = False, list(self._closing), ""
        return self._queue.pop(0) if self._queue else None

    def push(self, token: int, piece: str) -> None:
        """Take note of a token and the text it made certain."""
        self._tail = (self._tail + piece)[-(len(self._open) + len(self._close) + len(piece)) :]
        if self._inside:
            self._spent += 1
            self._newline = "\n" in piece
            if token == self._close_id or self._close in self._tail:
                self._inside, self._tail = False, ""
        elif token == self._open_id or self._open in self._tail:
            self._inside, self._tail, self._newline = True, "", False
