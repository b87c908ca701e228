#!/usr/bin/env python
"""GRPO beside TRL's GRPOTrainer: same checkpoint, prompts, batch, rewards and model class, on one CPU thread.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install torch transformers trl datasets
    python tools/bench_grpo.py --peer /tmp/trl/bin/python              # three seeds, about ten minutes
    python tools/bench_grpo.py --peer /tmp/trl/bin/python --seeds 0 --rounds 1 --steps 20 --out /tmp

CPU seconds of the steps alone, logging on in both, rounds interleaved, medians; evaluations stand outside the clock.
The task is tiny, so what is compared is the work around the model, not a GPU's throughput. Writes docs/benchmarks/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from bestiary.shared.core.runs import environment
from bestiary.shared.testing import bench

EXPERIMENT = "+experiment=_examples/carry_addition"
PROMPTS, SAMPLES, LENGTH, LR = 64, 8, 4, 3e-4
TARGET = 2.0
"""Least ratio of TRL's CPU seconds to ours."""


def main() -> None:
    """Run the rounds and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="the Python of a venv with trl")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    if not options.peer:
        parser.error("--peer is missing: the Python of a venv with trl")
    os.environ["OMP_NUM_THREADS"] = "1"
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in map(int, options.seeds.split(",")):
            results.append(one_seed(options, seed, Path(scratch)))
    summary = {
        name: {
            "cpu_s": statistics.median(t for r in results for t in r[name]["cpu_s"]),
            "steps_per_cpu_s": options.steps / statistics.median(t for r in results for t in r[name]["cpu_s"]),
            "greedy": [g for r in results for g in r[name]["greedy"]],
        }
        for name in ("ours", "ours_all_rows", "trl")
    }
    ratios = [statistics.median(r["trl"]["cpu_s"]) / statistics.median(r["ours"]["cpu_s"]) for r in results]
    same_work = [statistics.median(r["trl"]["cpu_s"]) / statistics.median(r["ours_all_rows"]["cpu_s"]) for r in results]
    for name, values in summary.items():
        print(
            f"{name:<14} {values['cpu_s']:6.2f} CPU-s  {values['steps_per_cpu_s']:5.2f} steps/CPU-s", values["greedy"]
        )
    print(f"TRL / ours by seed: {[round(r, 2) for r in ratios]} (asked: {TARGET}); every row trained: ", end="")
    print([round(r, 2) for r in same_work])
    record = {"what": "100 steps of GRPO on carry addition beside TRL: CPU seconds of one thread"} | environment()
    record.pop("command")
    record |= {"processor": bench.processor(), "steps": options.steps, "target": TARGET, "ratios": ratios}
    record |= {"ratios_all_rows": same_work, "summary": summary, "seeds": results}
    bench.save(record, options.out, "grpo")


def one_seed(options: Any, seed: int, scratch: Path) -> dict[str, Any]:
    """Teach one checkpoint, then train it with each, in turns."""
    from bestiary.shared.core.checkpoint import load_checkpoint
    from bestiary.shared.core.streams import Stream
    from bestiary.shared.rl.tasks.carry_addition import CarryAddition

    teacher = scratch / f"teacher{seed}"
    run([sys.executable, str(ROOT / "tools" / "train.py"), EXPERIMENT, f"seed={seed}", "recipe.run=[sft]",
         f"paths.run_dir={teacher}", "callbacks.log_every_steps=400"])  # fmt: skip
    model, _ = load_checkpoint(teacher)
    backbone: Any = model.backbone
    folder = scratch / f"hf{seed}"
    backbone.lm.save_pretrained(folder)
    save_tokenizer(backbone.tokenizer, folder)
    source, stream = CarryAddition(), Stream(seed, "grpo", PROMPTS)
    with open(scratch / f"prompts{seed}.jsonl", "w") as handle:
        for k in range(options.steps * PROMPTS):
            example = source.train_example(k, stream, "rl")
            right = [*backbone.tokenizer.encode(example["answer"]), backbone.tokenizer.eos_id]
            prompt = example["messages"][0]["content"][0]["value"]
            handle.write(json.dumps({"prompt": prompt, "right": right}) + "\n")
    out: dict[str, Any] = {"seed": seed}
    for name in ("ours", "ours_all_rows", "trl"):
        out[name] = {"cpu_s": [], "greedy": []}
    for round_ in range(options.rounds):
        for name in ("ours", "ours_all_rows", "trl"):
            made = scratch / f"{name}{seed}_{round_}"
            if name == "trl":
                found = trl(options, seed, folder, scratch, made)
                out["versions"] = {k: v for k, v in found.items() if k != "cpu_s"}
            else:
                spec = {"seed": seed, "teacher": str(teacher), "out": str(made), "steps": options.steps}
                spec["all_rows"] = name != "ours"
                found = run([sys.executable, __file__, "--child", json.dumps(spec)])
            out[name]["cpu_s"].append(found["cpu_s"])
            if not round_:  # the rounds are the same computation
                out[name]["greedy"].append(greedy(made, source, folder if name == "trl" else None))
            print(f"seed {seed} round {round_} {name}: {found['cpu_s']:.2f} CPU-s", flush=True)
    return out


def run(command: list[str]) -> Any:
    """A process that must succeed; what it printed as its result."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT ")) if lines else None


