"""CausalLM: a language backbone as a Model of the contract."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bestiary.shared.core.errors import BadDataError
from bestiary.shared.core.examples import Batch, Example, LMBatch, text_message
from bestiary.shared.core.protocols import LanguageBackbone, Output, Rollout, Sampling
from bestiary.shared.core.streams import derive_seed
from bestiary.shared.language.processor import TextProcessor


class CausalLM(nn.Module):
    """Text in, text out.

    Args:
        backbone: the language model.
        max_new_tokens: the default length of an answer.
    """

    tasks = ("text", "chat")

    def __init__(self, backbone: LanguageBackbone, max_new_tokens: int = 64):
        super().__init__()
        self.backbone: Any = backbone
        self.max_new_tokens = max_new_tokens

    def processor(self, max_len: int | None = None) -> TextProcessor:
        """Examples to batches, with this backbone's tokenizer."""
        return TextProcessor(self.backbone.tokenizer, max_len)

    def forward(self, batch: Batch) -> Output:
        """Logits (B, T, V) of a batch."""
        lm: LMBatch = batch  # type: ignore[assignment]
        logits, hidden, _ = self.backbone(
            self.backbone.embed(lm["input_ids"]), lm["attention_mask"], lm["position_ids"], lm["seq_idx"]
        )
        return Output(logits, hidden=hidden)

    def wrap_policy(self) -> set[type[nn.Module]]:
        """The backbone's layers."""
        return self.backbone.layer_classes()

    @torch.no_grad()
    def generate(self, batch: Batch, n: int = 1, sampling: Sampling | None = None) -> Rollout:
        """Complete left-padded prompts, n times each.

        The noise of a token is a function of (seed, prompt id, sample, token), so it does not matter with which other
        prompts, or in which process, a prompt is completed.

        Args:
            batch: prompts (mode ``prompt``).
            n: completions per prompt.
            sampling: greedy when None.
        """
        sampling = sampling or Sampling(self.max_new_tokens)
        lm: LMBatch = batch  # type: ignore[assignment]
        names = [(name, sample) for name in lm["ids"] for sample in range(n)]
        mask = lm["attention_mask"].repeat_interleave(n, 0)
        position = lm["position_ids"].repeat_interleave(n, 0)
        tokens = lm["input_ids"].repeat_interleave(n, 0)
        cache = self.backbone.new_cache(len(names))
        eos = self.backbone.tokenizer.eos_id
        done = torch.zeros(len(names), dtype=torch.bool, device=tokens.device)
        ids, keep, scores = [], [], []
        for step in range(sampling.max_new_tokens):
            logits, _, cache = self.backbone(self.backbone.embed(tokens), mask, position, None, cache, 1)
            logprobs = truncated_logprobs(logits[:, -1].float(), sampling)
            chosen = self._draw(logprobs, names, step, sampling)
            keep.append(~done)
            ids.append(torch.where(done, self.backbone.tokenizer.pad_id, chosen))
            scores.append(torch.where(done, 0.0, logprobs.gather(1, chosen[:, None])[:, 0]))
            done = done | (chosen == eos) | self._stopped(ids, sampling, done)
            if done.all():
                break
            tokens, position = ids[-1][:, None], position[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        completion, kept = torch.stack(ids, 1), torch.stack(keep, 1)
        texts = [self.backbone.tokenizer.decode(row[k].tolist()) for row, k in zip(completion, kept, strict=True)]
        reasons = ["stop" if d else "length" for d in done.tolist()]
        return Rollout(completion, kept, torch.stack(scores, 1), texts, reasons)

    def _stopped(self, ids: list[torch.Tensor], sampling: Sampling, done: torch.Tensor) -> torch.Tensor:
        if not sampling.stop:
            return torch.zeros_like(done)
        rows = torch.stack(ids, 1).tolist()
        texts = [self.backbone.tokenizer.decode(row) for row in rows]
        return torch.tensor([any(s in t for s in sampling.stop) for t in texts], device=done.device)

    def _draw(
        self, logprobs: torch.Tensor, names: list[tuple[str, int]], step: int, sampling: Sampling
    ) -> torch.Tensor:
        if sampling.temperature == 0:
            return logprobs.argmax(-1)
        noise = np.stack(
            [
                np.random.default_rng(derive_seed(sampling.seed, name, sample, step)).gumbel(size=logprobs.shape[1])
                for name, sample in names
            ]
        )
        return (logprobs + torch.from_numpy(noise).to(logprobs)).argmax(-1)

    def predict(self, inputs: Sequence[Path | str], out_dir: Path) -> list[Path]:
        """Answer the prompts of .txt files (one a line) or .jsonl files ({"prompt": …}), into answers.jsonl.

        Raises:
            BadDataError: for a file that is not there, empty, or not of these kinds.
        """
        prompts = [prompt for path in inputs for prompt in read_prompts(Path(path))]
        file = out_dir / "answers.jsonl"
        out_dir.mkdir(parents=True, exist_ok=True)
        processor = self.processor()
        with open(file, "w") as handle:
            for start in range(0, len(prompts), 16):
                chunk = prompts[start : start + 16]
                examples: list[Example] = [
                    {"id": str(start + i), "messages": [text_message("user", text)]} for i, text in enumerate(chunk)
                ]
                device = next(self.parameters()).device
                batch = move(processor(examples, "prompt"), device)
                for prompt, text in zip(chunk, self.generate(batch).texts, strict=True):
                    handle.write(json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False) + "\n")
        return [file]


def truncated_logprobs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities of the distribution that is sampled from: temperature, then top-p, renormalised.

    Args:
        logits: (B, V) float32.
        sampling: temperature 0 leaves the distribution as it is (greedy picks its mode).
    """
    logprobs = torch.log_softmax(logits / (sampling.temperature or 1.0), -1)
    if sampling.top_p >= 1 or sampling.temperature == 0:
        return logprobs
    ordered, index = logprobs.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
    return torch.log_softmax(torch.empty_like(logprobs).scatter_(-1, index, ordered), -1)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text or jsonl file."""
    if not path.is_file():
        raise BadDataError(f"{path}: there is no such file")
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path} is not UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        try:
            lines = [json.loads(line)["prompt"] for line in lines]
            for line in lines:
                if not isinstance(line, str):
                    raise TypeError(f"{line!r} is no text")
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise BadDataError(f'{path}: every line must be JSON like {{"prompt": "…"}} ({error!r})') from error
    elif path.suffix != ".txt":
        raise BadDataError(f"{path}: prompts come from .txt (one a line) or .jsonl")
    if not lines:
        raise BadDataError(f"{path} has no prompt in it")
    return lines


def move(batch: Any, device: torch.device) -> Any:
    """A batch's tensors on a device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {k: move(v, device) for k, v in batch.items()}
    return batch
