"""``mamba_ssm.utils.generation``: decoding with a cache. Greedy, top-k, top-p, min-p, temperature."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class InferenceParams:
    """The cache of a model and how far it has come."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Any] = field(default_factory=dict)
    lengths_per_sample: torch.Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin anew; the states are overwritten by the next prompt."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


@dataclass
class GenerateOutput:
    """``sequences`` (B, prompt and new tokens) and the logits ``scores`` of each new token."""

    sequences: torch.Tensor
    scores: tuple[torch.Tensor, ...] | None = None


def sample(
    logits: torch.Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0
) -> torch.Tensor:
    """Draw a token from each row of logits.

    Args:
        logits: (B, V).
        top_k: keep the k likeliest; 1 is greedy, 0 keeps all.
        top_p: keep the fewest tokens whose probabilities reach it; 0 keeps all.
        min_p: with ``top_k=0``, keep tokens at least so likely as ``min_p`` times the likeliest.
        temperature: divides the logits.

    Returns:
        (B,) tokens.
    """
    if top_k == 1:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k > 0:
        lowest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    elif min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), float("-inf"))
    if 0 < top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        mass = ordered.softmax(-1)
        surplus = (mass.cumsum(-1) - mass) >= top_p  # what the tokens before hold already
        logits = logits.masked_fill(torch.zeros_like(surplus).scatter(-1, index, surplus), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1)[..., 0]


@torch.inference_mode()
def decode(
    input_ids: torch.Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: torch.Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    streamer: Any = None,
) -> GenerateOutput:
    """Prompt at once, then token by token until every row has just ended or ``max_length`` is reached.

    Args:
        input_ids: (B, prompt).
        model: called with ``inference_params=`` and ``num_last_tokens=1``.
        max_length: prompt and new tokens.
        top_k: as :func:`sample`.
        top_p: as :func:`sample`.
        min_p: as :func:`sample`.
        temperature: as :func:`sample`.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens seen already.
        eos_token_id: ends a row.
        teacher_outputs: (B, length) tokens to take instead of drawn ones.
        vocab_size: logits beyond it are padding.
        cg: accepted; there are no CUDA graphs here.
        enable_timing: accepted.
        streamer: its ``put`` gets the prompt and every token, its ``end`` is called at the end.

    Returns:
        Sequences and scores.
    """
    cache = InferenceParams(max_seqlen=max_length, max_batch_size=len(input_ids))
    sequences, scores, new = input_ids, [], input_ids
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while True:
        logits = model(new, inference_params=cache, num_last_tokens=1).logits[:, -1]
        scores.append(logits[..., :vocab_size])
        cache.seqlen_offset += new.shape[1]
        place = cache.seqlen_offset
        if teacher_outputs is not None and teacher_outputs.shape[1] > place:
            new = teacher_outputs[:, place : place + 1]
        else:
            logits = scores[-1]
            if repetition_penalty != 1.0:
                seen = logits.gather(1, sequences)
                seen = torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty)
                logits = logits.scatter(1, sequences, seen)
            new = sample(logits, top_k, top_p, min_p, temperature)[:, None]
        sequences = torch.cat([sequences, new], dim=1)
        if streamer is not None:
            streamer.put(new.cpu())
        ended = eos_token_id is not None and bool((new == eos_token_id).all())
        if ended or sequences.shape[1] >= max_length:
            break
    if streamer is not None:
        streamer.end()
    return GenerateOutput(sequences, tuple(scores))


class GenerationMixin:
    """Gives a language model ``generate``."""

    def generate(
        self,
        input_ids: torch.Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Sequences (B, at most max_length), or :class:`GenerateOutput`; options as :func:`decode`."""
        output = decode(
            input_ids, self, max_length, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature, **kwargs
        )
        if not output_scores:
            output.scores = None
        return output if return_dict_in_generate else output.sequences
