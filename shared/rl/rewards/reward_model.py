"""A reward model: a language backbone that gives a text one number, learned from pairs of answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bestiary.shared.core.checkpoint import load_checkpoint
from bestiary.shared.core.errors import BadDataError, ConfigError
from bestiary.shared.core.examples import Batch, Example, LMBatch, Mode, text_message
from bestiary.shared.core.protocols import LanguageBackbone, Output, Rollout, Sampling
from bestiary.shared.language.causal_lm import move
from bestiary.shared.language.processor import TextProcessor
from bestiary.shared.rl.protocols import ScoredRow
from bestiary.shared.rl.rewards.extract import after_think


@dataclass(frozen=True)
class PairProcessor:
    """An example as its chosen row (``answer``) and, behind it, its rejected one (``meta["rejected"]``), padded right.

    An answer longer than ``max_len`` allows is cut at its end.

    Attributes:
        rows: tokenises one row.
    """

    rows: TextProcessor

    def __call__(self, examples: Sequence[Example], mode: Mode) -> LMBatch:
        """Two rows an example; in mode ``eval`` one where there is no rejected answer.

        Raises:
            BadDataError: for an example without an answer, or, in training, without a rejected one.
            ConfigError: for prompts.
        """
        if mode == "prompt":
            raise ConfigError("a reward model completes no prompts")
        rows: list[Example] = []
        for example in examples:
            rejected = (example.get("meta") or {}).get("rejected")
            if not isinstance(example.get("answer"), str):
                raise BadDataError(f"example {example['id']!r} has no answer (the preferred one)")
            rows.append(_scored(example, example["answer"]))
            if isinstance(rejected, str):
                rows.append(_scored(example, rejected, f"{example['id']}/rejected"))
            elif mode == "train" or rejected is not None:
                raise BadDataError(
                    f'example {example["id"]!r} has no meta["rejected"] (a text: the answer not preferred)'
                )
        return self.rows(rows, "eval")


class RewardModel(nn.Module):
    """Any language backbone with a linear head on the last token's hidden state.

    Paper: arXiv:2512.13607 (Nemotron-Cascade): a Bradley-Terry model on a language model with a linear head.

    Args:
        backbone: the language model; its own head is not used.
    """

    tasks = ("chat", "text")

    def __init__(self, backbone: LanguageBackbone):
        super().__init__()
        self.backbone: Any = backbone
        self.head = nn.Linear(backbone.hidden_size, 1, bias=False)
        nn.init.normal_(self.head.weight, std=(backbone.hidden_size + 1) ** -0.5)

    def processor(self, max_len: int | None = None) -> PairProcessor:
        """Pairs to batches, with this backbone's tokenizer."""
        return PairProcessor(TextProcessor(self.backbone.tokenizer, max_len))

    def forward(self, batch: Batch) -> Output:
        """``logits`` (B, 1): the reward of each row."""
        lm: LMBatch = batch  # type: ignore[assignment]
        mask = lm["attention_mask"]
        embedded = self.backbone.embed(lm["input_ids"])
        logits, hidden, _ = self.backbone(embedded, mask, lm["position_ids"], lm["seq_idx"], logits_to_keep=1)
        _, aux_losses = self.backbone.take_aux() if hasattr(self.backbone, "take_aux") else ([], {})
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        final = hidden[torch.arange(len(last), device=last.device), last]
        rewards = self.head(final.to(self.head.weight.dtype))
        # Data-parallel training waits for a gradient of every parameter, the unused language head's too.
        rewards = rewards + 0.0 * logits.nan_to_num(0.0, 0.0, 0.0).sum().to(rewards)
        return Output(rewards, hidden=hidden, aux_losses=aux_losses)

    @torch.no_grad()
    def score(self, examples: Sequence[Example], answers: Sequence[str], batch_size: int = 16) -> torch.Tensor:
        """Rewards (n,) float32 on the CPU, rows of like length together.

        Args:
            examples: the prompts; ``answer`` is not looked at.
            answers: an answer to each.
            batch_size: rows at once.
        """
        processor = self.processor()
        order = sorted(range(len(answers)), key=lambda i: len(answers[i]))
        out = torch.zeros(len(answers))
        device = self.head.weight.device
        training = self.training
        self.eval()
        try:
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                batch = processor.rows([_scored(examples[i], answers[i]) for i in chunk], "eval")
                out[chunk] = self(move(batch, device)).logits[:, 0].float().cpu()
        finally:
            self.train(training)
        return out

    def wrap_policy(self) -> set[type[nn.Module]]:
        """The backbone's layers."""
        return self.backbone.layer_classes()

    def generate(self, batch: Batch, n: int = 1, sampling: Sampling | None = None, **options: Any) -> Rollout:
        """Raises ConfigError: there is nothing to generate."""
        raise ConfigError("a reward model gives numbers and writes no text")

    def predict(self, inputs: Sequence[Path | str], out_dir: Path) -> list[Path]:
        """Score the lines {"prompt": …, "answer": …} of .jsonl files, into scores.jsonl.

        Raises:
            BadDataError: for a file that cannot be read, or a line that is not that.
        """
        lines = []
        for path in map(Path, inputs):
            try:
                found = [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
                lines += [(str(line["prompt"]), str(line["answer"])) for line in found]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise BadDataError(
                    f'{path}: every line must be JSON like {{"prompt": "…", "answer": "…"}} ({error!r})'
                ) from error
        examples: list[Example] = [
            {"id": str(i), "messages": [text_message("user", prompt)]} for i, (prompt, _) in enumerate(lines)
        ]
        scores = self.score(examples, [answer for _, answer in lines]).tolist()
        out_dir.mkdir(parents=True, exist_ok=True)
        file = out_dir / "scores.jsonl"
        with open(file, "w") as handle:
            for (prompt, answer), score in zip(lines, scores, strict=True):
                handle.write(
                    json.dumps({"prompt": prompt, "answer": answer, "score": score}, ensure_ascii=False) + "\n"
                )
        return [file]


class RewardModelScorer:
    """A shaping that replaces the rewards of a step by a reward model's scores; masked rows stay masked.

    What follows ``</think>`` is scored; without it the whole text is (which a model that has seen answers alone scores
    low). A whole step is scored at once. Scores that are not finite become masks.

    Paper: arXiv:2512.13607 (Nemotron-Cascade): RLHF.

    Args:
        checkpoint: a run or stage folder with a :class:`RewardModel`; it is loaded when first needed. Or
        model: the model itself.
        batch_size: texts at once.
        device: of the model; None is the GPU if there is one.
        max_chars: of an answer; the rest is cut off.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        model: RewardModel | None = None,
        batch_size: int = 16,
        device: str | None = None,
        max_chars: int = 100_000,
    ):
        if (checkpoint is None) == (model is None):
            raise ConfigError("the reward model's scorer needs checkpoint=RUN (of recipe=reward_model)")
        self.checkpoint, self.model, self.batch_size = checkpoint, model, batch_size
        self.device, self.max_chars = device, max_chars

    def __call__(self, rewards: torch.Tensor, groups: Sequence[Sequence[ScoredRow]]) -> torch.Tensor:
        """Scores (P, G) in place of the rewards."""
        rows = [row for group in groups for row in group]
        # Half a surrogate pair cannot be tokenised.
        texts = [after_think(row.text)[: self.max_chars].encode(errors="replace").decode() for row in rows]
        scores = self._loaded().score([row.example for row in rows], texts, self.batch_size).to(rewards)
        scores = torch.where(scores.isfinite(), scores, torch.nan).reshape(rewards.shape)
        return torch.where(rewards.isnan(), rewards, scores)

    def _loaded(self) -> RewardModel:
        if self.model is None:
            assert self.checkpoint is not None
            model, _ = load_checkpoint(self.checkpoint)
            if not isinstance(model, RewardModel):
                raise ConfigError(f"{self.checkpoint} holds a {type(model).__name__}, not a RewardModel")
            self.model = model.to(self.device or ("cuda" if torch.cuda.is_available() else "cpu")).requires_grad_(False)
        return self.model


class PairAccuracy:
    """Share of pairs whose chosen answer gets the higher reward; equal ones are wrong.

    Args:
        batch_size: pairs at once.
    """

    name = "pair_accuracy"
    version = "1"

    def __init__(self, batch_size: int = 16):
        self.batch_size = batch_size

    def __call__(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """``pair_accuracy``, the mean ``margin``, and the number of ``pairs``."""
        process: Any = model.processor()  # type: ignore[operator]
        device = next(model.parameters()).device
        margins = []
        for start in range(0, len(examples), self.batch_size):
            batch = process(list(examples[start : start + self.batch_size]), "train")
            rewards = model(move(batch, device)).logits[:, 0].cpu()
            margins.append(rewards[0::2] - rewards[1::2])
        margin = torch.cat(margins).double()
        right = float((margin > 0).double().mean())
        return {"pair_accuracy": right, "margin": float(margin.mean()), "pairs": float(len(margin))}


def _scored(example: Example, answer: str, name: str | None = None) -> Example:
    """An example with an answer as the text to score."""
    out: Example = {"id": name or example["id"], "meta": {}}
    if "messages" in example:
        thinking = (example.get("meta") or {}).get("thinking")
        return out | {"messages": example["messages"], "answer": answer, "meta": {"thinking": thinking}}  # type: ignore
    if "text" in example:
        return out | {"text": example["text"] + answer}  # type: ignore[return-value]
    raise BadDataError(f"example {example.get('id')!r} is neither text nor chat: a reward model cannot score it")
