#!/usr/bin/env python
"""Say what works on this machine, and what to do about what does not.

    python tools/doctor.py

Runs whatever is missing, torch included. Exit status 0 if the base (Python, torch, numpy, safetensors) works.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

# The package is found from any folder and before any install.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

ROOT = Path(__file__).resolve().parents[1]
Lines = Iterator[tuple[str, str]]


def python() -> Lines:
    v = sys.version_info
    fits = (3, 11) <= v[:2] < (3, 14)
    yield "version", f"{platform.python_version()} {'' if fits else '(bestiary needs 3.11 to 3.13)'}".rstrip()
    yield "where", sys.executable
    from bestiary import __version__

    yield "bestiary", f"{__version__} in {ROOT}"


def torch() -> Lines:
    import torch

    yield "torch", torch.__version__
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            yield f"cuda:{i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}"
    else:
        built = torch.version.cuda
        yield (
            "cuda",
            f"torch is built for CUDA {built}, but no GPU is usable" if built else "torch is built without CUDA",
        )
    if getattr(torch.backends, "mps", None) and torch.backends.mps.is_available():
        yield "mps", "available"


def kernels() -> Lines:
    from bestiary.kernels.backends import backend_report, native

    settings = {"BESTIARY_KERNELS": "auto", native.ENV: "auto"}
    yield "setting", ", ".join(f"{name}={os.environ.get(name) or default}" for name, default in settings.items())
    report = backend_report()
    absent = native.why_absent()
    yield "C++ library", absent or f"{native.library(native.isa())}, for {native.isa()}"
    for op, entry in report.items():
        yield op, f"uses {entry['uses'] or 'nothing'}"
    ops: dict[tuple[str, str], list[str]] = {}
    for op, entry in report.items():
        for name, reason in entry["others"].items():
            ops.setdefault((name, reason), []).append(op)
    for (name, reason), names in ops.items():
        yield f"not {name}", f"{reason} ({'all ops' if len(names) == len(report) else ', '.join(names)})"


def requirements() -> dict[str, list[str]]:
    """Requirements by extra; the base under the empty name. From pyproject.toml, or from the installed package."""
    file = ROOT / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        return {"": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, list[str]] = {"": []}
    for line in importlib.metadata.requires("bestiary") or []:
        need, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        found.setdefault(extra[1] if extra else "", []).append(need.strip())
    return found


def lacking(needs: list[str], every: dict[str, list[str]]) -> list[str]:
    """What is missing or too old, with the reason."""
    found = []
    for need in needs:
        text, _, marker = need.partition(";")
        parts = re.match(r"\s*([\w.-]+)\s*(?:\[([^]]*)\])?\s*(.*)", text)
        if parts is None or ("linux" in marker and sys.platform != "linux"):
            continue
        name, extras, bounds = parts[1], parts[2], parts[3].strip()
        if name == "bestiary":  # dev names other extras of bestiary
            for extra in (extras or "").split(","):
                found += lacking(every.get(extra.strip(), []), every)
            continue
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(name)
            continue
        if not satisfies(installed, bounds):
            found.append(f"{name} {installed} (needs {bounds})")
    return list(dict.fromkeys(found))


def satisfies(version: str, bounds: str) -> bool:
    """Whether a version keeps `>=a,<b`; without the package `packaging`, which may be missing as well."""

    def numbers(text: str) -> list[int]:
        release = re.match(r"[\d.]*", text)
        return ([int(n) for n in release[0].split(".") if n] if release else []) + [0] * 6

    for bound in filter(None, (b.strip() for b in bounds.split(","))):
        parts = re.match(r"(>=|<=|==|<|>)\s*([\d.]+)", bound)
        if parts is None:
            continue
        have, want = numbers(version)[:4], numbers(parts[2])[:4]
        ok = {">=": have >= want, "<=": have <= want, "==": have == want, "<": have < want, ">": have > want}
        if not ok[parts[1]]:
            return False
    return True


def extras() -> Lines:
    every = requirements()
    for name, needs in every.items():
        missing = lacking(needs, every)
        label = name or "(base)"
        if missing:
            target = f".[{name}]" if name else "."
            yield label, f"missing {', '.join(missing)}"
            yield "", f"pip install -e '{target}'"
        else:
            yield label, "complete"


def assets() -> Lines:
    from bestiary.shared.data.assets import data_root, load_manifest

    yield "folder", f"{data_root()} ($BESTIARY_DATA moves it)"
    for name, asset in sorted(load_manifest().items()):
        have = f"present, {asset.licence}"
        yield name, have if asset.present else f"absent; python tools/fetch.py {name}  ({asset.download_mb:g} MB)"


def tracking() -> Lines:
    """W&B: whether credentials are there. Neither shown nor tried."""
    try:
        version = importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError:
        yield "wandb", "not installed; pip install -e '.[wandb]' (metrics.csv is written in any case)"
        return
    netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        known = "api.wandb.ai" in netrc.read_text(errors="replace")
    except OSError:
        known = False
    source = "WANDB_API_KEY is set" if os.environ.get("WANDB_API_KEY") else f"an entry in {netrc}" if known else ""
    yield "wandb", version
    yield "credentials", source or "none; `wandb login`, or WANDB_MODE=offline"
    if os.environ.get("WANDB_MODE"):
        yield "mode", os.environ["WANDB_MODE"]


def git() -> Lines:
    def ask(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout

    try:
        changed = bool(ask("status", "--porcelain", "--untracked-files=no").strip())
        yield "commit", ask("log", "-1", "--format=%h %cs %s").strip() + (" (with changes)" if changed else "")
    except (OSError, subprocess.SubprocessError):
        yield "commit", "unknown: not a git checkout, or git is not installed; results will say so"


def disk() -> Lines:
    runs = Path(os.environ.get("BESTIARY_RUNS") or ROOT / "runs").expanduser()
    data = Path(os.environ.get("BESTIARY_DATA") or Path.home() / ".cache" / "bestiary").expanduser()
    for label, path in (("runs", runs), ("data", data)):
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        usage = shutil.disk_usage(there)
        writable = "" if os.access(there, os.W_OK) else ", NOT WRITABLE"
        yield label, f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} GB in {path}{writable}"


SECTIONS: dict[str, Callable[[], Lines]] = {
    "Python": python, "Torch and devices": torch, "Kernels": kernels, "Extras": extras, "Assets": assets,
    "Tracking": tracking, "Code": git, "Disk": disk,
}  # fmt: skip


def base_problems() -> list[str]:
    """Why the base does not work; empty if it does."""
    problems = [] if (3, 11) <= sys.version_info[:2] < (3, 14) else ["Python is not 3.11 to 3.13"]
    for name in ("torch", "numpy", "safetensors"):
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken install raises whatever it likes
            problems.append(f"{name} cannot be imported ({short(error)}); pip install -e .")
    return problems


def short(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def main() -> int:
    if "-h" in sys.argv[1:] or "--help" in sys.argv[1:]:
        print(__doc__)
        return 0
    found = {}
    for title, section in SECTIONS.items():
        lines: list[tuple[str, str]] = []
        try:
            for line in section():
                lines.append(line)
        except Exception as error:  # the doctor outlives whatever it finds
            lines.append(("cannot say", short(error)))
        found[title] = lines
    problems = base_problems()
    if "--json" in sys.argv[1:]:
        print(json.dumps({"sections": found, "problems": problems}, indent=1))
        return 1 if problems else 0
    width = max(len(label) for lines in found.values() for label, _ in lines)
    for title, lines in found.items():
        print(title)
        for label, text in lines:
            print(f"  {label:<{width}}  {text}")
    print()
    print("\n".join(problems) if problems else "The base works.")
    return 1 if problems else 0


if __name__ == "__main__":
    status = 0
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # `doctor.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
