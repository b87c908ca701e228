#!/usr/bin/env python
"""The hybrid stack against transformers' nemotron_h on the same weights, on the CPU: layer, model, decoding, memory.

    python tools/bench_language.py                      # all of it, about half an hour; writes docs/benchmarks/
    python tools/bench_language.py --only decode --rounds 3
    python tools/bench_language.py --smoke --out /tmp   # tiny, to see that it runs

CPU seconds of one thread, fp32, medians of interleaved rounds. Beside each ratio stands the ceiling: what transformers
would take with its Mamba mixers at no cost; nothing that only makes the mixers faster gets beyond it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch

from bestiary.shared.language.hybrid.layout import Layout
from bestiary.shared.language.hybrid.model import HybridLM
from bestiary.shared.testing import bench

SIZES = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 16,
    "mamba_head_dim": 32,
    "n_groups": 4,
    "ssm_state_size": 64,
    "chunk_size": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 512,
}
HYBRID, MOE = "M-M*-M-", "MEME*E"
TARGETS = (
    # case, least ratio of transformers' time to ours
    ("layer M fwd", 3.0),
    ("layer M fwd+bwd", 3.0),
    (f"{HYBRID} fwd", 2.0),
    (f"{HYBRID} fwd+bwd", 2.0),
    (f"{HYBRID} decode, batch 16", 8.0),
    (f"{HYBRID} decode, batch 1", 4.0),
    (f"{MOE} fwd", 1.3),
    (f"{MOE} fwd+bwd", 1.3),
)


class Free(torch.nn.Module):
    """A mixer at no cost."""

    def forward(self, hidden_states, **_):
        return hidden_states


def pair(pattern):
    """The model of transformers, ours with its weights, and the first without the cost of Mamba mixers."""
    from transformers import NemotronHConfig, NemotronHForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    theirs = NemotronHForCausalLM(NemotronHConfig(hybrid_override_pattern=pattern, **SIZES)).eval()
    ours = HybridLM({"pattern": pattern, **SIZES, "vocab_size": 262, "transformers_clamp": True}).eval()
    # The byte tokenizer has 262 tokens; the embedding and the head are cut to transformers' 256.
    ours.embeddings = torch.nn.Embedding(SIZES["vocab_size"], SIZES["hidden_size"])
    ours.lm_head = torch.nn.Linear(SIZES["hidden_size"], SIZES["vocab_size"], bias=False)
    ours.load_state_dict({name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()})
    free = NemotronHForCausalLM(theirs.config).eval()
    for layer in free.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer = Free()
    return theirs, ours, free


def gradients(run, modules, x):
    """Forward and backward, the gradients of all parameters and of ``x`` by name; a fixed weight on the output."""
    kept = []

    def step():
        for module in modules:
            module.zero_grad(set_to_none=True)
        x.grad = None
        y = run()
        if not kept:
            kept.append(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        (y * kept[0]).sum().backward()
        named = [(n, p.grad) for m in modules for n, p in m.named_parameters() if p.grad is not None]
        return [y.detach(), *[g for _, g in sorted(named, key=lambda pair: pair[0].removeprefix("model."))]]

    return step


def no_grad(run):
    def step():
        with torch.no_grad():
            return [run()]

    return step


def bench_layer(options):
    """One Mamba-2 mixer alone."""
    theirs, ours, _ = pair("M")
    x = torch.randn(1, options.tokens, SIZES["hidden_size"])
    layout = Layout(1, options.tokens, 0, x.device)
    run = {
        "ours": (lambda: ours.layers[0].mixer(x, layout), [ours.layers[0].mixer]),
        "transformers": (lambda: theirs.model.layers[0].mixer(x), [theirs.model.layers[0].mixer]),
    }
    return race_both("layer M", run, x, options)


def bench_model(options):
    """Whole models, forward and backward."""
    rows = []
    for pattern in (HYBRID, MOE):
        theirs, ours, free = pair(pattern)
        ids = torch.randint(0, 256, (1, options.tokens))
        run = {
            "ours": (lambda ours=ours, ids=ids: ours(ours.embed(ids))[0], [ours]),
            "transformers": (lambda theirs=theirs, ids=ids: theirs(ids, use_cache=False).logits, [theirs]),
            "ceiling": (lambda free=free, ids=ids: free(ids, use_cache=False).logits, [free]),
        }
        rows += race_both(pattern, run, torch.zeros(1), options)
    return rows


def race_both(case, run, x, options):
    """Forward, then with backward; the ceiling computes something else and is not checked."""
    rows = []
    for name, wrap in (
        ("fwd", lambda f, modules: no_grad(f)),
        ("fwd+bwd", lambda f, modules: gradients(f, modules, x)),
    ):
        contenders = {who: wrap(f, modules) for who, (f, modules) in run.items()}
        truth = [t.clone() for t in contenders["transformers"]()]
        if "ceiling" in contenders:
            contenders["ceiling"] = bench.Checked(contenders["ceiling"], truth)
        rows += bench.race(f"{case} {name}", contenders, truth, options.rounds, tolerance=2e-3)
    return rows


def steps_of(model, prompt, tokens):
    """A function that decodes all ``tokens`` one by one, and goes on from there when it is called again."""
    state = {}

    @torch.no_grad()
    def ours():
        if not state:
            state["cache"] = model.new_cache(len(prompt))
            model(model.embed(prompt), cache=state["cache"])
        return [torch.cat([model(model.embed(t), cache=state["cache"])[0] for t in tokens], 1)]

    @torch.no_grad()
    def transformers():
        if not state:
            out = model(prompt, use_cache=True)
            name = "cache" if hasattr(out, "cache") else "past_key_values"  # renamed in 5.24
            state[name] = getattr(out, name)
        return [torch.cat([model(t, use_cache=True, **state).logits for t in tokens], 1)]

    return ours if isinstance(model, HybridLM) else transformers


def bench_decode(options):
    """Single steps behind a prompt of 64 tokens; every call goes on from the last."""
    rows = []
    for batch in (16, 1):
        models = dict(zip(("transformers", "ours", "ceiling"), pair(HYBRID), strict=True))
        prompt = torch.randint(0, 256, (batch, 64))
        tokens = torch.randint(0, 256, (options.steps, batch, 1))
        runs = {name: steps_of(models[name], prompt, tokens) for name in ("ours", "transformers", "ceiling")}
        first = {name: run() for name, run in runs.items()}  # prefill, and the first steps, which are compared
        error = bench.relative_error(first["ours"], first["transformers"])
        if error > 1e-3:
            raise SystemExit(f"decoding is wrong by {error:.1e}: no time")
        truth = first["transformers"]
        contenders = {name: bench.Checked(run, truth) for name, run in runs.items()}
        found = bench.race(f"{HYBRID} decode, batch {batch}", contenders, truth, options.rounds)
        rows += [row | {"error": float(f"{error:.2g}"), "steps": options.steps} for row in found]
    return rows


def bench_peak(options):
    """How far memory grows in one forward and backward pass, each model in a process of its own."""
    rows = []
    for pattern in (HYBRID, MOE):
        sizes = {}
        for who in ("ours", "transformers"):
            command = [sys.executable, __file__, "--peak-of", who, pattern, *options.passed]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            sizes[who] = int(out.split()[-1])
            rows.append({"case": f"{pattern} peak", "contender": who, "peak_mib": round(sizes[who] / 2**20, 1)})
        share = sizes["ours"] / sizes["transformers"]
        print(f"{pattern} peak: ours {sizes['ours'] / 2**20:.0f} MiB, {share:.2f} of transformers'")
    return rows


def peak_of(options):
    who, pattern = options.peak_of
    torch.set_num_threads(1)
    theirs, ours, _ = pair(pattern)
    ids = torch.randint(0, 256, (1, options.tokens))

    def step():
        logits = ours(ours.embed(ids))[0] if who == "ours" else theirs(ids, use_cache=False).logits
        logits.square().mean().backward()

    step()  # the gradients are there from now on
    print(bench.peak_bytes(step))


def bench_long(options):
    """Long prompts in chunks: the states stay as they are, keys and values grow; and a stream without attention."""
    from omegaconf import OmegaConf

    from bestiary.shared.core.config import conf_dir

    node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "backbone" / "hybrid_tiny.yaml"))
    shape = {key: value for key, value in node["config"].items() if key != "_target_"}
    rows = []
    cases = (("prefill", shape["pattern"], options.prefill, 1024), ("stream", "M-M-M-", options.stream, 4096))
    torch.set_num_threads(1)
    for name, pattern, total, chunk in cases:
        torch.manual_seed(0)
        lm = HybridLM({**shape, "pattern": pattern}).eval()
        cache, began, mark = lm.new_cache(1), time.process_time(), chunk
        with torch.no_grad():
            for start in range(0, total, chunk):
                ids = torch.randint(0, 256, (1, min(chunk, total - start)))
                logits, _, _ = lm(lm.embed(ids), cache=cache, logits_to_keep=1)
                if cache.length >= mark or cache.length == total:
                    sizes = cache.bytes()
                    row = {
                        "case": f"{name} {pattern}, chunks of {chunk}",
                        "tokens": cache.length,
                        "cpu_s": round(time.process_time() - began, 2),
                        "state_kib": round(sizes["states"] / 1024, 1),
                        "key_value_kib": round(sizes["key_values"] / 1024, 1),
                        "resident_mib": bench.resident_bytes() >> 20,
                        "finite": bool(torch.isfinite(logits).all()),
                    }
                    rows.append(row)
                    print("  ".join(f"{key} {value}" for key, value in row.items()))
                    mark *= 4
    return rows


BENCHES = {
    "layer": bench_layer,
    "model": bench_model,
    "decode": bench_decode,
    "peak": bench_peak,
    "long": bench_long,
}


def targets(rows):
    """What was asked, what was found, and our share of the ceiling."""
    times = {(row["case"], row["contender"]): row.get("cpu_ms") for row in rows if "contender" in row}
    found = []
    for case, least in TARGETS:
        ours, theirs, free = (times.get((case, who)) for who in ("ours", "transformers", "ceiling"))
        ratio = round(theirs / ours, 2) if ours and theirs else None
        row = {"target": f"{case}: transformers / ours", "goal": f">= {least}", "found": ratio}
        row["met"] = None if ratio is None else ratio >= least
        if ratio and free:
            row["ceiling"] = round(theirs / free, 2)
            row["share_of_ceiling"] = round(free / ours, 2)
        found.append(row)
    peaks = {(row["case"], row["contender"]): row["peak_mib"] for row in rows if "peak_mib" in row}
    for pattern in (HYBRID, MOE):
        ours, theirs = (peaks.get((f"{pattern} peak", who)) for who in ("ours", "transformers"))
        share = round(ours / theirs, 2) if ours and theirs else None
        row = {"target": f"{pattern} peak: ours / transformers", "goal": "<= 0.5", "found": share}
        found.append(row | {"met": None if share is None else share <= 0.5})
    states = [row["state_kib"] for row in rows if "state_kib" in row and row["case"].startswith("prefill")]
    flat = len(set(states)) == 1 if states else None
    found.append(
        {"target": "prefill: states as large at the end as at the start", "goal": "equal", "found": flat, "met": flat}
    )
    return found


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(BENCHES), help=f"some of {', '.join(BENCHES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--smoke", action="store_true", help="tiny inputs, to see that the script runs")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := sorted(set(options.only) - set(BENCHES)):
        parser.error(f"--only: no {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    sizes = (64, 2, 4096, 16384) if options.smoke else (2048, 16, 2**17, 2**20)
    options.tokens, options.steps, options.prefill, options.stream = sizes
    options.passed = ["--smoke"] if options.smoke else []
    return options


def main():
    """Measure, print the table of targets and write the JSON file."""
    options = parse()
    if options.peak_of:
        return peak_of(options)
    import transformers

    from bestiary.kernels import backend_report
    from bestiary.shared.core.runs import environment

    machine = bench.processor()  # before anything runs, for the load
    sys.stdout.reconfigure(line_buffering=True)
    rows = [row for name in options.only for row in BENCHES[name](options)]
    result = environment()
    result.pop("threads")
    result.pop("command")
    result = {
        "what": "the hybrid stack against transformers' nemotron_h on the CPU, fp32: CPU ms with one thread, medians",
        **result,
        "transformers": transformers.__version__,
        "processor": machine,
        "rounds": options.rounds,
        "sizes": SIZES,
        "kernels": {op: entry["uses"] for op, entry in backend_report().items()},
        "rows": rows,
        "targets": targets(rows),
    }
    for row in result["targets"]:
        verdict = {None: "not measured", True: "met", False: "NOT MET"}[row["met"]]
        ceiling = f", ceiling {row['ceiling']}, ours {row['share_of_ceiling']} of it" if "ceiling" in row else ""
        print(f"{row['target']:52s} {row['goal']:>8s} {row['found']!s:>8} {verdict}{ceiling}")
    bench.save(result, options.out, "language")


if __name__ == "__main__":
    main()
