"""Measure the kernels against what else runs on a CPU, and say which targets they meet.

    python tools/bench_kernels.py [--only scan,order,peak,ssd,conv,update,step,norm,isa] [--rounds 5] [--peers FOLDER]

CPU time of one thread and wall time of two, the contenders interleaved in each round, medians; a contender whose result
is wrong gets no time. Writes kernels_<date>.json. Run it on a quiet machine: nothing else may use the cores.

mambapy is compared with if --peers names a folder that it lies in, or if it is installed:
pip install --no-deps --target FOLDER mambapy.
"""

import argparse
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bestiary.kernels import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_chunk_scan_combined,
    rms_norm_gated,
    selective_scan_fn,
    selective_state_update,
)
from bestiary.kernels.backends import native
from bestiary.shared.testing import bench, peers
from bestiary.shared.testing.peers import with_gradients, without_gradients

SCANS = [(2, 192, 4096, 16), (1, 64, 32768, 16)]
SSDS = [(1, 2048, 32, 64, 128, 1), (1, 2048, 32, 64, 128, 8)]
CONVS = [(2, 192, 4096), (1, 4352, 2048), (1, 64, 32768)]
UPDATE = (1, 128, 64, 128, 8)  # Nemotron-H-8B's layer
STEPS, NORMS = [(16, 1024), (1, 4352)], [(1, 2048, 512, 4), (1, 2048, 8192, 8)]
SIZES = {"scan": SCANS, "ssd": SSDS, "conv": CONVS, "update": UPDATE, "step": STEPS, "norm": NORMS}
SMOKE = dict(scan=[(1, 8, 64, 4)], ssd=[(1, 64, 4, 8, 16, 2)], conv=[(1, 8, 64)], update=(1, 4, 8, 16, 2))
SMOKE |= dict(step=[(2, 24)], norm=[(1, 8, 24, 2)])
CHUNK = "torch.compile, 32 steps"
PSCAN = "transformers + mambapy pscan"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape) + sum(shape)))


def doubles(inputs):
    return [t.double() for t in inputs]


def both_ways(case, runs, reference, inputs, options, tolerance=1e-4):
    """Forward, and forward and backward; runs that are None are of libraries that are missing."""
    rows = []
    for name, wrap in (("fwd", without_gradients), ("fwd+bwd", with_gradients)):
        wrapped = {key: wrap(run, inputs) for key, run in runs.items() if run is not None}
        rows += bench.race(f"{case} {name}", wrapped, wrap(reference, doubles(inputs))(), options.rounds, tolerance)
    return rows


# --- the scan ----------------------------------------------------------------------------------------------------


def scan_inputs(shape, channel_last=False):
    batch, D, L, N = shape
    rows = [randn(batch, L, E, seed=i).transpose(1, 2) for i, E in enumerate((D, D, N, N, D))]
    u, delta, B, C, z = rows if channel_last else [t.contiguous() for t in rows]
    A = -torch.arange(1.0, N + 1).repeat(D, 1)
    return [u, 0.5 * delta, A, B, C, randn(D), z, randn(D, seed=1) - 3]


def scan(backend=None, **options):
    def run(u, delta, A, B, C, D, z, bias):
        return selective_scan_fn(u, delta, A, B, C, D, z, bias, True, backend=backend, **options)

    return run


def scan_contenders(backward):
    """Name and function; None where a library is missing."""
    found = {"ours": scan()}
    if not backward:  # the loops' backward is quadratic in L, and inductor compiles the chunk's for minutes
        found["one step a token (mamba-ssm's ref)"] = peers.scan_loop
        found["transformers, slow loop"] = peers.transformers_scan(False)
        found[CHUNK] = peers.compiled_scan()
    found[PSCAN] = peers.transformers_scan(True)
    return {name: run for name, run in found.items() if run is not None}


def bench_scan(options):
    rows = []
    for shape in options.scans:
        inputs = scan_inputs(shape)
        for name, wrap in (("fwd", without_gradients), ("fwd+bwd", with_gradients)):
            truth = wrap(scan("reference"), doubles(inputs))()
            runs = {key: wrap(run, inputs) for key, run in scan_contenders(name != "fwd").items()}
            rows += bench.race(f"scan {shape} {name}", runs, truth, options.rounds, 2e-4)
    return rows


