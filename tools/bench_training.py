"""Measure ASM-UNet: one block, a training step beside the plain net's, and the time from the command to the first step.

    python tools/bench_training.py [--only startup,block,step] [--rounds 7] [--out docs/benchmarks]

One thread, CPU seconds, the contenders interleaved in each round, medians. Peak memory of a step is measured in a
process of its own. Writes training_<date>.json, or <part>_<date>.json for a single part.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from bestiary.shared.testing import bench

# The ACDC plan of the official code at half its channels and about half its patch in y and x.
PLAN = [
    "dataset.patch_size=[20,128,128]",
    "dataset.strides=[[1,1,1],[1,2,2],[2,2,2],[2,2,2],[1,2,2],[1,2,2]]",
    "dataset.kernel_sizes=[[1,3,3],[3,3,3],[3,3,3],[3,3,3],[3,3,3],[3,3,3]]",
    "encoder.features=[16,32,64,128,160,160]",
    "encoder.convs_per_stage=2",
    "model.network.decoder_convs=2",
    "backbone.min_channels=32",
]
CASES = {
    "icbm152 (laptop)": [],
    "icbm152, blocks above 32 channels": ["backbone.min_channels=32"],
    "ACDC's plan at 20x128x128, half its channels": PLAN,
}
NETS = {
    "asm_unet": [],
    "asm_unet, gathered": ["backbone.fused=false"],
    "raster": ["backbone=raster"],
    "plain": ["backbone=none"],
}
# Channels and voxels of the block: the first that ACDC's plan has, at a quarter of its tokens.
BLOCK = (128, (10, 32, 28))
BLOCKS = {
    "fused": {},
    "gathered": {"fused": False},
    "gathered, reference kernels": {"fused": False},
}


def make_step(overrides):
    """A function that does one whole training step of a composed run: data, forward, backward, update."""
    import torch

    from bestiary.shared.core.build import build
    from bestiary.shared.core.checkpoint import Structure, build_model
    from bestiary.shared.core.config import compose, resolved
    from bestiary.shared.core.protocols import StepContext
    from bestiary.shared.core.recipe import read_stages
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


def make_block(name):
    """A function that runs one ASM block forward and backward and returns the output and the input's gradient."""
    import torch

    from bestiary.kernels.backends import ENV
    from bestiary.projects.asm_unet.adaptive_scan import AdaptiveScanMamba

    torch.manual_seed(0)
    dim, size = BLOCK
    block = AdaptiveScanMamba(dim, 3, **BLOCKS[name]).train()
    x = torch.randn(1, dim, *size, requires_grad=True)
    upstream = torch.randn(1, dim, *size)
    backend = {ENV: "reference"} if name.endswith("reference kernels") else {}

    def step():
        block.zero_grad(set_to_none=True)
        x.grad = None
        with mock.patch.dict(os.environ, backend):
            out = block(x)
            out.backward(upstream)
        return [out.detach(), x.grad]

    return step


def peak_mib(kind, *names):
    """Peak memory of one step above what is held before it, in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", kind, *names]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return round(int(result.stdout.split()[-1]) / 2**20, 1)


def print_peak(kind, *names):
    """What :func:`peak_mib` runs."""
    import torch

    torch.set_num_threads(1)
    step = make_block(*names) if kind == "block" else make_step([*CASES[names[0]], *NETS[names[1]]])[0]
    step()
    print(bench.peak_bytes(step))


def bench_block(rounds):
    """Forward and backward of a block, in every way it can be computed.

    Scores that differ in the last bit sort a few tokens otherwise, so that results are compared on one order.
    """
    from bestiary.projects.asm_unet import adaptive_scan

    dim, size = BLOCK
    case = f"ASM block, {dim} channels, {'x'.join(map(str, size))} voxels"
    steps = {name: make_block(name) for name in BLOCKS}
    sort, orders = adaptive_scan.argsort_order, []

    def same_order(scores):
        orders.append(orders[0] if orders else sort(scores))
        return orders[0]

    with mock.patch.object(adaptive_scan, "argsort_order", same_order):
        truth = [t.clone() for t in steps["gathered, reference kernels"]()]
        errors = {name: bench.relative_error(step(), truth) for name, step in steps.items()}
    if max(errors.values()) > 1e-4:
        raise SystemExit(f"{case}: results differ: {errors}")
    rows = bench.race(case, {name: bench.Checked(step, truth) for name, step in steps.items()}, truth, rounds)
    for row in rows:
        row["error"] = float(f"{errors[row['contender']]:.2g}")
        row["peak_mib"] = peak_mib("block", row["contender"])
        print(f"{case:44s} {row['contender']:28s} {row['peak_mib']:10.1f} MiB")
    return rows


def bench_step(rounds):
    """Medians of CPU seconds a step, and peak memory, for each case and net."""
    import torch

    torch.set_num_threads(1)
    rows = []
    for case, extra in CASES.items():
        steps = {net: make_step([*extra, *override]) for net, override in NETS.items()}
        times = {net: [] for net in steps}
        for number in range((rounds if extra is not PLAN else min(rounds, 3)) + 1):
            for net, (step, _) in steps.items():
                began = time.process_time()
                step()
                if number:  # the first round warms up
                    times[net].append(time.process_time() - began)
        parameters = {net: count for net, (_, count) in steps.items()}
        del steps
        for net, count in parameters.items():
            row = {"case": case, "net": net, "parameters": count, "cpu_s_per_step": round(median(times[net]), 4)}
            row["times_plain"] = round(row["cpu_s_per_step"] / median(times["plain"]), 2)
            row["peak_mib"] = peak_mib("step", case, net)
            rows.append(row)
            print(
                f"{case:56s} {net:20s} {row['cpu_s_per_step']:.3f} CPU s a step, {row['times_plain']:.2f} x plain, "
                f"{row['peak_mib']:.0f} MiB"
            )
    return rows


def bench_startup(rounds):
    """Wall seconds from the command to the line of the first step, each with a run folder of its own."""
    seconds = []
    for _ in range(min(rounds, 3)):
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


PARTS = {"startup": bench_startup, "block": bench_block, "step": bench_step}


def main():
    """Measure and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--peak-of", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        return print_peak(*options.peak_of)
    wanted = options.only.split(",")
    if unknown := sorted(set(wanted) - set(PARTS)):
        parser.error(f"--only: no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    from bestiary.kernels import backend_report
    from bestiary.shared.core.runs import environment

    sys.stdout.reconfigure(line_buffering=True)
    machine = bench.processor()  # before anything runs, for the load
    here = environment()
    here.pop("threads")
    here.pop("command")
    result = {
        "what": "an ASM block, a training step and the start-up of ASM-UNet on the CPU",
        **here,
        "processor": machine,
        "threads": 1,
        "kernels": {op: entry["uses"] for op, entry in backend_report().items()},
        **{name: PARTS[name](options.rounds) for name in wanted},
    }
    bench.save(result, options.out, wanted[0] if len(wanted) == 1 else "training")


if __name__ == "__main__":
    main()
