"""A small policy, and an environment of one turn that scores by a function."""

import pytest
import torch

from bestiary.shared.core.examples import text_message
from bestiary.shared.rl.protocols import Turn, Verdict


@pytest.fixture
def llama():
    """``llama(seed=0)``: a CausalLM of two layers on bytes, with weights wide enough to have opinions."""
    from bestiary.shared.language.causal_lm import CausalLM
    from bestiary.shared.language.hf_causal_lm import HFCausalLM

    def make(seed=0):
        torch.manual_seed(seed)
        config = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
        }
        return CausalLM(HFCausalLM("llama", config, "byte"))

    return make


@pytest.fixture
def chats():
    """``chats(*questions)``: chat examples."""

    def make(*questions, answer="a"):
        return [
            {"id": f"q{i}", "messages": [text_message("user", q)], "answer": answer, "verifier": "exact_text"}
            for i, q in enumerate(questions)
        ]

    return make


class Scored:
    """One turn, scored by a function of the text and the example."""

    name, version, max_turns = "scored", "1", 1

    def __init__(self, score):
        self.score = score

    def prompt(self, example):
        return example

    def reset(self, example, seed):
        return ScoredEpisode(self.score, example)

    def close(self):
        pass


class ScoredEpisode:
    def __init__(self, score, example):
        self.score, self.example = score, example

    def step(self, text):
        return Turn()

    def verify(self, text):
        found = self.score(text, self.example)
        return found if isinstance(found, Verdict) else Verdict(float(found))

    def close(self):
        pass


@pytest.fixture
def scored():
    """The class of that environment."""
    return Scored