def bench_order(options):
    rows = []
    for shape in options.scans:
        inputs = scan_inputs(shape, channel_last=True)
        g = torch.Generator().manual_seed(0)
        order = torch.stack([torch.randperm(shape[2], generator=g) for _ in range(shape[0])])
        for name, wrap in (("fwd", without_gradients), ("fwd+bwd", with_gradients)):
            truth = wrap(scan("reference", scan_order=order), doubles(inputs))()
            runs = {
                "ours, order fused": wrap(scan(scan_order=order), inputs),
                "ours, gather + scan + scatter": wrap(peers.gathered(scan(), order), inputs),
            }
            case = f"order {shape} {name}"
            plain = wrap(scan("reference"), doubles(inputs))()
            # one race, so that they are interleaved: the plain scan has another truth, so its own is checked here
            error = bench.relative_error(wrap(scan(), inputs)(), plain)
            if error <= 2e-4:
                free = wrap(scan(), inputs)
                runs["ours, no order"] = bench.Checked(free, truth)
            rows += bench.race(case, runs, truth, options.rounds, 2e-4)
    return rows


def bench_peak(options):
    """Peak memory of forward and backward, each in a process of its own."""
    rows = []
    for index, shape in enumerate(options.scans):
        inputs = scan_inputs(shape)
        grads = sum(t.numel() * 4 for t in inputs)
        for name in scan_contenders(True):
            command = [sys.executable, __file__, "--peak-of", f"{index}:{name}", *options.passed]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                print(result.stderr[-2000:], file=sys.stderr)
                continue
            peak = int(result.stdout.split()[-1])
            row = {"case": f"peak {shape} fwd+bwd", "contender": name, "peak_mib": round(peak / 2**20, 1)}
            row["input_grads_mib"] = round(grads / 2**20, 1)
            row["times_grads_and_quarter"] = round(peak / (1.25 * grads), 2)
            rows.append(row)
            print(f"{row['case']:44s} {name:28s} {row['peak_mib']:10.1f} MiB, gradients {row['input_grads_mib']} MiB")
    return rows


def peak_of(options):
    index, name = options.peak_of.split(":", 1)
    inputs = scan_inputs(options.scans[int(index)])
    torch.set_num_threads(1)
    run = scan_contenders(True)[name]
    step = with_gradients(run, inputs)
    step()  # makes the gradient of the output, which is no part of the peak
    print(bench.peak_bytes(step))


# --- the other ops -----------------------------------------------------------------------------------------------


def ssd(x, dt, A, B, C, D, bias, backend=None):
    return mamba_chunk_scan_combined(x, dt, A, B, C, 64, D, dt_bias=bias, dt_softplus=True, backend=backend)


