"""Hybrids through the generator that all backbones share: rows of different length, samples, chunks, early ends."""

import pytest
import torch

from bestiary.shared.core.examples import text_message
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.language.causal_lm import CausalLM
from bestiary.shared.language.generate import sampling_logprobs

PROMPTS = ["say apple", "x", "a rather longer prompt than the others"]


def batch_of(model, texts=PROMPTS):
    return model.processor()([{"id": t, "messages": [text_message("user", t)]} for t in texts], "prompt")


@pytest.mark.parametrize("pattern", ["M-M*-ME", "M-M-", "*-", "ME*E"])
def test_greedy_is_the_argmax_of_the_plain_forward_pass(make_lm, run_lm, pattern):
    lm = make_lm(pattern)
    model = CausalLM(lm)
    rollout = model.generate(batch_of(model), 1, Sampling(8))
    for row, text in enumerate(PROMPTS):
        ids = model.processor()([{"id": "x", "messages": [text_message("user", text)]}], "prompt")["input_ids"][
            0
        ].tolist()
        for step in range(int(rollout.mask[row].sum())):
            logits = run_lm(lm, [ids])[0, -1]
            top = logits.topk(2).values
            assert top[0] - top[1] > 1e-4  # no tie to be decided by rounding
            assert rollout.completion_ids[row, step] == logits.argmax()
            ids.append(int(logits.argmax()))


@pytest.mark.parametrize("pattern", ["M-M*-ME", "M-M-"])
def test_a_prompt_is_completed_the_same_in_any_company(make_lm, pattern):
    model = CausalLM(make_lm(pattern))
    sampling = Sampling(10, temperature=1.0, top_p=0.9, seed=4)
    together = model.generate(batch_of(model), 2, sampling, prefill_chunk=5)
    for row, text in enumerate(PROMPTS):
        alone = model.generate(batch_of(model, [text]), 2, sampling)
        for sample in range(2):
            at, length = 2 * row + sample, int(alone.mask[sample].sum())
            assert together.texts[at] == alone.texts[sample]
            ours, theirs = together.logprobs[at, :length], alone.logprobs[sample, :length]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_logprobs_are_what_a_trainer_computes_again(make_lm):
    model = CausalLM(make_lm("M-M*-ME"))
    sampling = Sampling(12, temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=1)
    prompts = batch_of(model)
    rollout = model.generate(prompts, 1, sampling)
    ids = torch.cat([prompts["input_ids"], rollout.completion_ids], 1)
    mask = torch.cat([prompts["attention_mask"], rollout.mask.long()], 1)
    with torch.no_grad():
        logits = model.backbone(model.backbone.embed(ids), mask)[0]
    width = prompts["input_ids"].shape[1]
    scored = sampling_logprobs(logits[:, width - 1 : -1].flatten(0, 1), sampling).unflatten(0, (3, -1))
    again = scored.gather(-1, rollout.completion_ids[..., None])[..., 0]
    torch.testing.assert_close(again[rollout.mask], rollout.logprobs[rollout.mask], rtol=1e-4, atol=1e-4)