def child(spec: dict[str, Any]) -> None:
    """Our trainer, as tools/train.py runs it, with a clock around the steps."""
    import lightning.pytorch as pl

    from bestiary.shared.core import stages
    from bestiary.shared.core.config import compose
    from bestiary.shared.core.train import train
    from bestiary.shared.rl import grpo

    class Clock(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            self.began = time.process_time()

        def on_train_end(self, *_: Any) -> None:
            self.took = time.process_time() - self.began

    clock, make = Clock(), stages.make_trainer

    def timed(*arguments: Any) -> Any:
        trainer, log = make(*arguments)
        trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        return trainer, log

    stages.make_trainer = timed
    if spec["all_rows"]:  # the same work as TRL's: rows without advantage too
        split = grpo.split
        grpo.split = lambda batch, tokens, keep_flat=False: split(batch, tokens, keep_flat=True)
    overrides = [EXPERIMENT, f"seed={spec['seed']}", "recipe.run=[grpo]", f"init_from={spec['teacher']}"]
    overrides += [f"recipe.steps={spec['steps']}", f"recipe.lr={LR}", f"paths.run_dir={spec['out']}"]
    overrides += ["callbacks.log_every_steps=1", "trainer=cpu"]
    cfg, choices = compose(overrides)
    train(cfg, choices, overrides)
    print("RESULT " + json.dumps({"cpu_s": clock.took}), flush=True)


def trl(options: Any, seed: int, folder: Path, scratch: Path, made: Path) -> dict[str, Any]:
    """TRL's trainer, in its own venv."""
    spec = {"model": str(folder), "prompts": str(scratch / f"prompts{seed}.jsonl"), "out": str(made), "lr": LR}
    spec |= {"steps": options.steps, "prompts_per_step": PROMPTS, "samples": SAMPLES, "max_new_tokens": LENGTH}
    file = scratch / "spec.json"
    file.write_text(json.dumps(spec | {"seed": seed}))
    return run([options.peer, str(ROOT / "tools" / "bench_grpo_trl.py"), str(file)])


def greedy(made: Path, source: Any, folder: Path | None) -> float:
    """Held-out greedy accuracy by our protocol, of our run or of a folder that TRL wrote."""
    from bestiary.shared.core.checkpoint import load_checkpoint
    from bestiary.shared.core.protocols import Sampling
    from bestiary.shared.language.causal_lm import CausalLM
    from bestiary.shared.language.hf_causal_lm import HFCausalLM
    from bestiary.shared.metrics.pass_at import PassAt

    if folder is None:
        model = load_checkpoint(made)[0]
    else:
        model = CausalLM(HFCausalLM(path=str(made), tokenizer="symbols:0123456789+="))
    return PassAt(sampling=Sampling(LENGTH))(model.eval(), source.held_out("test"))["pass@1"]


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The symbol tokenizer as files of transformers."""
    import tokenizers
    import transformers

    names = [tokenizer.decode([i]) or f"<{i}>" for i in range(tokenizer.vocab_size)]
    vocabulary = {name: i for i, name in enumerate(names)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, names[tokenizer.pad_id]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=names[tokenizer.pad_id],
        eos_token=names[tokenizer.eos_id],
        unk_token=names[tokenizer.pad_id],
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
