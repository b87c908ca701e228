"""Timing on a shared machine: contenders take turns, CPU seconds of one thread, medians, and nothing wrong is timed."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

Outputs = Sequence[torch.Tensor]


def relative_error(found: Outputs, truth: Outputs) -> float:
    """The largest error of any tensor relative to the largest value of its truth."""
    worst = 0.0
    for a, b in zip(found, truth, strict=True):
        if a.shape != b.shape:
            return float("inf")
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
        worst = max(worst, float(error) if torch.isfinite(error) else float("inf"))
    return worst


class Checked:
    """Runs something whose result was checked in another way, and answers with what :func:`race` wants to see."""

    def __init__(self, run: Callable[[], Any], truth: Outputs) -> None:
        self.run, self.truth = run, truth

    def __call__(self) -> Outputs:
        self.run()
        return self.truth


def race(
    case: str,
    contenders: dict[str, Callable[[], Outputs]],
    truth: Outputs,
    rounds: int,
    tolerance: float = 1e-4,
    repeat: int = 1,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Check every contender, then time those that are right, each once a round.

    Args:
        case: what is measured.
        contenders: functions that return what they computed; the first is the one that others are compared with.
        truth: what they should return.
        rounds: measurements of each, of which medians are given.
        tolerance: largest allowed :func:`relative_error`.
        repeat: calls for each measurement, for what is over in less than the clock's steps.
        say: where the lines go.

    Returns:
        A row for each: CPU milliseconds with one thread, wall milliseconds with two, how many times the first's CPU
        time that is, and the error. A contender that is wrong has ``"check": "red"`` and no times.
    """
    torch.set_num_threads(1)
    rows = {}
    for name, run in contenders.items():
        error = relative_error(run(), truth)
        rows[name] = {"case": case, "contender": name, "error": float(f"{error:.2g}")}
        rows[name]["check"] = "green" if error <= tolerance else "red"
    good = {name: run for name, run in contenders.items() if rows[name]["check"] == "green"}
    for key, threads, clock in (("cpu_ms", 1, time.process_time), ("wall_2_threads_ms", 2, time.perf_counter)):
        torch.set_num_threads(threads)
        times: dict[str, list[float]] = {name: [] for name in good}
        for number in range(rounds + 1):
            for name, run in good.items():
                began = clock()
                for _ in range(repeat):
                    run()
                if number:  # the first round warms up
                    times[name].append((clock() - began) / repeat * 1e3)
        for name, values in times.items():
            rows[name][key] = round(median(values), 4)
            rows[name][key.replace("_ms", "_min_ms")] = round(min(values), 4)
    torch.set_num_threads(1)
    first = rows[next(iter(contenders))].get("cpu_ms")
    for row in rows.values():
        if "cpu_ms" in row and first:
            row["times_first"] = round(row["cpu_ms"] / first, 2)
        say(_line(row))
    return list(rows.values())


def _line(row: dict[str, Any]) -> str:
    head = f"{row['case']:44s} {row['contender']:28s}"
    if row["check"] == "red":
        return f"{head} WRONG by {row['error']:.1e}: no time"
    factor = f"{row['times_first']:8.2f} x" if "times_first" in row else ""
    return f"{head} {row['cpu_ms']:10.3f} ms CPU {row['wall_2_threads_ms']:10.3f} ms wall (2 threads) {factor}"


def save(result: dict[str, Any], folder: Path, name: str) -> None:
    """Write ``folder/<name>_<date>.json`` and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}_{result['date'][:10]}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(file)


def peak_bytes(run: Callable[[], Any]) -> int:
    """How far the resident memory of this process grows while ``run`` runs; Linux alone. Warm ``run`` up first."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM") - before
    del kept
    return peak


def resident_bytes() -> int:
    """Resident memory of this process; Linux alone."""
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def processor() -> dict[str, Any]:
    """The model, the cores, and those instruction sets that decide how fast it can be."""
    try:
        text = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        text = ""
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    flags = lines.get("Flags", "").split()
    return {
        "model": lines.get("Model name", platform.processor()).strip(),
        "cores": os.cpu_count(),
        "caches": {
            name: value.strip() for name, value in lines.items() if name.strip().startswith(("L1d", "L2", "L3"))
        },
        "flags": [f for f in flags if f.startswith(("avx", "fma", "amx", "f16c", "sse4"))],
        "load": os.getloadavg()[0],
    }


def roofs(repetitions: int = 2_000_000, tries: int = 5) -> dict[str, Any] | str:
    """What one core's arithmetic can do in registers, by the instruction set in use; csrc/roof.h.

    Returns:
        fp32 multiply-add operations and state steps of the selective scan a second, or "not measured".
    """
    from bestiary.kernels.backends import native

    if native.why_absent() is not None:
        return "not measured"
    roof = getattr(native.ops(), "roof", None)
    if roof is None:
        return "not measured"
    lanes = native.lanes()
    best = [min(float(roof(kind, repetitions)) for _ in range(tries)) for kind in (0, 1)]
    return {
        "isa": native.isa(),
        "fma_gflops": round(2 * 24 * lanes * repetitions / best[0] / 1e9, 1),
        "scan_gsteps": round(16 * lanes * repetitions / best[1] / 1e9, 2),
    }
