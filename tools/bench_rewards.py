#!/usr/bin/env python
"""What it saves to score answers in the background, and how many programs a second the sandbox runs.

    python tools/bench_rewards.py                 # about three minutes; writes docs/benchmarks/

Wall seconds of one step's rollouts and rewards (no update): 16 prompts, 8 samples of 48 tokens, 32 verifiers at once.
Three ways: answers scored one after the other when all are drawn; at once when all are drawn; and at once while the
completions of the next prompts are drawn; with verifiers that take 1 ms and 500 ms an answer. Medians of interleaved
rounds.

Programs: right solutions of small_functions with their five calls, on each strong rung, by threads at once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.core.protocols import Sampling
from bestiary.shared.core.runs import environment
from bestiary.shared.language.causal_lm import CausalLM
from bestiary.shared.language.hf_causal_lm import HFCausalLM
from bestiary.shared.rl.environments.single_turn import SingleTurn
from bestiary.shared.rl.protocols import Verdict
from bestiary.shared.rl.reward_pool import RewardPool
from bestiary.shared.rl.rewards.code import Code
from bestiary.shared.rl.rollouts import NativeEngine, Rollouts
from bestiary.shared.rl.sandbox import Sandbox
from bestiary.shared.rl.tasks.calculator import CalculatorTasks
from bestiary.shared.rl.tasks.small_functions import SmallFunctions
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


def programs(rung: str, workers: int, count: int = 96) -> float:
    """Solutions a second."""
    examples = list(SmallFunctions().held_out("test"))[:count]
    verifier = Code()
    verifier._sandbox = Sandbox(rung=rung)
    answers = [str(verifier.gold_answer(example)) for example in examples]
    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        verdicts = list(
            pool.map(lambda pair: verifier.verify("", pair[1], pair[0]), zip(examples, answers, strict=True))
        )
    wall = time.perf_counter() - began
    if any(verdict.score != 1 for verdict in verdicts):
        raise SystemExit(f"a right program did not pass: {next(v for v in verdicts if v.score != 1)}")
    return count / wall


def bench_programs(rounds: int) -> list[dict[str, Any]]:
    """Medians of interleaved rounds on the rungs that work here."""
    cases: dict[tuple[str, int], list[float]] = {}
    for rung in ("nobody_bwrap", "root_unshare"):
        try:
            Sandbox(rung=rung)
        except ConfigError as error:
            print(f"left out: {error}")
            continue
        cases |= {(rung, workers): [] for workers in (1, 2, 8)}
    for _ in range(rounds):
        for (rung, workers), found in cases.items():
            found.append(programs(rung, workers))
    rows = []
    for (rung, workers), found in cases.items():
        rows.append({"rung": rung, "at_once": workers, "per_s": round(statistics.median(found), 1)})
        print(f"{rung:<14} {workers} at once  {rows[-1]['per_s']:6.1f} programs/s")
    return rows


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
    solutions = bench_programs(options.rounds)
    record = {
        "what": "rollouts and rewards of a step, three ways of scoring: wall seconds; programs in the sandbox"
    } | environment()
    record.pop("command")
    bench.save(
        record | {"processor": bench.processor(), "rounds": options.rounds, "rows": rows, "programs": solutions},
        options.out,
        "rewards",
    )


if __name__ == "__main__":
    main()
