"""What a long context costs a model: time to the first token, tokens a second behind it, and the size of its cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from bestiary.shared.core.build import build, to_plain
from bestiary.shared.core.config import compose


def measure(
    overrides: Sequence[str], lengths: Sequence[int], chunk: int = 1024, steps: int = 16, seed: int = 0
) -> dict[str, Any]:
    """Read random tokens chunk by chunk, and stop at each length to decode a few more.

    The weights are fresh ones, which cost what trained ones do. CPU seconds of one thread, so that the same work is
    counted on a busy machine; at one thread that is the wall time of an idle one.

    Args:
        overrides: Hydra overrides that choose the backbone.
        lengths: contexts in tokens, ascending.
        chunk: tokens read at once.
        steps: tokens decoded at each length, of which the median time counts.
        seed: of weights and tokens.

    Returns:
        ``ttft_s/<length>`` (CPU seconds), ``decode_tokens_s/<length>``, ``cache_mib/<length>``, and ``parameters``.
    """
    cfg, _ = compose(list(overrides))
    torch.manual_seed(seed)
    lm = build(to_plain(cfg.backbone)).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"parameters": sum(p.numel() for p in lm.parameters())} | _sweep(lm, lengths, chunk, steps)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _sweep(lm: Any, lengths: Sequence[int], chunk: int, steps: int) -> dict[str, float]:
    found: dict[str, float] = {}
    cache, spent = lm.new_cache(1), 0.0
    tokens = lm.tokenizer.vocab_size
    for length in lengths:
        while cache.length < length:
            ids = torch.randint(0, tokens, (1, min(chunk, length - cache.length)))
            began = time.process_time()
            lm(lm.embed(ids), cache=cache, logits_to_keep=1)
            spent += time.process_time() - began
        found[f"ttft_s/{length}"] = round(spent, 4)
        found[f"cache_mib/{length}"] = round(sum(cache.bytes().values()) / 2**20, 4)
        copy, times = cache.clone(), []
        for _ in range(steps):
            ids = torch.randint(0, tokens, (1, 1))
            began = time.process_time()
            lm(lm.embed(ids), cache=copy)
            times.append(time.process_time() - began)
        found[f"decode_tokens_s/{length}"] = round(1 / median(times), 2)
        print(f"{length} tokens: { ({k: v for k, v in found.items() if k.endswith(f'/{length}')}) }", flush=True)
    return found
