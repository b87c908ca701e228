"""The commit and the free memory, asked for without torch."""

from __future__ import annotations

import os
import subprocess

import pytest

from bestiary.shared.core import machine


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with code and measurements, taken for this one."""
    results = tmp_path / "projects" / "p" / "results"
    results.mkdir(parents=True)
    for name in ("measured.csv", "measured.sha256", "details.csv", "details.sha256"):
        (results / name).write_text("a\n")
    (tmp_path / "code.py").write_text("a = 1\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(machine, "repo_root", lambda: tmp_path)
    return tmp_path


def test_new_measurements_are_no_changed_code(checkout):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    assert machine.git_commit() == (head.stdout.strip(), False)
    for name in ("measured.csv", "measured.sha256", "details.csv", "details.sha256"):
        (checkout / "projects" / "p" / "results" / name).write_text("a\nb\n")
    (checkout / "untracked.py").write_text("")
    assert machine.git_commit()[1] is False
    (checkout / "code.py").write_text("a = 2\n")
    assert machine.git_commit() == (head.stdout.strip(), True)


def test_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "repo_root", lambda: None)
    assert machine.git_commit() == ("unknown", False)
    monkeypatch.setattr(machine, "repo_root", lambda: tmp_path)
    assert machine.git_commit() == ("unknown", False)


def test_free_memory_is_less_than_all():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < machine.free_memory() < total or machine.free_memory() == 2**62
