#!/usr/bin/env python
"""What it saves to score answers in the background, for verifiers that take 1 ms and 500 ms an answer.

    python tools/bench_rewards.py                 # about two minutes; writes docs/benchmarks/

Wall seconds of one step's rollouts and rewards (no update): 16 prompts, 8 samples of 48 tokens, 32 verifiers at once.
Three ways: answers scored one after the other when all are drawn; at once when all are drawn; and at once while the
completions of the next prompts are drawn. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch

from bestiary.shared.core.protocols import Sampling
from bestiary.shared.core.runs import environment
from bestiary.shared.language.causal_lm import CausalLM
from bestiary.shared.language.hf_causal_lm import HFCausalLM
from bestiary.shared.rl.environments.single_turn import SingleTurn
from bestiary.shared.rl.protocols import Verdict
from bestiary.shared.rl.reward_pool import RewardPool
from bestiary.shared.rl.rollouts import NativeEngine, Rollouts
from bestiary.shared.rl.tasks.calculator import CalculatorTasks
from bestiary.shared.testing import bench

WAYS = {"one by one, after": (1, None), "at once, after": (32, None), "at once, meanwhile": (32, 4)}
"""Verifiers at once, and prompts whose completions are drawn together."""


class Slow:
    """A verifier that waits, as one does that asks a process or a server."""

    name, version = "slow", "1"

    def __init__(self, seconds: float):
        self.seconds = seconds

    def verify(self, gold: str, answer: str, example: Any) -> Verdict:
        time.sleep(self.seconds)
        return Verdict(0.0)

    def gold_answer(self, example: Any) -> None:
        return None

    def close(self) -> None:
        pass


def step(model: Any, examples: list[Any], seconds: float, workers: int, at_once: int | None) -> float:
    """Wall seconds of one step's rollouts and rewards."""
    engine, pool = NativeEngine(), RewardPool(workers)
    processor = model.processor()
    rollouts = Rollouts(engine, SingleTurn(Slow(seconds)), pool, processor, processor.tokenizer, at_once)
    began = time.perf_counter()
    engine.begin(model, 0)
    tickets = [(i, str(i), example) for i, example in enumerate(examples)]
    _, finish = rollouts.play(tickets, 8, Sampling(48, 1.0), torch.device("cpu"))
    finish()
    took = time.perf_counter() - began
    engine.end()
    pool.close()
    return took


def main() -> None:
    """Run the rounds and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = CausalLM(HFCausalLM("llama", sizes, "byte")).eval()
    examples = list(CalculatorTasks().held_out("test"))[:16]
    rows = []
    for seconds in (0.001, 0.5):
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(options.rounds if seconds < 0.1 else max(options.rounds // 2, 1)):
            for way, (workers, at_once) in WAYS.items():
                times[way].append(step(model, examples, seconds, workers, at_once))
        for way, found in times.items():
            row = {"verifier_ms": seconds * 1000, "way": way, "wall_s": round(statistics.median(found), 3)}
            rows.append(row)
            print(f"{row['verifier_ms']:5.0f} ms  {way:<20} {row['wall_s']:8.3f} s")
    record = {"what": "rollouts and rewards of a step, three ways of scoring: wall seconds"} | environment()
    record.pop("command")
    bench.save(
        record | {"processor": bench.processor(), "rounds": options.rounds, "rows": rows}, options.out, "rewards"
    )


if __name__ == "__main__":
    main()
