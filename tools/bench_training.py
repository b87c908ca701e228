"""Measure a training step of ASM-UNet and of the plain net, and the time from the command to the first step.

    python tools/bench_training.py [--rounds 7] [--out docs/benchmarks]

One thread, CPU seconds, the contenders interleaved in each round, medians. Writes training_<date>.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

CASES = {
    "icbm152 (laptop)": [],
    "icbm152, blocks above 32 channels": ["backbone.min_channels=32"],
}
NETS = {"asm_unet": [], "raster": ["backbone=raster"], "plain": ["backbone=none"]}


def make_step(overrides):
    """A function that does one whole training step of a composed run: data, forward, backward, update."""
    import torch

    from bestiary.shared.core.build import build
    from bestiary.shared.core.checkpoint import Structure, build_model
    from bestiary.shared.core.config import compose, resolved
    from bestiary.shared.core.protocols import StepContext
    from bestiary.shared.core.stages import read_stages
    from bestiary.shared.core.streams import Stream

    cfg, choices = compose(["+project=asm_unet", *overrides])
    values = resolved(cfg)
    stage = read_stages(cfg)["train"]
    source = build(cfg.dataset)
    source.check()
    parts = {name: values.get(name) for name in ("model", "encoder", "backbone")}
    model = build_model(Structure("asm_unet", choices, [], source.spec().to_dict(), parts)).train()
    objective = build(stage.objective)
    optimizer = build({**stage.optim, "_partial_": True})(model.parameters())
    stream = Stream(0, "train", stage.batch_size)
    process = model.processor()
    k = 0

    def step():
        nonlocal k
        batch = process([source.train_example(k + i, stream) for i in range(stage.batch_size)], "train")
        k += stage.batch_size
        optimizer.zero_grad(set_to_none=True)
        loss = objective.loss(model, batch, StepContext("train", 0))
        (loss.loss_sum / loss.num_terms).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), stage.clip)
        optimizer.step()
        return loss.loss_sum.item()

    return step, sum(p.numel() for p in model.parameters())


def bench_steps(rounds):
    """Medians of CPU seconds a step, for each case and net."""
    import torch

    torch.set_num_threads(1)
    rows = []
    for case, extra in CASES.items():
        steps = {net: make_step([*extra, *override]) for net, override in NETS.items()}
        times = {net: [] for net in steps}
        for number in range(rounds + 1):
            for net, (step, _) in steps.items():
                began = time.process_time()
                step()
                if number:  # the first round warms up
                    times[net].append(time.process_time() - began)
        for net, (_, parameters) in steps.items():
            row = {"case": case, "net": net, "parameters": parameters, "cpu_s_per_step": round(median(times[net]), 4)}
            row["times_plain"] = round(row["cpu_s_per_step"] / median(times["plain"]), 2)
            rows.append(row)
            print(f"{case:36s} {net:9s} {row['cpu_s_per_step']:.3f} CPU s a step, {row['times_plain']:.2f} x plain")
    return rows


def bench_startup(rounds):
    """Wall seconds from the command to the line of the first step, each with a run folder of its own."""
    seconds = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "tools" / "train.py"), "+project=asm_unet", f"paths.runs={folder}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for line in process.stdout:
                if line.startswith("train 1/"):
                    seconds.append(round(time.monotonic() - began, 2))
                    break
            process.kill()
            process.wait()
    print(f"first step after {median(seconds):.1f} s (of {seconds})")
    return {"median_s": median(seconds), "all_s": seconds, "to": "the line of the first training step"}


def main():
    """Measure and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    os.environ.setdefault("BESTIARY_KERNELS", "auto")
    from bestiary.kernels import backend_report
    from bestiary.shared.core.runs import environment

    startup = bench_startup(3)
    rows = bench_steps(options.rounds)
    here = environment()
    here.pop("threads")
    here.pop("command")
    result = {
        "what": "training step and start-up of ASM-UNet on the CPU",
        **here,
        "threads": 1,
        "kernels": {op: entry["uses"] for op, entry in backend_report().items()},
        "startup": startup,
        "steps": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"training_{here['date'][:10]}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(file)


if __name__ == "__main__":
    main()
