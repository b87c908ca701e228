"""tools/new_project.py: what it writes trains, passes its tests and obeys the house, in a copy of the repository."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLACEHOLDER = re.compile(r"@[A-Z_]+@")
TEXT, SEG = "my_lm", "my_net"
# The shortest and the longest name: neither may change how ruff formats the generated code.
EDGES = {"ab": "text", "cd": "seg", "a_language_model_of_30_letters": "text", "a_segmenting_net_of_30_letters": "seg"}


@pytest.fixture(scope="module")
def module(root):
    spec = importlib.util.spec_from_file_location("new_project_script", root / "tools" / "new_project.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def copy(root, tmp_path_factory) -> Path:
    """The files of the checkout as git knows them, symlinks kept."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("this is no git checkout, and git alone knows which files belong to it")
    target = tmp_path_factory.mktemp("checkout")
    for name in filter(None, listing.stdout.split("\0")):
        if (root / name).is_symlink() or (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def inside(copy, clean_env, tmp_path_factory):
    """`inside("tools/x.py", …)` runs Python in the copy."""
    env = clean_env(BESTIARY_RUNS=str(tmp_path_factory.mktemp("runs")))

    def run(*args: str) -> str:
        result = subprocess.run(
            [sys.executable, *args], cwd=copy, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


@pytest.fixture(scope="module")
def commands(inside) -> dict[str, list[list[str]]]:
    """Both tasks and the edge names, generated into the copy: name to the commands that are printed at the end."""
    printed = {
        TEXT: inside("tools/new_project.py", TEXT),
        SEG: inside("tools/new_project.py", SEG, "--task", "seg", "--title", 'A "net": x\\y', "--arxiv", "2508.07237"),
    }
    for name, task in EDGES.items():
        inside("tools/new_project.py", name, "--task", task)
    return {
        name: [shlex.split(line, comments=True) for line in text.partition("Next:\n")[2].splitlines()[:3]]
        for name, text in printed.items()
    }


def run_printed(name, commands, inside, copy):
    train, tests, what_is_left = commands[name]
    assert train == ["python", "tools/train.py", f"+project={name}", "debug=fast"]
    assert "run folder" in inside(*train[1:])
    assert "passed" in inside(*tests[1:], "-q", "-p", "no:cacheprovider")
    found = subprocess.run(what_is_left, cwd=copy, capture_output=True, text=True)
    assert found.returncode == 0
    assert found.stdout.count("TODO") > 10


def test_a_language_project_runs_as_printed(commands, inside, copy):
    run_printed(TEXT, commands, inside, copy)


@pytest.mark.slow
def test_a_segmentation_project_runs_as_printed(commands, inside, copy, need_asset):
    need_asset("icbm152")
    run_printed(SEG, commands, inside, copy)


def test_a_segmentation_project_composes_and_its_network_is_right(commands, inside):
    inside("tools/train.py", f"+project={SEG}", "--cfg", "job")
    inside("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/projects/{SEG}", "-k", "not it_trains")


def test_the_house_still_stands(commands, inside):
    guards = "obeys or arrows_point or composes"
    inside("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/configs/test_house.py", "-k", guards)


def test_the_code_is_clean(commands, inside, copy):
    pytest.importorskip("ruff")
    folders = [f"{room}/{name}" for name in (TEXT, SEG, *EDGES) for room in ("projects", "tests/projects")]
    inside("-m", "ruff", "check", "--no-cache", *folders)
    inside("-m", "ruff", "format", "--no-cache", "--check", *folders)
    left = [
        p for f in folders for p in (copy / f).rglob("*.*") if p.suffix != ".pyc" and PLACEHOLDER.search(p.read_text())
    ]
    assert left == []


def test_the_zoo_and_its_tables_know_it(commands, inside):
    found = json.loads(inside("tools/list_zoo.py", "--json"))
    projects = {e["name"]: e for e in found["projects"]}
    assert (projects[SEG]["about"], projects[SEG]["arxiv"]) == ('A "net": x\\y', "2508.07237")
    assert (projects[TEXT]["about"], projects[TEXT]["arxiv"]) == ("My lm", None)
    assert all(entry["about"] for entries in found.values() for entry in entries)
    assert next(e for e in found["backbones"] if e["name"] == TEXT)["kind"] == "lm"
    tables = inside("tools/reproduce.py", "list")
    assert all(f"{name}/first" in tables for name in (TEXT, SEG, *EDGES))
    assert "not run" in inside("tools/reproduce.py", "report", f"{SEG}/first")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MyPaper", "such as my_paper"),
        ("my-paper", "such as my_paper"),
        ("1st", "snake_case"),
        ("a" * 31, "of 2 to 30"),
        ("../evil", "snake_case"),
        ("class", "Python itself"),
        ("json", "Python itself"),
        ("torch", "Python package"),
        ("mamba_ssm", "Python package"),
        ("shared", "has a meaning"),
        ("recipe", "has a meaning"),
        ("asm_unet", "is taken: conf/"),
    ],
)
def test_bad_names_get_one_message(module, root, capsys, name, reason):
    before = sorted(p for room in ("conf", "projects", "tests") for p in (root / room).rglob("*"))
    assert module.main([name]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert reason in err
    # Of another test's caches, which come and go, nothing is said here.
    after = sorted(p for room in ("conf", "projects", "tests") for p in (root / room).rglob("*"))
    assert [p for p in after if p not in before and "__pycache__" not in p.parts] == []


@pytest.mark.parametrize(("option", "value"), [("--arxiv", "99"), ("--title", "two\nlines"), ("--title", " ")])
def test_bad_values_get_one_message(module, capsys, option, value):
    assert module.main(["new_name", option, value]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_all_is_written_or_nothing(module, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    files = {Path("new/deep/a"): "a", Path("there/b"): "b", Path("there/file"): "yours"}
    with pytest.raises(FileExistsError):
        module.write(files, tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["there", "there/file"]
    assert (tmp_path / "there" / "file").read_text() == "mine"