def ssd_work(shape, chunk=64):
    """Floating-point operations of the forward's matrix products in chunks, their triangles counted once."""
    batch, L, H, P, N, G = shape
    return 2 * batch * L * (H * (2 * N * P + chunk // 2 * P) + G * chunk // 2 * N)


def bench_ssd(options):
    rows = []
    for shape in options.ssds:
        batch, L, H, P, N, G = shape
        x, dt, B, C = randn(batch, L, H, P), randn(batch, L, H), randn(batch, L, G, N), randn(batch, L, G, N, seed=1)
        inputs = [x, 0.5 * dt, -torch.linspace(1, 16, H), B / N**0.5, C, randn(H), randn(H, seed=1) - 3]
        reference = partial(ssd, backend="reference")
        runs = {"ours": ssd, "ours, reference": reference, "transformers": peers.transformers_ssd(64)}
        rows += both_ways(f"ssd {shape}", runs, reference, inputs, options, 2e-4)
    return rows


def conv_inputs(shape, channel_last=False):
    x = randn(shape[0], shape[2], shape[1]).transpose(1, 2)
    return [x if channel_last else x.contiguous(), randn(shape[1], 4), randn(shape[1])]


def conv(x, weight, bias):
    return causal_conv1d_fn(x, weight, bias, activation="silu")


def bench_conv(options):
    rows = []
    for shape in options.convs:
        for layout in ("contiguous", "channel-last"):
            inputs = conv_inputs(shape, layout != "contiguous")
            runs = {"ours": conv, "F.conv1d + silu": peers.oned_conv}
            rows += both_ways(f"conv {shape} {layout}", runs, peers.oned_conv, inputs, options)
    return rows


def bench_update(options):
    batch, H, P, N, G = options.update
    state, room = randn(batch, H, P, N), torch.empty(batch, H, P, N)
    A = (-torch.linspace(1, 16, H))[:, None, None].expand(H, P, N)
    dt, bias = randn(batch, H)[..., None].expand(batch, H, P), (randn(H) - 3)[:, None].expand(H, P)
    D, x = randn(H)[:, None].expand(H, P), randn(batch, H, P, seed=1)
    B, C = randn(batch, G, N), randn(batch, G, N, seed=1)

    def step(state, x, *rest, backend=None):
        steps = dict(dt_bias=bias.to(x.dtype), dt_softplus=True, backend=backend)
        return [selective_state_update(state, x, *rest, **steps), state]

    rest = [x, dt, A, B, C, D]
    truth = step(state.double(), *doubles(rest), backend="reference")
    error = bench.relative_error(step(state.clone(), *rest), truth)
    if error > 1e-5:
        print(f"update {options.update}: WRONG by {error:.1e}: no time")
        return [{"case": f"update {options.update}", "contender": "ours", "check": "red", "error": error}]
    runs = {"ours": lambda: step(state, *rest), "a copy of the state": lambda: room.copy_(state)}
    runs = {key: bench.Checked(run, truth) for key, run in runs.items()}
    if native.why_absent() is None:  # without what Python costs: about 60 microseconds a call
        raw = (state, *rest, None, bias, True, None, torch.empty_like(x))
        runs["ours, the C++ alone"] = bench.Checked(lambda: native.ops().state_update(*raw), truth)
    with torch.no_grad():
        return bench.race(f"update {options.update}", runs, truth, options.rounds, repeat=50)


def bench_step(options):
    """A step of the convolution. The state holds the new input thrice, so that a step leaves it as it is."""

    def step(x, state, weight, bias, backend=None):
        return causal_conv1d_update(x, state, weight, bias, "silu", backend=backend)

    rows = []
    for shape in options.steps:
        x, *rest = randn(*shape), randn(shape[1], 4), randn(shape[1])
        for layout, state in (("contiguous", torch.stack([x] * 3, 2)), ("channel-last", torch.stack([x] * 3, 1))):
            inputs = [x, state if layout == "contiguous" else state.transpose(1, 2), *rest]
            truth = without_gradients(partial(step, backend="reference"), doubles(inputs))()
            runs = {"ours": step, "ours, reference": partial(step, backend="reference")}
            runs = {key: without_gradients(run, inputs) for key, run in runs.items()}
            rows += bench.race(f"step {shape} {layout}", runs, truth, options.rounds, 1e-5, repeat=50)
    return rows


def bench_norm(options):
    """The gate first; it is a slice of a wider projection."""
    rows = []
    for *shape, F, groups in options.norms:
        inputs = [randn(*shape, F), randn(F), randn(*shape, 2 * F)[..., :F]]
        norm = partial(rms_norm_gated, eps=1e-5, group_size=F // groups, norm_before_gate=False)
        reference = partial(norm, backend="reference")
        runs = {"ours": norm, "ours, reference": reference}
        rows += both_ways(f"norm {(*shape, F, groups)}", runs, reference, inputs, options)
    return rows


def bench_isa(options):
    def under(name, run):
        def step():
            with mock.patch.dict(os.environ, {native.ENV_ISA: name}):
                return run()

        return step

    rows = []
    for shape in options.scans[:1]:
        inputs = scan_inputs(shape)
        for name, wrap in (("fwd", without_gradients), ("fwd+bwd", with_gradients)):
            truth = wrap(scan("reference"), doubles(inputs))()
            runs = {isa: under(isa, wrap(scan(), inputs)) for isa in native.isas()}
            rows += bench.race(f"isa scan {shape} {name}", runs, truth, options.rounds, 2e-4)
    for shape in options.convs[:1]:
        inputs = conv_inputs(shape)
        truth = without_gradients(peers.oned_conv, doubles(inputs))()
        runs = {isa: under(isa, without_gradients(conv, inputs)) for isa in native.isas()}
        rows += bench.race(f"isa conv {shape} fwd", runs, truth, options.rounds)
    return rows


# --- targets and the file ----------------------------------------------------------------------------------------


def targets(rows, options, roofs):
    """Each target with what was found; None where it was not measured."""
    cpu = {(row["case"], row["contender"]): row.get("cpu_ms") for row in rows}
    found = []

    def ratio(label, case, a, b, least=None, most=None):
        over, under = cpu.get((case, a)), cpu.get((case, b))
        value = round(over / under, 2) if over and under else None
        add(label, value, least, most)

    def add(label, value, least=None, most=None):
        goal = f">= {least}" if least is not None else f"<= {most}"
        met = None if value is None else (value >= least if least is not None else value <= most)
        found.append({"target": label, "goal": goal, "found": value, "met": met})

    def of_roof(label, case, work, roof, least):
        ms = cpu.get((case, "ours"))
        value = round(work / (ms / 1e3) / 1e9 / roofs[roof], 2) if ms and isinstance(roofs, dict) else None
        add(label, value, least)

    shape = options.scans[0]
    case = f"scan {shape}"
    of_roof("scan fwd, state steps over the roof's", f"{case} fwd", math.prod(shape), "scan_gsteps", 0.4)
    ratio("scan fwd, one step a token", f"{case} fwd", "one step a token (mamba-ssm's ref)", "ours", 50)
    ratio("scan fwd, torch.compile", f"{case} fwd", CHUNK, "ours", 7)
    ratio("scan fwd+bwd, pscan", f"{case} fwd+bwd", PSCAN, "ours", 50)
    for shape in options.scans:
        peaks = [r for r in rows if r["case"] == f"peak {shape} fwd+bwd" and r["contender"] == "ours"]
        value = peaks[0]["times_grads_and_quarter"] if peaks else None
        add(f"peak {shape} over 1.25 x gradients", value, most=1.3)
        case = f"order {shape} fwd"
        ratio(f"order {shape}, over plain", case, "ours, order fused", "ours, no order", most=1.5)
        ratio(f"order {shape}, over copies", case, "ours, order fused", "ours, gather + scan + scatter", most=0.5)
    for shape in options.ssds:
        least = 10 if shape[-1] == 1 else 8
        ratio(f"ssd {shape} fwd, transformers", f"ssd {shape} fwd", "transformers", "ours", least)
        of_roof(f"ssd {shape} fwd, of the FMA peak", f"ssd {shape} fwd", ssd_work(shape), "fma_gflops", 0.4)
        ratio(f"ssd {shape} fwd+bwd, transformers", f"ssd {shape} fwd+bwd", "transformers", "ours", 8)
    for shape in options.convs:
        for layout in ("contiguous", "channel-last"):
            for name, least in (("fwd", 3.5), ("fwd+bwd", 4)):
                case = f"conv {shape} {layout} {name}"
                ratio(f"{case}, F.conv1d", case, "F.conv1d + silu", "ours", least)
    ratio("state update over a copy", f"update {options.update}", "ours", "a copy of the state", most=1.5)
    ratio("scan fwd, AVX2 over AVX-512", f"isa scan {options.scans[0]} fwd", "avx2", "avx512", most=2.2)
    return found


BENCHES = dict(scan=bench_scan, order=bench_order, peak=bench_peak, ssd=bench_ssd, conv=bench_conv, update=bench_update)
BENCHES |= dict(step=bench_step, norm=bench_norm, isa=bench_isa)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(BENCHES), help=f"some of {', '.join(BENCHES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--peers", type=Path, help="a folder with mambapy")
    parser.add_argument("--smoke", action="store_true", help="tiny inputs, to see that the script runs")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.only = options.only.split(",")
    unknown = set(options.only) - set(BENCHES)
    if unknown:
        parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    sizes = (SMOKE if options.smoke else SIZES).values()
    options.scans, options.ssds, options.convs, options.update, options.steps, options.norms = sizes
    options.passed = ["--smoke"] if options.smoke else []
    if options.peers:
        sys.path.insert(0, str(options.peers.resolve()))
        options.passed += ["--peers", str(options.peers)]
    return options


def main():
    """Measure, print the table of targets and write the JSON file."""
    options = parse()
    if options.peak_of:
        return peak_of(options)
    from bestiary.kernels import backend_report
    from bestiary.shared.core.runs import environment

    machine = bench.processor()  # before anything runs, for the load
    before = bench.roofs()
    sys.stdout.reconfigure(line_buffering=True)
    rows = []
    for name in options.only:
        rows += BENCHES[name](options)
    roofs = bench.roofs()
    if isinstance(before, dict):  # the machine is not equally fast at all times: the better of two
        roofs = {key: max(value, before[key]) for key, value in roofs.items()}
    result = environment()
    result.pop("threads")
    result = {
        "what": "the kernels on the CPU: CPU ms with one thread, wall ms with two, medians",
        **result,
        "processor": machine,
        "rounds": options.rounds,
        "kernels": {op: entry["uses"] for op, entry in backend_report().items()},
        "roofs": roofs,
        "rows": rows,
        "targets": targets(rows, options, roofs),
    }
    print(f"roofs: {roofs}")
    for row in result["targets"]:
        verdict = {None: "not measured", True: "met", False: "NOT MET"}[row["met"]]
        print(f"{row['target']:58s} {row['goal']:>8s} {row['found'] if row['found'] is not None else '-':>8} {verdict}")
    bench.save(result, options.out, "kernels")


if __name__ == "__main__":
    main()
