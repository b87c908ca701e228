"""What a run depends on outside its config and can be asked without torch: the checkout and the memory that is free."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bestiary.shared.core.config import repo_root


def git_commit() -> tuple[str, bool]:
    """The checkout's commit and whether it has uncommitted changes; ("unknown", False) outside a checkout."""
    root = repo_root()
    if root is None:
        return "unknown", False
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=root, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False
    # Appending a measured number to a table must not make the next number count as one of changed code.
    numbers = tuple(f"results/{name}" for name in ("measured.csv", "measured.sha256", "details.csv", "details.sha256"))
    changed = [line for line in status.stdout.splitlines() if not line.endswith(numbers)]
    return head.stdout.strip(), bool(changed)


def free_memory() -> int:
    """Bytes of main memory that a new process may take; very many where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 2**62)
